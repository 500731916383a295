"""The families that tests of tasks ask, in both styles."""

from train.tasks import (
    MINIATURE,
    FamilySpec,
)

INSTRUCT = [
    FamilySpec("chain_sum", "id", {"max_terms": 2, "max_digits": 2}, train=96, validation=32, test=64),
    FamilySpec("chain_sum", "harder", {"max_terms": 3, "max_digits": 2}, validation=32, test=64),
    FamilySpec("products", "ood", {"max_digits": 2}, test=48),
    FamilySpec("letter_counting", "ood", {"min_words": 1, "max_words": 3}, test=48),
    FamilySpec("basic_arithmetic", "ood", {"max_terms": 3, "max_digits": 1}, test=48),
    FamilySpec("number_sorting", "ood", {"max_numbers": 4, "max_decimals": 0}, test=16),
    FamilySpec("gcd", "ood", {"max_value": 30}, test=16),
    FamilySpec("simple_geometry", "ood", {}, test=16),
    FamilySpec("gsm_symbolic", "ood", {}, test=16),
]


COMPACT = [
    FamilySpec("gcd", "id", {"min_value": 1, "max_value": 130}, train=200, validation=40, test=80),
    FamilySpec("gcd", "harder", {"min_value": 100, "max_value": 200}, test=80),
    *[FamilySpec(x.family, "ood", x.args, test=60) for x in MINIATURE if x.family != "gcd"],
]
