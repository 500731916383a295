"""What the sinks are told of rounds: accuracies, losses and speed by method, each point once however a run went."""

import json
import pathlib

import pytest
import yaml

from train.cli import __main__ as cli
from train.improve import phases
from train.runtime import sinks
from train.runtime.stop import Stopped

TINY = pathlib.Path(__file__).parents[3] / "configs" / "tiny.yaml"

TOLD = ((0, "base"), (1, "plain"), (1, "imm"))


class Recorder:
    """Takes what TensorBoard would be given."""

    opened: list["Recorder"]

    def __init__(self, folder, *, name, config, axis="step"):
        self.name, self.config, self.axis, self.rows = name, config, axis, []
        self.opened.append(self)

    def write(self, metrics):
        self.rows.append(dict(metrics))

    def close(self):
        self.closed = True


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(Recorder, "opened", [], raising=False)
    monkeypatch.setitem(sinks.SINKS, "tensorboard", Recorder)
    monkeypatch.setattr(sinks, "check_sinks", lambda names: None)
    monkeypatch.setattr("train.improve.run.check_sinks", lambda names: None)
    return Recorder.opened


def improve(folder) -> int:
    config = yaml.safe_load(TINY.read_text())
    config["methods"] = {name: config["methods"][name] for name in ("plain", "imm")}
    config["sft"] |= {"epochs": 1, "watch": {"sinks": ["tensorboard"]}}
    config["evaluation"]["samples"] = 2
    config["rounds"] = 1
    (folder / "short.yaml").write_text(yaml.safe_dump(config))
    return cli.main(["improve", str(folder / "short.yaml"), f"out={folder / 'run'}"])


def test_rounds_are_told_once_though_a_run_was_stopped(opened, tmp_path, monkeypatch):
    done = []

    def stopping(session, phase, folder):
        if len(done) == 1:
            raise Stopped
        done.append(phase.name)
        return evaluate(session, phase, folder)

    evaluate = phases.STEPS["evaluate"]
    monkeypatch.setitem(phases.STEPS, "evaluate", stopping)
    assert improve(tmp_path) == 75
    monkeypatch.setitem(phases.STEPS, "evaluate", evaluate)
    assert improve(tmp_path) == 0
    first, second = (sink for sink in opened if sink.name == "rounds")
    assert first.closed
    assert second.closed
    assert len(first.rows) == 1
    # A process that goes on gives all from the beginning, under the same steps: a sink drops or purges what it has.
    assert second.rows[:1] == first.rows
    assert [row["step"] for row in second.rows] == [0, 1, 2]
    assert second.axis == "round"
    assert second.config["sft"]["learning_rate"] == 3e-3
    found = {key: (row["round"], value) for row in second.rows for key, value in row.items()
             if (row["round"], key.partition("/")[0]) in TOLD}  # fmt: skip
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for row in summary["rows"]:
        if (row["round"], row["method"]) in TOLD and row["family"] == "all" and row["split"] == "test":
            domain = row["domain"]
            for key, value in [
                ("accuracy", row["accuracy"]),
                ("accuracy_low", row["low"]),
                ("accuracy_high", row["high"]),
            ]:
                assert found[f"{row['method']}/{key}/{domain}"] == (row["round"], value)
            assert found[f"{row['method']}/pass@2/{domain}"] == (row["round"], row["pass_at"]["2"])
    record = json.loads((tmp_path / "run/phases/round-1/imm/sft/record.json").read_text())
    assert found["imm/loss_last"] == (1, record["loss_last"])
    assert found["plain/loss_last"] == (1, record["loss_last"])  # one fine-tuning, of both methods
    assert found["imm/steps_per_second"] == (1, record["steps"] / record["seconds"])
    counts = json.loads((tmp_path / "run/phases/round-1/imm/select/record.json").read_text())
    assert found["imm/samples_right"] == (1, counts["correct"] / counts["sampled"])
