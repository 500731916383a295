"""Any value of any key of a config.json is read, or refused in one line that names it."""

import pytest
from helpers.goldens.family_cases import FAMILY_CASES, LLAMA
from helpers.tiny_models import config_of

from train.log import UserError
from train.models.families import FAMILIES


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_any_value_of_any_key_is_read_or_refused(name):
    attributes = {key: value for key, value in FAMILY_CASES[name].items() if key != "head_dim"}
    keys = {*attributes, *FAMILIES[attributes["model_type"]].absent} - {"model_type"}
    refused = []
    for key in sorted(keys):
        for value in (0, -1, 10**30, float("inf"), float("nan"), "x", [], [None], {}, {"a": 1}, None):
            try:
                config_of({**attributes, key: value})
            except UserError as error:
                refused.append(str(error))
    assert refused
    assert all("\n" not in message and len(message) < 1000 for message in refused)


def test_a_config_without_heads_is_refused_by_name():
    attributes = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    with pytest.raises(UserError, match="num_attention_heads is 0; it must be at least 1"):
        config_of({**attributes, "num_attention_heads": 0})
