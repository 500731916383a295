"""The configs for real models and data: planned at their size without weights, and run whole on two questions."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from helpers import ROOT
from helpers.played_hub import played_hub
from helpers.ready import MODELS, SLICES, path_of, serve, serve_small

from tpu.presets import model_of
from train.cli import __main__ as cli
from train.improve import budget, paper
from train.improve.devices import DEVICES, GIB
from train.improve.plan import plan
from train.improve.settings import Improve
from train.resolve import load


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A hub with datasets of the published sizes, and of the models the config alone."""
    with played_hub(tmp_path_factory.mktemp("cache")) as hub:
        serve(hub)
        yield hub


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_needs_the_models_config_alone(full, name, capsys):
    model, preset = MODELS[name]
    before = len(full.asked)
    assert cli.main(["improve", path_of(name), "--dry-run"]) == 0
    out = capsys.readouterr().out
    count = paper.parameters(model_of(preset))
    assert f"model: {count / 1e6:.1f} M parameters" in out
    fetched = {line.rpartition("/")[2] for line in full.asked[before:] if f"/{model}/resolve/" in line}
    assert fetched <= {"config.json", ".gitattributes"}
    config = load(Improve, path_of(name))
    train = sum(f.train for f in config.tasks.families)
    assert f"questions: {train} to train on" in out
    for kind in ("fine-tuning", "sampling", "evaluating"):
        assert re.search(rf"^  {kind} +\d+\.\d\d GiB: ", out, re.MULTILINE)
    most = re.search(r"tokens of sampling: about [\d,]+ .* at most ([\d,]+)", out)
    assert most is not None
    if config.sampling.source == "plain" and not any(m.sampling for m in config.methods.values()):
        rounds = sum(line.strip().split("  ")[0].endswith("/sample") for line in out.splitlines())
        wanted = train * config.sampling.samples * config.sampling.max_new_tokens * rounds
        assert int(most[1].replace(",", "")) == wanted
    assert all(re.search(rf"^  {device} +[\d.,]+ +[\d.,]+ ", out, re.MULTILINE) for device in DEVICES)


@pytest.mark.parametrize(("name", "where"), [(name, where) for name, slices in SLICES.items() for where in slices])
def test_a_slice_of_the_head_has_room(name, where):
    device, _, keys = SLICES[name][where]
    config, model = load(Improve, path_of(name), keys), model_of(MODELS[name][1])
    found = budget.memory(config, model, plan(config)[0], read=200)
    needed = {kind: sum(parts.values()) for kind, parts in found.items()}
    assert max(needed.values()) < DEVICES[device].hbm
    head = "\n".join(
        line for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    )
    assert f"{where} ({max(needed.values()) / GIB:.0f} GiB a chip)" in head
    assert "Not run at this size" in head
    assert re.search(
        rf"#   jaxmerge improve configs/{re.escape(name)}\.yaml(?: {re.escape(' '.join(keys))})? +# {where}", head
    )


def made_small(name: str) -> dict:
    """The config with two questions of each family and split, short answers, and solutions to learn from."""
    values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    for family in values["tasks"]["families"]:
        family |= {split: min(family.get(split, 0), 2) for split in ("train", "validation", "test")}
    few = {"slots": 4, "batch": 2}
    values["sampling"] |= {**few, "max_new_tokens": min(values["sampling"]["max_new_tokens"], 8)}
    values["evaluation"] |= {**few, "max_new_tokens": 8}
    values["sft"] |= {"batch": 2, "micro_batch": 2, "max_length": 2048, "epochs": 2 * values["sft"]["epochs"]}
    # Random weights solve nothing.
    values["selection"] = {**values.get("selection", {}), "real_ratio": 1.0}
    values.pop("mesh", None)
    return values


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_config_runs_whole_on_two_questions(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made_small(name), sort_keys=False))
    with played_hub(tmp_path / "cache") as hub:
        serve(hub, share=0.001)
        serve_small(hub, name, tmp_path / "model")
        assert cli.main(["improve", f"{name}.yaml", "out=run"]) == 0
        hub.offline()
        assert cli.main(["improve", f"{name}.yaml", "out=run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = load(Improve, tmp_path / "run" / "config.yaml")
    assert summary["finished"]
    assert {row["method"] for row in summary["rows"]} == {"base", *config.methods}
    paths = [str(f.args["path"]) for f in config.tasks.families if "path" in f.args]
    assert all(re.search("@[0-9a-f]{40}", path) for path in paths)
