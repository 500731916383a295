"""The load-balancing loss through the commands: a tiny mixture of experts is trained."""

import json

import pytest

from train.cli import __main__ as cli
from train.models.hf import load_hf, save_hf
from train.models.open import random_model
from train.runtime.jsonl import read_jsonl
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "family": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.5,
    "experts": {"count": 4, "per_token": 2, "intermediate_size": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture")
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    save_hf(place / "model", model.config, model.params, tokenizer_from=model.tokenizer)
    rows = [[{"role": "user", "content": f"{n}+1=?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return place


def test_a_mixture_trains_and_evens_out(folder, tmp_path, capsys):
    words = [
        "sft",
        str(folder / "model"),
        str(folder / "rows.jsonl"),
        str(tmp_path / "out"),
        "sft.epochs=8",
        "sft.batch=8",
    ]
    words += ["sft.max_length=32", "sft.learning_rate=1e-2", "sft.step.router_aux_loss_coef=10"]
    assert cli.main(words) == 0, capsys.readouterr().err
    (steps,) = tmp_path.glob("out/**/steps.jsonl")
    steps = read_jsonl(steps)
    first, last = steps[0], steps[-1]
    assert first["router_balance"] > last["router_balance"] >= 1.9
    assert first["loss"] > last["loss"] > 10 * last["router_balance"]
    assert last["router_max_share"] < first["router_max_share"]
    assert sum(last[f"expert_share_{e}"] for e in range(4)) == pytest.approx(1.0)
    assert load_hf(tmp_path / "out" / "hf")[0] == load_hf(folder / "model")[0]
