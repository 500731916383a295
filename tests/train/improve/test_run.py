"""The loop end to end: what a run leaves, and that kills at any point change nothing of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, forks

TINY = ROOT / "configs" / "tiny.yaml"
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests-runs"),
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
}


def small(tmp_path: Path) -> Path:
    """tiny.yaml with one round, one method trained and one merged: a third of its time."""
    config = yaml.safe_load(TINY.read_text())
    for name in ("exme", "line", "expo"):
        del config["methods"][name]
    config["rounds"] = 1
    config["sft"] |= {"snapshots": 1, "epochs": 3}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def jaxmerge(*words: object, point: str | None = None, calls: int = 1, code: int = 0, cwd: Path = ROOT):
    die = (point, calls) if point else None
    return ended(forks.run(list(map(str, words)), ENVIRONMENT, cwd=cwd, die=die), code)


def from_outside(*words: object, code: int = 0):
    """As users start it, in a new interpreter with a hash seed of its own."""
    program = [sys.executable, "-m", "train.cli", *map(str, words)]
    return ended(subprocess.run(program, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300), code)


def ended(result, code: int):
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def timeless(value):
    """Metrics without what a clock says."""
    if isinstance(value, dict):
        clocks = ("seconds", "tokens_per_second", "mfu", "phase_seconds", "command", "resumed")
        return {k: timeless(v) for k, v in value.items() if k not in clocks}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = small(folder)
    (folder / "said").write_text(from_outside("improve", config, f"out={folder / 'run'}").stdout)
    return config, folder / "run"


def test_a_run_leaves_what_a_program_expects(undisturbed):
    _, run = undisturbed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    keys = {"method", "round", "domain", "family", "split", "accuracy", "low", "high", "n", "seconds"}
    assert all(keys <= set(row) for row in summary["rows"])
    assert {(r["method"], r["round"]) for r in summary["rows"]} == {("base", 0), ("plain", 1), ("imm", 1)}
    assert {r["domain"] for r in summary["rows"]} == {"id", "harder", "ood"}
    assert all(0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1 for r in summary["rows"])
    phases = [line["phase"] for line in lines(run / "metrics.jsonl")]
    assert len(phases) == len(set(phases))
    assert yaml.safe_load((run / "config.yaml").read_text())["rounds"] == 1
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert list(run.glob("samples/plain/1.0.0/*array_record*"))
    assert not list(run.glob("checkpoints/**/state")), "the optimiser state goes once the phase is committed"


def test_the_terminal_and_the_page_say_how_far_the_run_is(undisturbed):
    _, run = undisturbed
    phases = [line["phase"] for line in lines(run / "metrics.jsonl")]
    said = re.findall(r"^phase (\d+) of (\d+) is done: (\S+) \(.*\)$", (run.parent / "said").read_text(), flags=re.M)
    assert said == [(str(i + 1), str(len(phases)), name) for i, name in enumerate(phases)]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["planned"], summary["left"]) == (phases, [])
    page = (run / "report.html").read_text()
    assert f"{len(phases)} of {len(phases)} phases are done." in page
    assert "http-equiv" not in page
    assert "random weights (2 layers, hidden size 32)" in page


def test_the_page_shows_the_same_test_questions_of_every_model(undisturbed):
    _, run = undisturbed
    shown = [line["examples"] for line in lines(run / "metrics.jsonl") if line["kind"] == "evaluate"]
    assert len(shown) == 3
    asked = [[(e["question_id"], e["answer"]) for e in examples] for examples in shown]
    assert asked[0] == asked[1] == asked[2]
    assert [(e["domain"], e["family"]) for e in shown[0]] == [
        ("id", "gcd"), ("harder", "gcd"), ("ood", "chain_sum"), ("id", "gcd"), ("harder", "gcd"), ("ood", "chain_sum"),
    ]  # fmt: skip
    for name, examples in zip(("base", "round-1/plain", "round-1/imm"), shown, strict=True):
        path = run / "phases" / name / "evaluate"
        scores = {r["question_id"]: r["score"] for r in lines(path / "scores.jsonl")}
        texts = {r["question_id"]: r["text"] for batch in path.glob("batch-*.jsonl") for r in lines(batch)}
        assert [(e["score"] == 1.0, e["text"]) for e in examples] == [
            (scores[e["question_id"]] == 1.0, texts[e["question_id"]]) for e in examples
        ]
    assert (run / "report.html").read_text().count("<h4>expected</h4>") >= len(shown[0])


def test_an_exported_model_has_a_card_with_its_accuracies(undisturbed, tmp_path):
    _, run = undisturbed
    jaxmerge("export", run, tmp_path / "model", "method=imm")
    _, front, body = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["self-improvement", "jaxmerge"]}
    rows = json.loads((run / "summary.json").read_text())["rows"]
    pooled = [r for r in rows if (r["family"], r["split"]) == ("all", "test")]
    mine, before = ({r["domain"]: r for r in pooled if r["method"] == name} for name in ("imm", "base"))
    for domain, label in (("id", "in domain"), ("ood", "out of domain")):
        (line,) = (line for line in body.splitlines() if line.startswith(f"| {label} |"))
        assert f"| {100 * mine[domain]['accuracy']:.1f} % |" in line
        assert line.endswith(f"| {mine[domain]['n']} | {100 * before[domain]['accuracy']:.1f} % |")
    assert "after round 1 of the method `imm`" in body
    jaxmerge("export", tmp_path / "model", tmp_path / "again")
    assert "model, written as a Hugging Face folder" in (tmp_path / "again" / "README.md").read_text()


def test_merging_shares_sampling_and_training_of_the_first_round(undisturbed):
    _, run = undisturbed
    phases = {line["phase"]: line for line in lines(run / "metrics.jsonl")}
    assert phases["round-1/plain/sft"]["shared_by"] == ["imm"]
    assert "round-1/imm/sft" not in phases
    assert phases["round-1/imm/merge"]["digest"] != phases["round-1/plain/sft"]["digest"]


def test_a_finished_run_is_shown_and_not_changed(undisturbed):
    config, run = undisturbed
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*") if p.is_file()}
    result = jaxmerge("improve", config, f"out={run}")
    assert result.stdout.strip().splitlines()[-1] == str(run)
    assert re.search(r"imm +1 ", result.stdout)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*") if p.is_file()}


def test_another_config_on_the_same_folder_is_refused(undisturbed):
    config, run = undisturbed
    result = jaxmerge("improve", config, f"out={run}", "seed=7", "sft.epochs=9", code=2)
    assert "seed: 0 → 7" in result.stderr
    assert "sft.epochs: 3 → 9" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# One run, killed at each of these points in turn and started again; (point, at which call).
KILLS = [
    ("sampling", 2),
    ("writing data", 1),
    ("data written", 1),
    ("training", 2),
    ("saving state", 2),
    ("training", 3),
    ("weights saved", 1),
    ("committed", 1),
    ("evaluating", 2),
    ("merging", 1),
]


def test_killed_anywhere_a_run_goes_on_and_ends_bit_identical(undisturbed, tmp_path):
    config, reference = undisturbed
    run = tmp_path / "run"
    batches: dict[Path, int] = {}
    for point, calls in KILLS:
        jaxmerge("improve", config, f"out={run}", point=point, calls=calls, code=-9)
        page = (run / "report.html").read_text()
        assert page.count('<meta http-equiv="refresh"') == 1
        named = len(lines(run / "metrics.jsonl"))  # at "committed" the folder is renamed, and no more
        assert re.search(rf"\b{named} of \d+ phases are done; next is", page), "each phase is on the page"
        for path, written in batches.items():
            final = Path(str(path).replace(".partial", ""))
            assert (path if path.exists() else final).stat().st_mtime_ns == written, f"{path} was sampled again"
        batches |= {p: p.stat().st_mtime_ns for p in run.glob("phases/**/batch-*.jsonl")}
        batches = {p: t for p, t in batches.items() if p.exists()}
    jaxmerge("improve", config, f"out={run}")
    ours, theirs = lines(run / "metrics.jsonl"), lines(reference / "metrics.jsonl")
    assert [line["phase"] for line in ours] == [line["phase"] for line in theirs]
    assert timeless(ours) == timeless(theirs)  # the digests of all weights among them
    assert [line["phase"] for line in theirs if "resumed" in line] == []
    resumed = {line["phase"] for line in ours if line.get("resumed")}
    assert {"round-1/plain/sample", "round-1/plain/sft"} <= resumed, "its seconds are not the whole"
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, reference)]
    assert timeless(summaries[0]) == timeless(summaries[1])
    for path in reference.glob("phases/**/batch-*.jsonl"):
        assert (run / path.relative_to(reference)).read_bytes() == path.read_bytes()


def test_fine_tuning_goes_on_from_its_checkpoint(undisturbed, tmp_path):
    config, _ = undisturbed
    run = tmp_path / "run"
    jaxmerge("improve", config, f"out={run}", point="training", calls=4, code=-9)
    (state,) = run.glob("checkpoints/round-1/plain/sft/state")
    assert [p.name for p in state.iterdir() if p.name.isdigit()] == ["2"]
    # Two further batches are drawn and then the process dies: at step 4, as the first two are not done again.
    jaxmerge("improve", config, f"out={run}", point="training", calls=3, code=-9)
    assert [p.name for p in state.iterdir() if p.name.isdigit()] == ["4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(undisturbed, tmp_path, number):
    """In the middle of fine-tuning, between two checkpoints of its own cadence."""
    config, reference = undisturbed
    run, log = tmp_path / "run", tmp_path / "log"
    process = forks.Fork(["improve", config, f"out={run}"], ENVIRONMENT, ROOT, (log, log))
    steps = run / "phases/round-1/plain/sft.partial/steps.jsonl"
    end = time.monotonic() + 120
    while not steps.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    code, said = process.wait(60), log.read_text()
    assert code == 75, said
    (step,) = re.findall(r"stopped after step (\d+) of \d+; saved", said)
    assert said.rstrip().endswith("stopped as asked; the same command goes on from here")
    (state,) = run.glob("checkpoints/round-1/plain/sft/state")
    assert [p.name for p in state.iterdir() if p.name.isdigit()] == [step]
    said = jaxmerge("improve", config, f"out={run}").stdout.splitlines()
    assert re.fullmatch(rf"{run}: \d of \d+ phases are there, round-1/plain/sft was begun; going on", said[0])
    assert any(re.fullmatch(rf"{step} of \d+ steps are there; going on", line) for line in said)
    assert timeless(lines(run / "metrics.jsonl")) == timeless(lines(reference / "metrics.jsonl"))


def test_weights_that_are_lost_are_made_again(undisturbed, tmp_path):
    config, reference = undisturbed
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "phases/round-1/imm/evaluate")
    shutil.rmtree(run / "checkpoints/round-1/imm/merge")
    jaxmerge("improve", config, f"out={run}")
    assert timeless(lines(run / "metrics.jsonl")) == timeless(lines(reference / "metrics.jsonl"))
    assert (run / "checkpoints/round-1/imm/merge/weights").is_dir()


def test_every_method_and_probe_of_tiny(tmp_path):
    run = tmp_path / "run"
    result = jaxmerge("improve", TINY, f"out={run}", "keep=1")
    assert result.stdout.strip().splitlines()[-1] == str(run)
    summary = json.loads((run / "summary.json").read_text())
    assert {r["method"] for r in summary["rows"]} == {"base", "plain", "imm", "expo", "exme", "line"}
    assert {r["coefficient"] for r in summary["rows"] if r["method"] == "line"} == {0.5, 1.5}
    kept = {str(p.parent.relative_to(run / "checkpoints")) for p in run.glob("checkpoints/*/*/*/weights")}
    assert all(name.startswith("round-2/") for name in kept), "keep=1 keeps the last round's weights"
    # Any of the models, probes too, can be written as a Hugging Face folder and read again.
    for method in ("imm", "exme"):
        jaxmerge("export", run, tmp_path / method, f"method={method}")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / method).iterdir()}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "\\ng12,18?"}\n{"prompt": "\\ng7,21?", "id": "b"}\n')
    for model in (tmp_path / "imm", run / "checkpoints/round-2/imm"):
        jaxmerge("sample", model, tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", "max_new_tokens=8")
        answers = lines(tmp_path / "out.jsonl")
        assert [a.get("id") for a in answers] == [None, "b"]
        assert all(len(a["tokens"]) == len(a["logprobs"]) <= 8 for a in answers)
    jaxmerge("evaluate", tmp_path / "imm", TINY, f"out={tmp_path / 'result.json'}")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    theirs = [r for r in summary["rows"] if (r["method"], r["round"]) == ("imm", 2)]
    assert [r["accuracy"] for r in rows] == [r["accuracy"] for r in theirs]
    # A checkpoint that lost a part is named, on one line.
    weights = run / "checkpoints/round-2/imm/merge/weights"
    for path in [p for p in weights.rglob("*") if p.is_file() and p.stat().st_size > 2000]:
        path.write_bytes(path.read_bytes()[:1000])
    result = jaxmerge("sample", weights, tmp_path / "prompts.jsonl", tmp_path / "other.jsonl", code=2)
    assert f"{weights}: the checkpoint is damaged" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "other.jsonl").exists()
