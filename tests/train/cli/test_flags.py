"""Flags of mergekit's command, given to ours."""

import re

import pytest
from helpers import ROOT

from train.cli.flags import MERGEKIT, answer
from train.cli.verbs import VERBS
from train.cli.words import parse
from train.log import UserError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cuda"], "--cuda is a flag of mergekit; here it is device=gpu"),
        (["--no-copy-tokenizer"], "--no-copy-tokenizer is a flag of mergekit; here leave it out: the tokenizer is alw"),
        (["--random-seed=3"], "here it is seed=0"),
        (["--out_shard_size", "5B"], "here it is max_shard_bytes=5000000000"),
        (["--unsafe-truncate-embeddings"], "here it is compat=mergekit allow=shapes"),
        (["-j", "4"], "-j is a flag of mergekit; here leave it out"),
        (["--load-in-8bit"], "here leave it out: the base of a recipe of experts is held in the dtype"),
        (["-vv"], "-vv is a flag of mergekit; here leave it out"),
    ],
)
def test_flags_of_mergekit_are_answered(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse(VERBS["merge"], ["recipe.yaml", "out", *words])


def test_flags_of_nobody_and_keys_of_ours_are_what_they_were():
    with pytest.raises(UserError, match="no flag --cudda"):
        parse(VERBS["merge"], ["recipe.yaml", "out", "--cudda"])
    _, assignments, _ = parse(VERBS["merge"], ["recipe.yaml", "out", "--device", "cpu", "--seed=3"])
    assert assignments == ["device=cpu", "seed=3"]
    with pytest.raises(UserError, match="no flag --cuda"):
        parse(VERBS["inspect"], ["a", "b", "--cuda"])


def test_the_documentation_has_every_flag():
    text = (ROOT / "docs" / "merge.md").read_text().split("## Flags")[1].split("\n## ")[0]
    for flag, here in MERGEKIT.items():
        assert f"`{flag}`" in text, flag
        if key := re.match(r"(\w+)=", here):
            line = next(line for line in text.splitlines() if f"`{flag}`" in line)
            assert key[1] in line, flag


@pytest.mark.oracle
def test_every_flag_of_mergekit_is_known():
    options = pytest.importorskip("mergekit.options")
    for name in options.MergeOptions.model_fields:
        assert answer(f"--{name.replace('_', '-')}", MERGEKIT), name
