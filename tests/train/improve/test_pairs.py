"""Iterative preference: a round's right and wrong samples as pairs, learnt by an objective that compares, merged."""

import pytest
import yaml
from helpers import ROOT

from train.cli import __main__ as cli
from train.data.versions import read_version, write_version
from train.evaluate import answer
from train.improve import select as rounds
from train.improve.pairs import pair_up
from train.improve.settings import Improve, Selection
from train.log import UserError
from train.models.characters import EOS_ID, write_tokenizer
from train.models.tokenizer import Tokenizer
from train.resolve import build
from train.runtime.jsonl import read_jsonl
from train.tasks import FamilySpec, build_suite


def example(question, *answer):
    return {"question_id": question, "tokens": [0, *answer], "prompt_length": 1}


def test_pairs_use_every_sample_about_as_often_and_none_comes_twice():
    right = [example("a", 1), example("a", 2), example("b", 3), example("c", 4)]
    wrong = [("a", [0, 7]), ("a", [0, 8]), ("a", [0, 9]), ("b", [0, 7])]

    def made(most, earlier=()):
        return [(p["tokens"][1], p["rejected"][1]) for p in pair_up(right, wrong, most, earlier)]

    assert made(1) == [(1, 7), (3, 7)]
    assert made(4) == [(1, 7), (2, 8), (1, 9), (2, 7), (3, 7)]
    assert made(99) == [(1, 7), (2, 8), (1, 9), (2, 7), (1, 8), (2, 9), (3, 7)]  # c has no wrong sample
    earlier = [{**example("a", 1), "rejected": [0, 7]}, {**example("d", 5), "rejected": [0, 6]}]
    assert made(1, earlier) == [(1, 7), (5, 6), (3, 7)]


def test_pairs_are_right_and_wrong_samples_of_a_question(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    suite = build_suite(
        [FamilySpec("gcd", "id", {"min_value": 1, "max_value": 60}, train=4, test=4)], seed=0, style="compact"
    )
    first, second, *_ = questions = suite.questions("train")

    def sample(question, text, index, reason="eos"):
        tokens = tokenizer.encode(text) + ([EOS_ID] if reason == "eos" else [])
        return {"question_id": question.id, "sample": index, "text": text, "tokens": tokens, "reason": reason}

    samples = [
        sample(first, first.solution, 0),
        sample(first, "#99999", 1),
        sample(first, "#99999", 2),  # the same again
        sample(first, "#88888", 3, reason="length"),  # unfinished
        sample(second, second.solution, 0),
    ]
    scored = answer.verify(suite, {q.id: q for q in questions}, samples)
    examples, counts = rounds.select(suite, tokenizer, questions, scored, Selection(pairs=3), seed=0)
    (pair,) = examples
    assert pair["question_id"] == first.id
    start = pair["prompt_length"]
    said = [tokenizer.decode(pair[name][start:]) for name in ("tokens", "rejected")]
    assert said == [first.solution, "#99999"]
    assert pair["rejected"][:start] == pair["tokens"][:start]
    assert pair["rejected"][-1] == EOS_ID
    assert counts["examples_written"] == 1
    assert counts["unfinished"] == 1
    write_version(tmp_path, "pairs", "1.0.0", examples, {"round": 1})
    assert read_version(tmp_path, "pairs", "1.0.0")[0] == examples
    single = {k: v for k, v in pair.items() if k != "rejected"}
    with pytest.raises(UserError, match="some examples have rejected and some have not"):
        write_version(tmp_path, "pairs", "1.0.1", [pair, single], {})


def config_of(**method):
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    return {**config, "rounds": 1, "methods": {"preference": method}}


def test_pairs_and_objectives_that_compare_go_together():
    with pytest.raises(UserError, match=r"methods\.preference: .* dpo compares answers, and selection\.pairs is 0"):
        build(Improve, config_of(sft={"objective": {"name": "dpo"}}))
    with pytest.raises(UserError, match=r"learns from single answers, and selection\.pairs is 2"):
        build(Improve, config_of(selection={"pairs": 2}))


def test_rounds_of_preference(tmp_path, capsys):
    """The row of docs/methods/objective.yaml, with a merge at the end of each of two rounds."""
    (row,) = (r for r in yaml.safe_load((ROOT / "docs/methods/objective.yaml").read_text()) if r["verb"] == "improve")
    path, out = tmp_path / "preference.yaml", tmp_path / "out"
    config = config_of(merge={"rule": "imm"})
    path.write_text(
        yaml.safe_dump(
            {**config, "rounds": 2, "selection": {**config["selection"], "data": "accumulated"}}, sort_keys=False
        )
    )
    keys = [*row["keys"], "sft.epochs=2", "sft.snapshots=1", "sft.learning_rate=1e-4"]
    assert cli.main(["improve", str(path), f"out={out}", *keys]) == 0, capsys.readouterr().err
    records = {r["phase"]: r for r in read_jsonl(out / "metrics.jsonl") if "phase" in r}
    first, second = (records[f"round-{n}/preference/sft"] for n in (1, 2))
    assert first["loss_first"] == pytest.approx(0.6931, abs=2e-3)
    assert first["loss_last"] < first["loss_first"]
    assert second["examples"] > first["examples"]  # accumulated
