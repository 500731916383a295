"""LoRA: nothing at the start, side path = merged weights, gradients of A and B alone, dropout, PEFT's folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens.family_cases import FAMILY_CASES
from helpers.tiny_families import IDS, KEY, LORA, logits, model, trained
from helpers.tiny_models import config_of, relative

from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from train.log import UserError
from train.models.config import Lora
from train.models.decoder import forward, shapes
from train.models.hf import named, save_hf
from train.models.lora import Side, attach, check_targets, detach, init_lora, merge_lora, pairs
from train.models.lora_files import load_lora, save_lora
from train.models.stacked import stack_layers, unstack_layers
from train.runtime.mesh import make_mesh, shardings
from train.runtime.settings import Mesh


def test_a_new_adapter_changes_nothing_and_a_trained_one_does():
    config, params = model("gemma3")
    adapter = init_lora(LORA, params, KEY)
    plain = logits(config, params)
    np.testing.assert_array_equal(logits(config, attach(LORA, params, adapter)), plain)
    assert relative(logits(config, attach(LORA, params, trained(adapter))), plain) > 0.05


@pytest.mark.parametrize(("name", "layout"), [("gemma3", "unrolled"), ("phi3", "stacked")])
def test_the_side_path_computes_what_merged_weights_do(name, layout):
    config, params = model(name)
    params = stack_layers(params) if layout == "stacked" else params
    adapter = trained(init_lora(LORA, params, KEY))
    side, merged = attach(LORA, params, adapter), merge_lora(LORA, params, adapter)
    assert relative(logits(config, side), logits(config, merged)) < 1e-4
    path, a, b = next(iter(pairs(adapter)))
    before, after = (dict(named(tree))[".".join((*path, "weight"))] for tree in (params, merged))
    np.testing.assert_allclose(after - before, 6.0 / 4 * np.asarray(b) @ np.asarray(a), atol=1e-5)


def test_stacked_and_unrolled_adapters_are_the_same():
    config, params = model("phi3")
    adapter = trained(init_lora(LORA, params, KEY))
    stacked = attach(LORA, stack_layers(params), stack_layers(adapter))
    assert relative(logits(config, stacked), logits(config, attach(LORA, params, adapter))) < 1e-4
    again = unstack_layers(stack_layers(adapter))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, adapter))


def test_gradients_reach_a_and_b_and_no_other():
    config, params = model("qwen2")
    adapter = trained(init_lora(LORA, params, KEY))

    @jax.jit
    @jax.grad
    def gradient(adapter):
        return jnp.square(forward(config, attach(LORA, params, adapter), jnp.asarray(IDS))).mean()

    found = gradient(adapter)
    assert [n for n, g in named(found) if not float(jnp.abs(g).max()) > 1e-6] == []
    # By the merged weights: the same gradient, the long way.
    merged = jax.jit(
        jax.grad(lambda a: jnp.square(forward(config, merge_lora(LORA, params, a), jnp.asarray(IDS))).mean())
    )
    for (name, a), (_, b) in zip(named(found), named(merged(adapter)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()), err_msg=name)


@pytest.mark.parametrize(("layout", "dtype"), [("unrolled", "float32"), ("stacked", "bfloat16")])
def test_no_gradient_of_a_frozen_matrix_is_computed(layout, dtype):
    """Operations of forward and backward: two thirds of what all weights take, and the small factors."""
    config = config_of({**FAMILY_CASES["mistral"], "hidden_size": 128, "intermediate_size": 512})
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes(config))
    params = stack_layers(params) if layout == "stacked" else params
    adapter = init_lora(Lora(rank=2), params, KEY)

    def loss(params):
        return forward(config, params, jnp.asarray(IDS), dtype=jnp.dtype(dtype)).sum()

    def operations(f, *arguments):
        return jax.jit(jax.grad(f)).lower(*arguments).cost_analysis()["flops"]  # nothing is compiled for it

    whole = operations(loss, params)
    side = operations(lambda a, p: loss(attach(LORA, p, a)), adapter, params)
    assert side < 0.8 * whole
    if layout == "unrolled":
        assert side < 0.8 * operations(lambda a, p: loss(merge_lora(LORA, p, a)), adapter, params)


def test_the_scale_is_alpha_over_rank():
    config, params = model("phi3")
    adapter = trained(init_lora(LORA, params, KEY))
    doubled = jax.tree_util.tree_map_with_path(lambda p, x: 2 * x if p[-2].key == "lora_B" else x, adapter)
    twice = logits(config, attach(Lora(rank=4, alpha=12.0), params, adapter))
    np.testing.assert_allclose(twice, logits(config, attach(LORA, params, doubled)), rtol=1e-5, atol=1e-5)


def test_an_adapter_depends_on_key_and_path_alone():
    _, params = model("qwen3")
    whole, part = (init_lora(Lora(4, 6.0, targets), params, KEY) for targets in ((r"_proj$",), (r"layers/1/.*q_proj",)))
    assert [path for path, _, _ in pairs(part)] == [("model", "layers", "1", "self_attn", "q_proj")]
    for name, leaf in named(part):
        np.testing.assert_array_equal(leaf, dict(named(whole))[name])
    a = np.asarray(dict(named(whole))["model.layers.0.mlp.up_proj.lora_A.weight"])
    assert 0.9 * 32**-0.5 < np.abs(a).max() < 32**-0.5


# --- dropout ---


def test_dropout_is_of_the_side_alone_drawn_by_the_key():
    config, params = model("phi3")
    lora = Lora(rank=4, alpha=6.0, dropout=0.5)
    fresh = init_lora(lora, params, KEY)
    np.testing.assert_array_equal(logits(config, attach(lora, params, fresh, key=KEY)), logits(config, params))
    adapter = trained(fresh)
    one, again, other, none = (
        logits(config, attach(lora, params, adapter, key=key)) for key in (KEY, KEY, jax.random.key(5), None)
    )
    np.testing.assert_array_equal(one, again)
    assert relative(one, other) > 0.01
    assert relative(one, none) > 0.01
    without = attach(Lora(rank=4, alpha=6.0), params, adapter, key=KEY)
    np.testing.assert_array_equal(logits(config, without), none)


def test_dropout_keeps_the_mean_and_differs_by_layer():
    """One projection of ones: the side's output over its undropped one is kept/(1 − p), mean 1."""
    lora = Lora(rank=1, alpha=1.0, dropout=0.25)
    a, b = jnp.ones((2, 1, 4000)), jnp.ones((2, 1, 1))
    tree = {"model": {"layers": {"stacked": {"q_proj": {"weight": jnp.zeros((2, 1, 4000))}}}}}
    adapter = {"model": {"layers": {"stacked": {"q_proj": {"lora_A": {"weight": a}, "lora_B": {"weight": b}}}}}}
    (leaves,) = detach(attach(lora, tree, adapter, key=KEY))[1].values()
    found = [
        float(Side(jax.tree.map(lambda x, i=i: x[i], leaves))(jnp.ones((1, 4000)), jnp.float32)[0, 0]) / 4000
        for i in (0, 1)
    ]
    assert found[0] != found[1]
    assert all(abs(x - 1) < 0.04 for x in found)
    assert all(abs(x * 0.75 * 4000 - round(x * 0.75 * 4000)) < 0.01 for x in found)


# --- refused ---

OTHER = {"model": {"other": {"lora_A": {"weight": jnp.ones((4, 3))}, "lora_B": {"weight": jnp.ones((3, 4))}}}}
IMPOSSIBLE = (({"rank": 0}, "lora.rank is 0"), ({"dropout": 1.0}, "lora.dropout is 1.0"), ({"targets": ()}, "empty"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: init_lora(Lora(targets=("query",)), p, KEY), r"\['query'\] name no matrix .* 'q_proj'"),
        (lambda p: init_lora(Lora(targets=("embed_tokens",)), p, KEY), "model/embed_tokens; adapters of embeddings"),
        (lambda p: init_lora(Lora(targets=("(?<!k)_proj",)), p, KEY), r"^lora\.targets: pattern .* without lookaround"),
        (lambda p: check_targets(Lora(targets=("_proj", "(q")), p), r"^lora\.targets: pattern '\(q' is no regular"),
        # Python's own matcher would be at it for years.
        (lambda p: check_targets(Lora(targets=(r"^((\w+/?)+)+!",)), p), "names no matrix of the model"),
        (
            lambda p: attach(LORA, p, {"model": {"other": {"lora_A": {"weight": 0}, "lora_B": {"weight": 0}}}}),
            "model/oth",
        ),
    ],
)
def test_wrong_targets_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make(model("qwen3")[1])


def test_impossible_settings_are_refused():
    for settings, message in (
        ({"rank": 0}, "lora.rank is 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "empty"),
    ):
        with pytest.raises(UserError, match=message):
            Lora(**settings)


# --- files ---


def test_a_merge_reads_the_adapter_beside_its_model(tmp_path):
    """`model+adapter` of the library equals our merged weights."""
    config, params = model("gemma3")
    adapter = trained(init_lora(LORA, params, KEY))
    save_hf(tmp_path / "base", config, params)
    save_lora(tmp_path / "adapter", LORA, adapter, params, base="base")
    source = open_source(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    for name, leaf in named(merge_lora(LORA, params, adapter)):
        np.testing.assert_allclose(read(source.tensors[name]), leaf, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_adapters_round_trip_bit_for_bit(layout, tmp_path):
    _, params = model("phi3")
    adapter = trained(init_lora(LORA, params, KEY))
    save_lora(tmp_path / "a", LORA, stack_layers(adapter) if layout == "stacked" else adapter, params)
    lora, again = load_lora(tmp_path / "a")
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 6.0, 0.0)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, adapter))
    fresh = init_lora(lora, params, KEY)
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter)  # its targets are the modules it had


def test_targets_are_named_shortly_where_they_can_be(tmp_path):
    _, params = model("qwen3")
    for targets, wanted in (
        ((r"(q|v)_proj$",), ["q_proj", "v_proj"]),
        ((r"layers/1/.*q_proj",), ["model.layers.1.self_attn.q_proj"]),
    ):
        lora = Lora(2, 4.0, targets)
        folder = tmp_path / str(len(wanted))
        save_lora(folder, lora, init_lora(lora, params, KEY), params)
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == wanted


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    _, params = model("qwen3")
    save_lora(tmp_path / "a", LORA, init_lora(LORA, params, KEY), params)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(UserError, match="use_dora = True is not known here"):
        load_lora(tmp_path / "a")


def test_adapters_have_a_place_on_the_mesh():
    config, _ = model("phi3")
    mesh = make_mesh(Mesh(data=1, fsdp=2, tensor=2))
    adapter = init_lora(LORA, shapes(config), KEY)
    for tree in (adapter, stack_layers(adapter)):
        placed = jax.device_put(tree, shardings(mesh, tree))
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), placed, tree))
