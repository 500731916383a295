"""The optimizers: AdamW against float64, the same laws for every one, and what `sft.optimizer` refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.sft_cases import SIZES, assert_bits, tune, without_seconds
from jax.sharding import PartitionSpec as P

from train.learn import optim
from train.learn.batches import Rows
from train.learn.checkpoints import SftCheckpoints
from train.learn.optimizers import Adafactor, AdamW, Lion, Muon, ScheduleFree, Sgd
from train.learn.settings import Sft, Stay, Step
from train.learn.step import compute_of, init_state, make_step, state_shardings
from train.log import UserError
from train.models.decoder import shapes
from train.models.open import random_model
from train.models.stacked import stack_layers, unstack_layers
from train.resolve import build, to_dict
from train.runtime.mesh import batch_sharding, make_mesh
from train.runtime.settings import Mesh

ALL = [
    AdamW(), Lion(), Adafactor(min_dim_size_to_factor=8, momentum=0.9), Sgd(momentum=0.9), Muon(), ScheduleFree()
]  # fmt: skip
every = pytest.mark.parametrize("optimizer", ALL, ids=lambda o: o.name)
TINY = SIZES | {"initializer_range": 0.3}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh())


@pytest.fixture(scope="module")
def model(mesh):
    return random_model(TINY, mesh, seed=0)


@pytest.fixture(scope="module")
def there():
    """The model on a mesh of eight devices."""
    return random_model(TINY, make_mesh(Mesh(data=2, fsdp=2, tensor=2)), seed=0)


@pytest.fixture(scope="module")
def layers(mesh):
    """Two layers, for what is of stacked ones."""
    return random_model(TINY | {"num_hidden_layers": 2}, mesh, seed=0).params


@pytest.fixture(scope="module")
def rows():
    r = np.random.default_rng(0)
    weights = (np.arange(17) < r.integers(4, 17, (16, 1))).astype(np.float32)
    return Rows(r.integers(2, 64, (16, 17)).astype(np.int32), weights)


def config_of(optimizer, **changes):
    return Sft(learning_rate=3e-3, epochs=2, batch=8, optimizer=optimizer, **changes)


def gradients(params, seed=0):
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(r.normal(size=p.shape), jnp.float32), params)


@functools.cache
def update_of(config):
    return jax.jit(functools.partial(optim.update, config))


def updated(config, params, state, grads, good=True, rate=0.01):
    return update_of(config)(params, state, grads, rate=np.float32(rate), good=np.bool_(good))


def test_updates_are_adamw_in_float64(model):
    """Five updates with clipping and decay, of what AdamW's paper says, written out in NumPy."""
    config = config_of(AdamW(b1=0.8, b2=0.95, eps=1e-6), step=Step(clip=2.0, weight_decay=0.1))
    params, state = model.params, optim.start(config, model.params)
    by_hand = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    m, v = ([np.zeros_like(x) for x in by_hand] for _ in range(2))
    mask = jax.tree.leaves(optim.decay_mask(params, ()))
    assert 0 < sum(mask) < len(mask)
    for n in range(1, 6):
        grads = gradients(params, n)
        before = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
        params, state = updated(config, params, state, grads)
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        assert norm > 2
        for i, found in enumerate(jax.tree.leaves(params)):
            clipped = g[i] * 2.0 / norm
            m[i], v[i] = 0.8 * m[i] + 0.2 * clipped, 0.95 * v[i] + 0.05 * clipped**2
            moved = m[i] / (1 - 0.8**n) / (np.sqrt(v[i] / (1 - 0.95**n)) + 1e-6) + 0.1 * mask[i] * by_hand[i]
            by_hand[i] = by_hand[i] - 0.01 * moved
            if n == 1:
                size = np.abs(before[i]) + np.abs(0.01 * moved)
                assert (np.abs(found - by_hand[i]) <= 1e-6 * size).all()
            np.testing.assert_allclose(found, by_hand[i], rtol=1e-5, atol=1e-6)


@every
def test_one_executable_serves_every_rate_and_the_state_is_donated(model, rows, mesh, optimizer, caplog):
    config = config_of(optimizer, step=Step(clip=0.75))  # of no other test: it is compiled here
    step = make_step(model.config, config, "float32")
    batch = {"tokens": jnp.asarray(rows.tokens[:8]), "weights": jnp.asarray(rows.weights[:8])}
    state = init_state(config, model.params, mesh)
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles(True):
        for rate in (1e-3, 3e-4, 0.0):
            old = state
            state, _ = step(state, batch, jnp.float32(rate))
            assert all(x.is_deleted() for x in jax.tree.leaves(old.optimizer) if x.ndim)
    assert len([r for r in caplog.records if "Compiling jit(step)" in r.getMessage()]) == 1
    assert make_step(model.config, dataclasses.replace(config, learning_rate=1.0), "float32") is step


@every
def test_a_run_learns_and_a_killed_one_ends_with_the_same_bits(model, rows, mesh, tmp_path, optimizer):
    config = config_of(optimizer, checkpoint_every=2, schedule="constant")
    tuned, log = tune(model, rows, config, mesh)
    assert log[-1]["loss"] < log[0]["loss"]

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path), on_step=stop)
    again, log_again = tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path))
    assert_bits(again, tuned)
    assert without_seconds(log_again) == without_seconds(log)


@every
def test_an_update_that_may_not_be_made_leaves_every_bit(model, optimizer):
    config = config_of(optimizer, step=Step(weight_decay=0.1))
    params, state = updated(config, model.params, optim.start(config, model.params), gradients(model.params))
    nothing = jax.tree.map(lambda g: g * jnp.nan, gradients(model.params))
    assert_bits(updated(config, params, state, nothing, good=False), (params, state))


@every
def test_decay_takes_rate_times_decay_whatever_the_optimizer(model, optimizer):
    """Where there is no gradient: of what decays, and nothing of the rest."""
    config = config_of(optimizer, step=Step(weight_decay=0.5))
    nothing = jax.tree.map(jnp.zeros_like, model.params)
    params, _ = updated(config, model.params, optim.start(config, model.params), nothing, rate=0.1)
    mask = optim.decay_mask(model.params, ())
    for p, found, decays in zip(*map(jax.tree.leaves, (model.params, params, mask)), strict=True):
        np.testing.assert_allclose(found, p * (0.95 if decays else 1.0), rtol=2e-6)


@every
def test_on_a_mesh_the_same_and_the_state_where_its_parameters_lie(model, there, rows, optimizer):
    """From shapes alone too: what is like a parameter lies where it lies, before a step and after it."""
    sharded, config = there.params["lm_head"]["weight"].sharding.mesh, config_of(optimizer)
    one, one_log = tune(model, rows, config, make_mesh(Mesh()))
    where = state_shardings(config, shapes(model.config), sharded)
    step = make_step(there.config, config, compute_of(config, there.config, there.params, sharded, "float32"))
    batch = jax.device_put({"tokens": rows.tokens[:8], "weights": rows.weights[:8]}, batch_sharding(sharded, 8))
    numbers = map(np.float32, (1e-3, 0.0, np.inf))  # as `fine_tune` gives them: its program below is this one
    arguments = (batch, *numbers, None, None)
    state = init_state(config, there.params, sharded)
    for _ in range(2):
        assert jax.tree.structure(state) == jax.tree.structure(where)
        for leaf, place in zip(*map(jax.tree.leaves, (state, where)), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        state, _ = step(state, *arguments)
    if optimizer.name != "adafactor":
        spread = [x for x in jax.tree.leaves(state.optimizer) if x.sharding.spec == P("tensor", "fsdp")]
        assert spread
    many, log = tune(there, rows, config, sharded)
    np.testing.assert_allclose([m["loss"] for m in log], [m["loss"] for m in one_log], atol=1e-3)
    for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True):
        assert float(np.abs(np.asarray(a) - np.asarray(b)).mean()) < 1e-4


def test_muon_orthogonalises_the_layers_matrices_and_stacking_changes_nothing(layers):
    """Five Newton-Schulz steps bring singular values near 1; embeddings, head and norms are Adam's."""
    config = config_of(Muon())
    moved = []
    for params in (layers, stack_layers(layers)):
        after, state = updated(config, params, optim.start(config, params), gradients(params), rate=1.0)
        moved.append(unstack_layers(jax.tree.map(lambda a, b: np.asarray(a - b), after, params)))
        del state
    unrolled, _ = moved
    layer = unrolled["model"]["layers"]["1"]
    for name in ("gate_proj", "down_proj"):
        update = layer["mlp"][name]["weight"]
        out, into = update.shape
        singular = np.linalg.svd(update, compute_uv=False) / np.sqrt(max(1, out / into))
        assert ((singular > 0.5) & (singular < 1.3)).all()
    for adams in (unrolled["model"]["embed_tokens"]["weight"], layer["input_layernorm"]["weight"]):
        # The first update of Adam with Nesterov's momentum, which optax's muon uses: the sign, times 1 + b1/(1 + b1).
        np.testing.assert_allclose(np.abs(adams), 1 + 0.9 / 1.9, atol=0.02)


def test_muon_is_the_same_of_stacked_layers(layers):
    config = config_of(Muon())
    grads = gradients(layers)
    plain, _ = updated(config, layers, optim.start(config, layers), grads)
    params = stack_layers(layers)
    stacked, _ = updated(config, params, optim.start(config, params), stack_layers(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), unstack_layers(stacked), plain)


def test_schedule_free_returns_its_average_and_not_where_gradients_are_taken(model, rows, mesh):
    config = config_of(ScheduleFree(b1=0.7))
    params, state = updated(config, model.params, optim.start(config, model.params), gradients(model.params))
    params, state = updated(config, params, state, gradients(params, 1))
    (free,) = [s for s in jax.tree.leaves(state, is_leaf=is_free) if is_free(s)]
    found = optim.weights_to_keep(state, params)
    by_hand = jax.tree.map(lambda y, z: (np.float64(y) - 0.3 * np.float64(z)) / 0.7, params, free.z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, by_hand)
    kept = []
    tuned, _ = tune(model, rows, config, mesh, on_step=lambda m: kept.append(m))
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (tuned, model.params)), strict=True))


def is_free(node):
    return isinstance(node, optax.contrib.ScheduleFreeState)


def test_what_is_frozen_has_no_moments(model, rows, mesh):
    config = config_of(AdamW(), stay=Stay(freeze=("layers/0",)), step=Step(weight_decay=0.1))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    free = init_state(dataclasses.replace(config, stay=Stay()), model.params, mesh).optimizer
    held = init_state(config, model.params, mesh).optimizer
    assert count(free) - count(held) == 2 * count(model.params["model"]["layers"]["0"])
    tuned, _ = tune(model, rows, config, mesh)
    assert_bits(tuned["model"]["layers"]["0"], model.params["model"]["layers"]["0"])


# --- settings ---


@every
def test_settings_are_read_back_as_they_were_written(optimizer):
    config = config_of(optimizer)
    assert build(Sft, to_dict(config), "sft") == config
    assert build(Sft, {"optimizer": {"name": optimizer.name}}, "sft").optimizer == type(optimizer)()
    assert set(optim.OPTIMIZERS) == {o.name for o in ALL}


@every
def test_every_argument_is_read(model, optimizer):
    """With another value of any argument two updates end elsewhere; of Muon's, one that its own rule reads."""
    base = dataclasses.replace(optimizer, **({"nesterov": True} if optimizer.name == "sgd" else {}))
    other = {
        "b1": 0.5, "b2": 0.5, "eps": 0.1, "eps_root": 0.1, "nesterov": False, "momentum": 0.5, "decay_rate": 0.3,
        "min_dim_size_to_factor": 128, "decay_offset": 5, "multiply_by_parameter_scale": False, "factored": False,
        "clipping_threshold": None, "ns_steps": 3, "beta": 0.5, "adaptive": True, "preconditioning": "aol",
        "adam_b1": 0.5, "adam_b2": 0.5, "adam_eps_root": 0.1, "consistent_rms": 0.2, "weight_lr_power": 0.5,
    }  # fmt: skip

    whole = model.params["model"]
    one = {"up_proj": whole["layers"]["0"]["mlp"]["up_proj"]}
    small = {"model": {"norm": whole["norm"], "layers": {"0": {"mlp": one}}}}

    def end(optimizer):
        config = config_of(optimizer)
        params, state = small, optim.start(config, small)
        with jax.disable_jit():  # forty variants have their operations in common, and as programs nothing
            for seed, rate in enumerate((0.01, 0.03)):
                given = {"rate": jnp.float32(rate), "good": jnp.bool_(True)}
                params, state = optim.update(config, params, state, gradients(params, seed), **given)
        return jax.tree.leaves(jax.tree.map(np.asarray, optim.weights_to_keep(state, params)))

    plain = end(base)
    for field in dataclasses.fields(base):
        if field.name == "name":
            continue
        value = other[field.name] if other[field.name] != getattr(base, field.name) else True
        found = end(dataclasses.replace(base, **{field.name: value}))
        assert any((a != b).any() for a, b in zip(plain, found, strict=True)), field.name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "adamv"}, r"sft\.optimizer\.name is 'adamv'; no such name; did you mean adamw\?"),
        ({"name": "lion", "beta1": 0.9}, r"sft\.optimizer\.beta1: no such key; did you mean b1\?"),
        ({"name": "sgd", "b1": 0.9}, r"sft\.optimizer\.b1: no such key; known: name, momentum, nesterov"),
        ({"b1": 1.0}, r"sft\.optimizer\.b1 is 1\.0; it must lie in \[0, 1\)"),
        ({"eps": "small"}, r"sft\.optimizer\.eps is 'small'; float is wanted"),
        ({"name": "schedule_free", "b1": 0}, r"sft\.optimizer\.b1 is 0; schedule_free divides by it"),
        ("lionn", r"sft\.optimizer\.name is 'lionn'; no such name; did you mean lion\?"),
        (3, r"sft\.optimizer is 3; a map of keys is wanted"),
    ],
)
def test_what_is_not_known_is_refused_with_the_nearest(given, said):
    with pytest.raises(UserError, match=said):
        build(Sft, {"optimizer": given}, "sft")


@pytest.mark.parametrize("step", [{"ema": 0.9}, {"masters": "bfloat16"}])
def test_schedule_free_keeps_the_only_average_in_float32(step):
    with pytest.raises(UserError, match=r"schedule_free keeps an average of its own"):
        build(Sft, {"optimizer": {"name": "schedule_free"}, "step": step}, "sft")
