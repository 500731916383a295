"""The rows of docs/methods/data.yaml by their verbs: all of `improve` in one run, whose plain samples they share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, forks

from train.data.versions import read_version

ROWS = yaml.safe_load((ROOT / "docs" / "methods" / "data.yaml").read_text())
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests-runs"),
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
}
RUN = {
    "model": {"path": "configs/miniature-judge"},
    "tasks": {
        "style": "compact",
        "families": [
            {"family": "gcd", "domain": "id", "args": {"min_value": 1, "max_value": 30}, "train": 12, "test": 2}
        ],
    },
    "sampling": {"samples": 4, "temperature": 1.2, "max_new_tokens": 40, "slots": 16, "batch": 12},
    # One length of row, and a loss at every place of it: one program of the step serves all methods but TRICE.
    "sft": {"learning_rate": 1e-4, "epochs": 1, "packing": True, "batch": 4, "max_length": 96, "loss": "all"},
    "evaluation": {"max_new_tokens": 32, "slots": 8, "base": False},
    "methods": {},
}
# The miniatures have 60 characters: no words, and steps with a comma between them.
IN_SYMBOLS = {
    "r-tuning": ['selection.rewrite.ask="?"', 'selection.rewrite.sure="1"', 'selection.rewrite.unsure="0"'],
    "lemma": ['selection.rewrite.step=","', 'selection.rewrite.phrases=["!"]'],
    "critique": [
        'selection.rewrite.ask="{question}{solution}!"', 'selection.rewrite.right="1"', 'selection.rewrite.wrong="0"'
    ],
    "reflect": ['sampling.search.reflection={step: ",", phrase: "1=1"}'],
    "retro": ['sampling.search.retro={step: ",", switches: ["1", "2"], tries: 3}'],
}  # fmt: skip


def command(*words: object) -> None:
    result = forks.run(list(map(str, words)), ENVIRONMENT, cwd=ROOT, seconds=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def name_of(row) -> str:
    return row["keys"][0].partition("=")[0].removeprefix("methods.")


IMPROVE = {name_of(row): row for row in ROWS if row["verb"] == "improve"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    words = [key for row in IMPROVE.values() for key in row["keys"]]
    words += [f"methods.{name}.{key}" for name, keys in IN_SYMBOLS.items() for key in keys]
    command("improve", folder / "run.yaml", *words, f"out={folder / 'run'}")
    return folder / "run"


@pytest.fixture(scope="module")
def examples(run):
    def of(name):
        return read_version(run / "samples", name.replace("-", "_"), "1.0.0")[0]

    return of


@pytest.fixture(scope="module")
def records(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["phase"]: record for record in lines}


def samples(run, name):
    paths = sorted((run / "phases" / "round-1" / name / "sample").glob("batch-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", IMPROVE)
def test_rows_of_improve(name, records, examples):
    found = records[f"round-1/{name}/sft"]
    assert found["steps"] >= 1
    assert abs(found["loss_last"]) < 20
    assert examples(name)


def test_the_methods_make_what_they_say(run, examples, records):
    assert {e["weight"] < 0 for e in examples("trice")} == {True, False}
    assert {e["completion"][-2:] for e in examples("r-tuning")} == {"?1", "?0"}
    assert all(",!," in e["completion"] for e in examples("lemma"))
    assert {(e["prompt"][-1], e["completion"]) for e in examples("critique")} == {("!", "1"), ("!", "0")}
    critic = examples("critic")
    assert all(e["prompt"].endswith("!") and e["completion"][-8:] in ("score:10", ";score:0") for e in critic)
    assert all("," not in e["completion"] and e["prompt"].endswith("?") for e in examples("guidance"))
    whole = len(examples("rft"))
    assert records["round-1/select2reason/select"]["picked"] == len(examples("select2reason")) < whole
    assert len(examples("deita")) <= whole


def test_chains_are_gone_on_with_at_changes_of_thought_and_behind_doubts(run):
    drawn = {}
    for name in ("retro", "reflect"):
        lines = (run / "phases" / "round-1" / name / "sample" / "replies.jsonl").read_text().splitlines()
        drawn[name] = {(r["id"], r["name"]): r for r in map(json.loads, lines)}
    rows = samples(run, "retro")
    assert len(rows) == 48
    for row in rows:
        before = drawn["retro"][row["question_id"], f"chain{row['sample']}"]
        assert len(row["text"]) <= len(before["text"])
    assert any("/thought1/" in name for _, name in drawn["retro"])
    assert any("/doubt0" in name for _, name in drawn["reflect"])


# --- sft ---

TUNE = {
    "model": {"path": "configs/miniature-judge"},
    "sft": {"learning_rate": 1e-3, "epochs": 1, "packing": True, "batch": 4, "max_length": 96},
}


def lines(path: Path, count: int, first: int) -> Path:
    def line(i):
        scores = {"complexity": i % 5 + 1, "quality": i % 3 + 1, "difficulty": i / count}
        return {"prompt": f"{first}+{i}=", "completion": str(first + i), **scores}

    path.write_text("".join(json.dumps(line(i)) + "\n" for i in range(count)))
    return path


@pytest.mark.parametrize("row", [row for row in ROWS if row["verb"] == "sft"], ids=lambda row: row["name"])
def test_a_row_of_sft(row, tmp_path):
    files = {
        "SCORED": lines(tmp_path / "scored.jsonl", 12, 10),
        "SPECIAL": lines(tmp_path / "special.jsonl", 16, 20),
        "GENERAL": lines(tmp_path / "general.jsonl", 8, 50),
    }
    words = list(row["keys"])
    for name, path in files.items():
        words = [word.replace(name, str(path)) for word in words]
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(TUNE))
    command("sft", tmp_path / "tune.yaml", *words, f"out={tmp_path / 'out'}")
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    learnt = {
        "DEITA": range(1, 7), "Select2Reason": [6], "Dual-stage mixed fine-tuning (DMT)": [16 + 2 + 8],
        "Cocktail mixing": [31],
    }[row["name"]]  # fmt: skip
    assert record["examples"] in learnt
