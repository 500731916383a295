"""The rows of docs/methods/beside.yaml and mask.yaml train a tiny model; blocks are merged again by `export`."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import yaml
from helpers import ROOT

from train.cli import __main__ as cli
from train.learn.beside import remerge
from train.learn.decay import Linear
from train.models.hf import save_hf
from train.models.open import open_model, random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
TRAINING = ("sft.epochs=2", "sft.batch=4", "sft.learning_rate=0.01", "sft.max_length=32", "sft.warmup=0")
ROWS = [row for name in ("beside", "mask") for row in yaml.safe_load((ROOT / f"docs/methods/{name}.yaml").read_text())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of characters, and examples beside it."""
    home = tmp_path_factory.mktemp("rows")
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    save_hf(home / "model", model.config, model.params, tokenizer_from=model.tokenizer)
    lines = [{"prompt": f"{i}+{i + 1}?", "completion": str(2 * i + 1)} for i in range(8)]
    (home / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def trained(folder, out, *keys):
    words = ["sft", str(folder / "model"), str(folder / "train.jsonl"), str(out)]
    assert cli.main([*words, *TRAINING, *keys]) == 0
    return open_model(str(out / "hf"))


@pytest.fixture(scope="module")
def plain(folder):
    return trained(folder, folder / "plain")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_row_trains(folder, plain, row, tmp_path):
    assert row["verb"] == "sft"
    tuned = trained(folder, tmp_path / "run", *row["keys"])
    before = open_model(str(folder / "model"))
    for other in (plain, before):
        assert any(
            not np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(m.params) for m in (tuned, other)), strict=True)
        )


def test_export_merges_the_blocks_of_a_run_again(folder, tmp_path, capsys):
    run = tmp_path / "run"
    model = trained(folder, run, "sft.schedule=constant", "sft.beside={every: 1, block: 2}")
    assert cli.main(["export", str(run), str(tmp_path / "out"), "decay.name=linear", "last=0.5"]) == 0
    wanted = remerge(run / "blocks", model.params, Linear(), 0.5)
    found = open_model(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted)
    capsys.readouterr()
    assert cli.main(["export", str(run), str(tmp_path / "refused"), "decay.name=cosine"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{run / 'blocks'}: block 0 (snapshots 0 to 1) is kept as one mean" in line
    assert cli.main(["export", str(folder / "plain"), str(tmp_path / "refused"), "decay.name=linear"]) == 2
    assert "no blocks of snapshots there" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "refused"), "last=0.5"]) == 2
    assert "give decay.name=linear" in capsys.readouterr().err
