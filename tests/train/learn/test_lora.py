"""Fine-tuning adapters: little changes and by little rank, every setting counts, a stopped run ends as any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import SFT, SIZES, assert_bits, tune, without_seconds

from train.learn.batches import to_rows
from train.learn.checkpoints import SftCheckpoints
from train.log import UserError
from train.models.characters import PAD_ID, encode
from train.models.config import Lora
from train.models.hf import named, save_hf
from train.models.lora import merge_lora
from train.models.lora_files import load_lora
from train.models.open import random_model
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.tasks.pretraining import MINIATURE, pretraining_examples

LORA = Lora(rank=2, alpha=8.0, targets=(r"(q|v|up|down)_proj$",))
ADAPTED = dataclasses.replace(SFT, lora=LORA, learning_rate=3e-2, epochs=1)


def with_lora(**changes):
    return dataclasses.replace(ADAPTED, lora=dataclasses.replace(LORA, **changes))


@pytest.fixture(scope="module")
def rows():
    texts = pretraining_examples(MINIATURE, seed=1, row=48)
    lines = [next(texts) for _ in range(32)]
    return to_rows([{"tokens": encode(x), "prompt_length": x.index("?") + 1} for x in lines], SFT, PAD_ID)


@pytest.fixture(scope="module")
def tuned(model, rows, mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return (*tune(model, rows, ADAPTED, mesh, adapter_to=folder), folder)


def test_the_change_is_of_the_targets_and_of_the_rank(model, tuned):
    params, log, _ = tuned
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    before = dict(named(model.params))
    for name, after in named(params):
        change = np.asarray(after - before[name])
        if any(part in name for part in ("q_proj", "v_proj", "up_proj", "down_proj")):
            sizes = np.linalg.svd(change, compute_uv=False)
            assert sizes[1] > 1e-3 * sizes[0] > 0
            assert (sizes[2:] < 1e-4 * sizes[0]).all()
        else:
            assert not change.any(), name


def test_the_first_loss_is_that_of_all_weights(model, rows, mesh, tuned):
    """A new adapter changes nothing."""
    once = dataclasses.replace(SFT, epochs=1)
    assert abs(tune(model, rows, once, mesh)[1][0]["loss"] - tuned[1][0]["loss"]) < 1e-6


def test_the_adapter_that_is_written_is_the_one_merged(model, tuned):
    lora, adapter = load_lora(tuned[2])
    for (name, a), (_, b) in zip(named(merge_lora(lora, model.params, adapter)), named(tuned[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "changes", [{"rank": 3}, {"alpha": 4.0}, {"targets": (r"q_proj$",)}, {"dropout": 0.5}], ids=lambda c: next(iter(c))
)
def test_every_setting_counts(changes, model, rows, mesh, tuned):
    log = tune(model, rows, with_lora(**changes), mesh)[1]
    assert abs(log[-1]["loss"] - tuned[1][-1]["loss"]) > 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_ends_as_an_undisturbed_one(dropout, model, rows, mesh, tmp_path):
    config = dataclasses.replace(with_lora(dropout=dropout), checkpoint_every=2)
    wanted, log = tune(model, rows, config, mesh)

    class Stop(Exception):
        pass

    def stop(metrics):
        if metrics["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path / "state"), on_step=stop)
    found, again = tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path / "state"))
    assert_bits(found, wanted)
    assert without_seconds(again) == without_seconds(log)


def test_accumulated_parts_are_the_batch_and_draw_their_own_masks(model, rows, mesh, tuned):
    parts = dataclasses.replace(ADAPTED, micro_batch=2)
    log = tune(model, rows, parts, mesh)[1]
    np.testing.assert_allclose([m["loss"] for m in log], [m["loss"] for m in tuned[1]], rtol=2e-4)
    dropped = [
        tune(model, rows, dataclasses.replace(c, lora=dataclasses.replace(LORA, dropout=0.5)), mesh)[1][2]["loss"]
        for c in (parts, ADAPTED)
    ]
    assert abs(dropped[0] - dropped[1]) > 1e-6


def test_on_eight_devices_as_on_one(rows, tuned):
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    model = random_model(SIZES, mesh, seed=0)
    params, log = tune(model, rows, ADAPTED, mesh)
    np.testing.assert_allclose([m["loss"] for m in log], [m["loss"] for m in tuned[1]], rtol=1e-3)
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), params, model.params)
    assert jax.tree.all(same)


@pytest.mark.parametrize("config", [dataclasses.replace(SFT, epochs=1), ADAPTED], ids=["whole", "lora"])
def test_stacked_layers_train_as_unrolled_ones(config, rows, mesh):
    """And what comes back is unrolled."""
    model = random_model(SIZES | {"num_hidden_layers": 2}, mesh, seed=0)
    stacked = dataclasses.replace(config, step=dataclasses.replace(config.step, layers="stacked"))
    params, log = tune(model, rows, stacked, mesh)
    wanted, plain = tune(model, rows, config, mesh)
    np.testing.assert_allclose([m["loss"] for m in log], [m["loss"] for m in plain], rtol=1e-4)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for (name, a), (_, b), (_, c) in zip(named(params), named(wanted), named(model.params), strict=True):
        # Adam's first steps have the size of the rate wherever a gradient is not 0: rounding may turn a sign.
        assert float(jnp.abs(a - b).mean()) < 0.1 * max(float(jnp.abs(b - c).mean()), 1e-6), name


def test_bfloat16_weights_stay_bfloat16(model, rows, mesh):
    low = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    params, log = tune(low, rows, ADAPTED, mesh)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert log[-1]["loss"] < log[0]["loss"] - 0.05


def test_the_settings_are_read_from_a_config():
    found = build(type(SFT), {"lora": {"rank": 8, "targets": ["q_proj$"], "dropout": 0.1}}, "sft")
    assert found.lora == Lora(8, 32.0, ("q_proj$",), 0.1)
    for wrong, message in (({"rank": 0}, r"lora\.rank is 0"), ({"ranks": 2}, r"sft\.lora\.ranks.*did you mean rank")):
        with pytest.raises(UserError, match=message):
            build(type(SFT), {"lora": wrong}, "sft")


def test_the_verb_writes_the_adapter_beside_the_merged_model(model, tmp_path, monkeypatch):
    """sft.lora from outside: `hf/` is the base with `adapter/` in it, as the library's merge reads `model+adapter`."""
    import json

    from jaxmerge.files.checkpoints.open import open_source
    from jaxmerge.files.checkpoints.source import read
    from train.cli import __main__ as cli
    from train.models.hf import load_hf

    monkeypatch.chdir(tmp_path)
    save_hf(tmp_path / "base", model.config, model.params, tokenizer_from=model.tokenizer)
    lines = [{"prompt": f"{a}+{b}?", "completion": f"{a + b}#"} for a in range(4) for b in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "c.yaml").write_text(
        "model: {path: base}\ndata: {path: data.jsonl}\n"
        "sft: {epochs: 1, batch: 8, learning_rate: 0.01, max_length: 32}\n"
    )
    assert cli.main(["sft", "c.yaml", "out=run", "sft.lora.rank=2", "sft.lora.alpha=4"]) == 0
    source = open_source("base+run/adapter")
    for name, leaf in named(load_hf(tmp_path / "run" / "hf")[1]):
        np.testing.assert_allclose(read(source.tensors[name]), leaf, atol=1e-6, err_msg=name)
    changed = load_hf(tmp_path / "run" / "hf")[1]["model"]["layers"]["0"]["self_attn"]["o_proj"]["weight"]
    assert (changed != model.params["model"]["layers"]["0"]["self_attn"]["o_proj"]["weight"]).any()
