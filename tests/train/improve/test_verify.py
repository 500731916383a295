"""`jaxmerge verify` of a run: its merges replayed from its own checkpoints, and what is not as the run says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from helpers import ROOT

from jaxmerge.files import verdict
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.verdict import Unsure
from train.cli.__main__ import main
from train.improve import merge as combine
from train.improve import verify as verifying
from train.improve.export import export
from train.improve.origin import origin_of
from train.improve.run import improve
from train.improve.settings import Improve, Merge
from train.resolve import build
from train.runtime import checkpoint

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
METHODS = {
    "plain": {},
    "half": {"merge": {"rule": "imm", "alpha": {"layers/0": 0.4, "**": 0.6}, "where": ["model"]}},
    "masks": {"merge": {"rule": "imm", "alpha": 0.5, "drop": 0.2}},
    "ties": {"merge": {"rule": "ties", "alpha": 0.5, "parameters": {"density": 0.4}}},
    "expo": {"probe": {"of": "plain", "kind": "expo"}},
}
MERGED = ("half", "masks", "ties")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    small = {
        "rounds": 1,
        "tasks": {**TINY["tasks"], "families": [{**TINY["tasks"]["families"][0], "train": 8, "test": 4}]},
        "sft": {**TINY["sft"], "snapshots": 1, "epochs": 2},
        "evaluation": {**TINY["evaluation"], "base": False},
    }
    config = build(Improve, {**TINY, **small, "methods": METHODS})
    return improve(config, name="verify", out=place / "run", quiet=True)


@pytest.fixture
def run(done, tmp_path) -> Path:
    """A copy of the run, to be spoiled."""
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def verify(out: Path, of: Path | None = None, **more):
    origin = origin_of(str(out), None if of is None else str(of))
    assert origin is not None
    return verifying.verify(str(out), origin, **more)


def place(run: Path, method: str) -> Path:
    return run / "checkpoints" / "round-1" / method


def replaced(run: Path, model: str, change) -> None:
    """Write a checkpoint again with its parameters changed."""
    weights = verifying.open_run(run).weights
    path = weights.folder(model) / "weights"
    params = jax.tree.map(np.array, weights.read(path))
    shutil.rmtree(path)
    checkpoint.save_weights(path, change(params) or params)


def test_every_merge_of_a_run_is_what_the_run_says(done, monkeypatch):
    for everything in (False, True):
        report = verify(done, everything=everything)
        assert (report["code"], report["unsure"]) == (0, {})
        assert [part["tensors"] for part in report["models"]] == [{"right": 21}] * 3
    monkeypatch.setattr(verdict, "RUN", 8)  # so that these tensors are sampled
    for method in MERGED:
        assert verify(place(done, method))["code"] == 0
    assert verify(place(done, "half") / "merge" / "weights")["models"][0]["tensors"] == {"right": 21}


@pytest.mark.parametrize("method", MERGED)
def test_a_tensor_that_was_altered_is_named(run, method, monkeypatch):
    monkeypatch.setattr(verdict, "RUN", 8)

    def spoil(params):
        params["model"]["layers"]["1"]["self_attn"]["q_proj"]["weight"][1, 1] += 1.0  # between the sampled runs

    replaced(run, f"round-1/{method}/merge", spoil)
    report = verify(place(run, method))
    ((wrong,), tensors) = report["models"][0]["wrong"], report["models"][0]["tensors"]
    assert (report["code"], wrong.tensor, wrong.verdict, tensors) == (1, Q, "different", {"right": 20, "different": 1})


def test_a_change_within_rounding_shows_in_the_digest(run):
    def nudge(params):
        norm = params["model"]["norm"]["weight"]
        norm[0] = np.nextafter(norm[0], np.float32(9))

    replaced(run, "round-1/half/merge", nudge)
    ((wrong,),) = (part["wrong"] for part in verify(place(run, "half"))["models"])
    assert "the run recorded" in wrong.detail
    assert verify(run)["code"] == 1


@pytest.mark.parametrize(("method", "alpha"), [("half", {"layers/0": 0.2, "**": 0.3}), ("masks", 0.25), ("ties", 0.25)])
def test_a_merge_with_another_alpha_has_another_strength(run, method, alpha):
    open_run = verifying.open_run(run)
    base, tuned = open_run.weights.get("base"), open_run.weights.get("round-1/plain/sft")
    block = build(Merge, open_run.todo[f"round-1/{method}/merge"].settings["merge"], "merge")
    key = combine.key_of(jax.random.key(0), 1)
    replaced(run, f"round-1/{method}/merge", lambda _: combine.merged(base, tuned, block, alpha, key=key))
    (part,) = verify(place(run, method))["models"]
    assert part["code"] == 1
    strengths = [wrong.strength for wrong in part["wrong"] if wrong.verdict == "wrong strength"]
    assert len(strengths) >= 18  # of some norms the change is within rounding
    assert strengths == pytest.approx([0.5] * len(strengths), abs=0.01)


def test_without_the_tuned_checkpoint_nothing_can_be_told(run, capsys):
    shutil.rmtree(place(run, "plain") / "sft")
    with pytest.raises(Unsure, match=r"checkpoint of round-1/plain/sft, which the merge is made of, is gone"):
        verify(place(run, "ties"))
    assert main(["verify", str(run)]) == 2
    assert capsys.readouterr().out.count("cannot tell: the checkpoint of round-1/plain/sft") == 3


def test_what_rests_on_another_checkpoint_or_version_cannot_be_told(run, done):
    with pytest.raises(Unsure, match="is no merge: training cannot be replayed"):
        verify(place(done, "plain"))
    with pytest.raises(Unsure, match=r"no model 'round-1/nobody'; there are round-1/plain/sft, round-1/half/merge"):
        verify(place(done, "nobody"))

    def drawn(params):  # as another generator's masks would leave it
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: x + rng.standard_normal(x.shape).astype(x.dtype), params)

    replaced(run, "round-1/masks/merge", drawn)
    assert verify(place(run, "masks"))["code"] == 1
    summary = json.loads((run / "summary.json").read_text())
    for versions, words in [
        ({"jax": "0.3.2"}, r"by jax 0\.3\.2 when it was made"),
        ({"masks": "1"}, r"another generator when it was made \(version 1\)"),
    ]:
        (run / "summary.json").write_text(json.dumps(summary | {"versions": summary["versions"] | versions}))
        with pytest.raises(Unsure, match=words):
            verify(place(run, "masks"))
    replaced(run, "round-1/plain/sft", drawn)
    with pytest.raises(Unsure, match=r"round-1/plain/sft is not what the run made: its digest is"):
        verify(place(run, "half"))
    assert verify(place(run, "plain"))["code"] == 1


@pytest.mark.parametrize("method", ["half", "masks", "plain", "expo"])
def test_an_exported_model_is_held_to_its_run(run, tmp_path, method):
    out = tmp_path / "exported"
    export(str(run), str(out), method=method, dtype="bfloat16")
    report = verify(out)
    assert (report["code"], report["models"][0]["tensors"]) == (0, {"right": 21})
    arrays = {name: np.array(leaf.load()) for name, leaf in verifying.found_in(str(out))[0].items()}
    (out / safetensors.SINGLE).unlink()
    safetensors.write_file(out / safetensors.SINGLE, arrays | {Q: arrays[Q].T})
    ((wrong,),) = (part["wrong"] for part in verify(out)["models"])
    assert (wrong.tensor, wrong.verdict) == (Q, "transposed")


def test_a_run_that_moved_is_named_and_a_damaged_folder_is_unreadable(run, tmp_path, capsys):
    out = tmp_path / "exported"
    export(str(run), str(out), method="masks")
    run.rename(tmp_path / "moved")
    assert main(["verify", str(out)]) == 2
    assert "is not there; give it with of=RUN" in capsys.readouterr().out
    assert main(["verify", str(out), f"of={tmp_path / 'moved'}", f"json={tmp_path / 'found.json'}"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["models"][0]["tensors"] == {"right": 21}
    assert main(["verify", str(out), f"of={place(tmp_path / 'moved', 'ties')}"]) == 1
    (out / "export.json").unlink()
    assert main(["verify", str(out), f"of={tmp_path / 'moved'}"]) == 2
    assert "does not say which model" in capsys.readouterr().out
    (out / safetensors.SINGLE).write_bytes(b"no")
    assert main(["verify", str(out), f"of={place(tmp_path / 'moved', 'ties')}"]) == 3
