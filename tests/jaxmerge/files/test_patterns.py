"""Patterns of adapters: PEFT's meaning, in linear time; what cannot have both is refused."""

import re
import time

import pytest

from jaxmerge.files.patterns import is_found, matches_module

MODULES = (
    "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.up_proj", "xq_proj", "model.xq_proj", "q_proj.more", "Q_PROJ", "", ".q_proj", "lm_head",
)  # fmt: skip
TAKEN = (
    "q_proj", r"model\.layers\.1\.self_attn\.q_proj", "layers.1.self_attn.q_proj", r"layers\.\d+\..*", "q_proj|up_proj",
    r".*\.(q|up)_proj", r"^q_proj", r"q_proj$", "(?i:q_PROJ)", r"layers\.(?:0|1)\.\w+\.\w+", "[^.]+_proj", "x?q_proj",
    r"(?P<n>q)_proj", "q_proj{1}", "q_proj{0,2}", r"layers\.[0-9]{1,2}\.mlp\..+?", "", "a|", r"\w*", r"lm_head\b",
)  # fmt: skip


@pytest.mark.parametrize("pattern", TAKEN)
def test_patterns_mean_what_they_mean_to_peft(pattern):
    found = [matches_module(pattern, module, "x") for module in MODULES]
    assert found == [re.match(rf"(.*\.)?({pattern})$", module) is not None for module in MODULES]


@pytest.mark.parametrize("pattern", [*TAKEN, "_proj$", "^model", r"layers\.1\.", "(q|k)_proj$"])
def test_patterns_are_found_where_python_finds_them(pattern):
    assert [is_found(pattern, m, "x") for m in MODULES] == [re.search(pattern, m) is not None for m in MODULES]


@pytest.mark.parametrize("pattern", ["(a+)+b", r"(\w+\s?)*!", "(a|aa)+b", "(.*)*b", "(a*)*(a*)*(a*)*b"])
def test_no_pattern_takes_for_ever(pattern):
    start = time.monotonic()
    assert not matches_module(pattern, "a" * 20_000, "x")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?=q)q_proj", "cannot be matched safely .*lookaround"),
        ("(?<!x)q_proj", "cannot be matched safely"),
        (r"(a)\1", "cannot be matched safely"),
        ("(a{900}){900}", "cannot be matched safely"),
        ("q{,3}", "means something else"),
        ("[[:alpha:]]", "is no regular expression|means something else"),
        ("(q", "is no regular expression"),
        (r"\pL", "is no regular expression"),
        ("a" * 3000, "is no text of at most 2000 characters"),
        ("(" * 1000 + ")" * 1000, "is no regular expression|cannot be matched|is no text"),
        (7, "is no text"),
    ],
)
def test_what_cannot_have_both_is_refused(pattern, words):
    with pytest.raises(ValueError, match=words) as caught:
        matches_module(pattern, "q_proj", "lora/adapter_config.json: rank_pattern")
    assert str(caught.value).startswith("lora/adapter_config.json: rank_pattern: pattern ")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
