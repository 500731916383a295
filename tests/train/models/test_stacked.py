"""Stacked layers: there and back bit for bit, the same logits, caches, gradients; what is computed again; shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens.cases import BASE
from helpers.goldens.family_cases import FAMILY_CASES
from helpers.tiny_families import IDS, logits, run_engine, weights
from helpers.tiny_models import config_of, relative

from train.log import UserError
from train.models.attention import KV, visible
from train.models.config import Lora
from train.models.decoder import bind, count_up, forward, shapes
from train.models.hf import load_hf, save_hf
from train.models.lora import init_lora
from train.models.stacked import stack_layers, unstack_layers
from train.runtime.mesh import make_mesh, shardings
from train.runtime.settings import Mesh

# Alike layers; two kinds of window; local and global θ; some layers without rotation; fused, looking at lengths.
MIXED = ["mistral", "gemma2", "gemma3", "smollm3", "phi3_long", "llama_dynamic"]


def model(name):
    config = config_of(FAMILY_CASES[name])
    return config, weights(config)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_stacking_and_back_is_bit_exact(name):
    config, params = model(name)
    stacked = stack_layers(params)
    assert stacked["model"]["layers"].keys() == {"stacked"}
    assert jax.tree.leaves(stacked["model"]["layers"])[0].shape[0] == config.num_hidden_layers
    assert_equal(unstack_layers(stacked), params)
    assert stack_layers(stacked) is stacked
    assert unstack_layers(params) is params
    as_shapes = jax.eval_shape(lambda: stacked)
    assert jax.tree.map(lambda x: x.shape, unstack_layers(as_shapes)) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.parametrize("name", MIXED)
def test_scanned_layers_give_the_same_logits(name):
    config, params = model(name)
    options = {"lengths": (13, 27)}
    wanted = logits(config, params, IDS, **options)
    assert relative(logits(config, stack_layers(params), IDS, **options), wanted) < 1e-4


@pytest.mark.parametrize("name", ["gemma3", "phi3_long"])
def test_a_scan_with_caches_decodes_what_a_whole_pass_does(name):
    """Prefill 9 tokens, decode 25 one by one into caches [L, B, K, S, H]."""
    config, params = model(name)
    stacked = stack_layers(params)
    first, S = 9, 34

    @jax.jit
    def prefill(params, tokens):
        positions = count_up(tokens.shape)
        return bind(config, params)(tokens, positions, visible(positions))[1]

    @jax.jit
    def step(params, caches, token, at):
        mask = (jnp.arange(S) <= at[:, None])[:, None]
        decoder = bind(config, params)
        hidden, caches = decoder(token[:, None], at[:, None], mask, caches, at)
        return decoder.head(hidden[:, 0], jnp.float32), caches

    def decode(params, grow):
        caches = grow(prefill(params, jnp.asarray(IDS[:, :first])))
        for i in range(first, S):
            out, caches = step(params, caches, jnp.asarray(IDS[:, i]), jnp.full(2, i))
        return np.asarray(out)

    def grow(cache: KV) -> KV:
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, S - first), (0, 0)]), cache)

    wanted = decode(params, lambda caches: tuple(map(grow, caches)))
    assert relative(decode(stacked, grow), wanted) < 1e-4
    if config.rope_scaling is None:  # a scaling that grows has left older keys as they were
        assert relative(wanted, logits(config, params, IDS[:, :S])[:, -1]) < 1e-4


def test_the_engine_takes_stacked_layers():
    config, params = model("gemma3")
    prompts = [IDS[0, :5].tolist(), IDS[1, :21].tolist()]
    assert run_engine(config, stack_layers(params), prompts, 6) == run_engine(config, params, prompts, 6)


def test_saving_unstacks(tmp_path):
    config, params = model("qwen2")
    save_hf(tmp_path / "out", config, stack_layers(params))
    assert_equal(load_hf(tmp_path / "out")[1], params)


def test_layers_that_differ_are_refused():
    _, params = model("qwen2")
    part = init_lora(Lora(2, 4.0, ("layers/1/.*q_proj",)), params, jax.random.key(0))
    with pytest.raises(UserError, match="layers 1: only alike ones, from 0 on, can be stacked"):
        stack_layers(part)


# --- what the backward pass computes again ---


def gradient_of(config, params, remat):
    def loss(params):
        positions = count_up(IDS.shape)
        decoder = bind(config, params)
        hidden, _ = decoder(jnp.asarray(IDS), positions, visible(positions), remat=remat)
        return jnp.square(decoder.head(hidden, jnp.float32)).mean()

    return jax.jit(jax.grad(loss)), loss


@pytest.fixture(scope="module")
def plain_gradient():
    """Of layers one by one, with nothing computed again."""
    config, params = model("qwen2")
    return jax.tree.map(np.asarray, gradient_of(config, params, "none")[0](params))


@pytest.mark.parametrize(("layout", "remat"), [("unrolled", "full"), ("stacked", "dots")])
def test_gradients_are_the_same_whatever_is_computed_again(layout, remat, plain_gradient):
    config, params = model("qwen2")
    params = stack_layers(params) if layout == "stacked" else params
    found = jax.tree.map(np.asarray, unstack_layers(gradient_of(config, params, remat)[0](params)))
    worst = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9)), found, plain_gradient)
    assert max(jax.tree.leaves(worst)) < 1e-4


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_less_is_kept_the_more_is_computed_again(layout):
    """Bytes of residuals between forward and backward."""
    config, params = model("gemma3")
    params = stack_layers(params) if layout == "stacked" else params

    def kept(remat):
        loss = gradient_of(config, params, remat)[1]
        _, residuals = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

    none, dots, full = (kept(remat) for remat in ("none", "dots", "full"))
    assert full < 0.8 * dots < 0.8 * none


def test_an_unknown_policy_is_refused():
    config, params = model("phi3")
    with pytest.raises(ValueError, match="remat='most' is not known; known: none, full, dots"):
        gradient_of(config, params, "most")[0](params)


def test_one_block_is_compiled_whatever_the_number_of_layers():
    """The program of scanned layers does not grow with them."""

    def length(count, stacked):
        config = config_of({**BASE, "num_hidden_layers": count})
        tree = jax.eval_shape(stack_layers, shapes(config)) if stacked else shapes(config)
        text = jax.jit(forward, static_argnums=0).lower(config, tree, jnp.asarray(IDS)).as_text()
        return text.count("dot_general")

    assert length(8, True) == length(2, True)
    assert length(8, False) > 3 * length(2, False)


# --- shardings ---


def test_stacked_leaves_are_sharded_as_their_layers():
    config = config_of({**FAMILY_CASES["phi3"], "vocab_size": 64})
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    plain, stacked = (
        jax.tree.map(lambda x: x.spec, shardings(mesh, tree))
        for tree in (shapes(config), jax.eval_shape(stack_layers, shapes(config)))
    )
    for part, leaves in stacked["model"]["layers"]["stacked"].items():
        flat = jax.tree_util.tree_leaves_with_path(leaves, is_leaf=lambda x: not isinstance(x, dict))
        for path, spec in flat:
            one = plain["model"]["layers"]["0"][part]
            for entry in path:
                one = one[entry.key]
            assert tuple(spec) == (None, *one)
    assert stacked["model"]["norm"] == plain["model"]["norm"]


@pytest.mark.parametrize("name", ["gemma3", "phi3_short"])
def test_a_sharded_stacked_model_gives_the_same_logits(name):
    config, params = model(name)
    stacked = stack_layers(params)
    mesh = make_mesh(Mesh(data=1, fsdp=2, tensor=1))
    placed = jax.device_put(stacked, shardings(mesh, stacked))
    assert relative(logits(config, placed), logits(config, params)) < 1e-4
