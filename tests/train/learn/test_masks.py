"""Masks of parameters: what each trains, that all else keeps its bits, and what moments of single entries take."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import LEARNER, SFT, InMemory, Killed, assert_bits, kill_after, tune, with_step

from jaxmerge.tree import named_leaves
from train.learn import masks, optim
from train.learn.checkpoints import SftCheckpoints
from train.learn.importance import settled
from train.learn.masks import MASKS, Everything, Given, Half, Heads, Layers, Lift
from train.learn.optimizers import AdamW, Lion, Sgd
from train.learn.settings import Sft
from train.learn.sparse import Chosen, Principal, Slices, gathered, principal, renewed, scattered
from train.log import UserError
from train.models.config import ModelConfig
from train.models.decoder import shapes
from train.models.loss import loss_sums
from train.models.open import random_model
from train.resolve import build

FUSED = {"fused_projections": True, "fused_mlp": True}


@pytest.fixture(scope="module")
def model(mesh):
    """Two layers of four heads in two groups."""
    return random_model(LEARNER | {"num_key_value_heads": 2}, mesh, seed=0)


def of(mask, **keys):
    return dataclasses.replace(SFT, mask=mask, **keys)


def given_of(config: ModelConfig, importance=None, seed=0) -> Given:
    sizes = {path: leaf.shape for path, leaf in named_leaves(shapes(config)).items()}
    return Given(config, sizes, seed, importance or (lambda batches: pytest.fail("importance is not needed")))


def moved(model, tuned) -> dict[str, np.ndarray]:
    """Which entries changed, by path."""
    return {
        path: np.asarray(after) != np.asarray(before)
        for (path, before), after in zip(named_leaves(model.params).items(), jax.tree.leaves(tuned), strict=True)
    }


def last_state(model, rows, mesh, config):
    memory = InMemory()
    tuned, _ = tune(model, rows, dataclasses.replace(config, checkpoint_every=7), mesh, checkpoints=memory)
    return tuned, memory.kept[0]


def test_every_name_is_a_mask():
    assert tuple(MASKS.values()) == typing.get_args(masks.Masking)
    for name, kind in MASKS.items():
        more = {"count": 2} if name == "heads" else {}
        assert type(build(Sft, {"mask": {"name": name, **more}}, "sft").mask) is kind
    assert Sft().mask == Everything()


# --- half of the parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 5])
def test_half_keeps_two_of_four_one_or_two_of_three_and_half_the_norms(model, layers):
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    given = given_of(config)
    kept, generous = set(Half().frozen(given)), 0
    for layer in range(layers):
        at = f"model/layers/{layer}/"
        counts = {
            part: sum(path.startswith(at) and masks.part_of(path) == part for path in kept)
            for part in ("self_attn", "mlp", "norm")
        }
        assert counts["self_attn"] == 2
        assert counts["norm"] == 1
        assert counts["mlp"] in (1, 2)
        generous += counts["mlp"] == 1
    assert generous == layers // 2
    assert all("/layers/" in path for path in kept)
    assert Half().frozen(given) == Half().frozen(given)
    assert Half().frozen(given_of(config, seed=1)) != Half().frozen(given), "every round has a half of its own"


def test_half_of_fused_projections(model):
    config = dataclasses.replace(model.config, **FUSED)
    kept = Half().frozen(given_of(config))
    assert sum("/self_attn/" in path for path in kept) == sum("/mlp/" in path for path in kept) == 2


def test_what_half_freezes_keeps_its_bits_and_has_no_moments(model, rows, mesh):
    tuned, state = last_state(model, rows, mesh, of(Half()))
    kept = set(Half().frozen(given_of(model.config, seed=7)))
    for path, changed in moved(model, tuned).items():
        assert changed.any() == (path not in kept), path
    size = sum(np.prod(x.shape) for path, x in named_leaves(model.params).items() if path not in kept)
    assert floats(state.optimizer) == 2 * size


def floats(optimizer) -> int:
    """Numbers of the moments, float32."""
    return sum(x.size for x in jax.tree.leaves(optimizer) if x.dtype == np.float32 and x.ndim)


# --- the largest entries of an approximation ---------------------------------------------------------------


def test_the_principal_entries_are_those_of_the_truncated_svd():
    weight = np.random.default_rng(0).normal(size=(12, 7))
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    kept = np.abs((u[:, :3] * s[:3]) @ v[:3]).reshape(-1)
    wanted = np.sort(np.argsort(-kept)[: (12 + 7) * 2])
    np.testing.assert_array_equal(principal(jnp.asarray(weight, jnp.float32), 3, 2), wanted)
    np.testing.assert_array_equal(principal(jnp.asarray(weight, jnp.float32), 99, 99), np.arange(84))


def test_gathering_and_scattering_touch_the_chosen_entries_alone():
    tree = {"a": {"w": jnp.array([[0.0, -0.0], [2.0, 3.0]])}, "b": jnp.ones(2)}
    places = {"a/w": jnp.array([0, 3], jnp.int32)}
    part = gathered(tree, places)
    np.testing.assert_array_equal(part["a"]["w"], [0, 3])
    back = scattered(tree, {"a": {"w": jnp.array([5.0, 6.0])}, "b": jnp.zeros(2)}, places)
    np.testing.assert_array_equal(back["a"]["w"], [[5, 0], [2, 6]])
    assert np.signbit(back["a"]["w"][0, 1]), "an entry that is not chosen keeps its sign of zero"
    np.testing.assert_array_equal(back["b"], 0)


def test_lift_trains_its_entries_alone_and_keeps_moments_of_no_others(model, rows, mesh):
    mask = Lift(rank=4, budget=3, every=0)
    tuned, state = last_state(model, rows, mesh, with_step(of(mask), weight_decay=0.1))
    matrices = {path: x for path, x in named_leaves(model.params).items() if "/layers/" in path and x.ndim == 2}
    for path, changed in moved(model, tuned).items():
        if path not in matrices:
            assert not changed.any(), path
            continue
        wanted = np.zeros(changed.size, bool)
        wanted[np.asarray(principal(matrices[path], 4, 3))] = True
        np.testing.assert_array_equal(changed.reshape(-1), wanted, err_msg=path)
    entries = sum(3 * sum(x.shape) for x in matrices.values())
    assert floats(state.optimizer) == 2 * entries, "two moments of an entry, and none of another"
    taken = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
    assert taken <= entries * (4 + 4 + 4) + 64, "and its place, four bytes"
    assert taken < 0.5 * 8 * sum(x.size for x in matrices.values())


def test_entries_that_stay_keep_their_moments_when_they_are_chosen_anew():
    numbers = np.random.default_rng(1)
    before, after = ({"layers": {"0": {"w": jnp.asarray(numbers.normal(size=(9, 8)), jnp.float32)}}} for _ in range(2))
    entries = Principal(("layers/0/w",), 2, 2)
    places = entries.places(named_leaves(before))
    moments = {"mu": {"layers": {"0": {"w": jnp.arange(1, 35, dtype=jnp.float32)}}}, "count": jnp.int32(5)}
    found = jax.jit(lambda p, s: renewed(entries, p, s))(after, Chosen(places, moments))
    old, new = (np.asarray(p["layers/0/w"]) for p in (places, found.places))
    np.testing.assert_array_equal(new, principal(after["layers"]["0"]["w"], 2, 2))
    by_place = dict(zip(old.tolist(), np.arange(1, 35), strict=True))
    stay = set(old.tolist()) & set(new.tolist())
    assert 0 < len(stay) < len(old)
    wanted = [by_place.get(place, 0) for place in new.tolist()]
    np.testing.assert_array_equal(found.inner["mu"]["layers"]["0"]["w"], wanted)
    assert found.inner["count"] == 5


@pytest.mark.parametrize("optimizer", [AdamW(), Lion(), Sgd(momentum=0.9)], ids=lambda optimizer: optimizer.name)
def test_with_every_entry_chosen_updates_are_those_of_whole_parameters(optimizer):
    """Clipping is out of the way: the norm is summed in another order."""
    numbers = np.random.default_rng(2)
    params, *grads = ({"layers": {"0": {"w": jnp.asarray(numbers.normal(size=(5, 4)), jnp.float32)}}} for _ in range(4))
    config = with_step(dataclasses.replace(SFT, optimizer=optimizer), clip=1e9, weight_decay=0.1)
    entries = Principal(("layers/0/w",), 4, 9)
    states, tuned = [optim.start(config, params, None, each) for each in (None, entries)], [params, params]
    for gradient in grads:
        for i, state in enumerate(states):
            tuned[i], states[i] = optim.update(
                config, tuned[i], state, optim.seen(state, gradient), rate=jnp.float32(0.1), good=jnp.bool_(True)
            )
        states[1] = renewed(entries, tuned[1], states[1])
    assert_bits(tuned[1], tuned[0])
    assert np.abs(np.asarray(tuned[0]["layers"]["0"]["w"] - params["layers"]["0"]["w"])).min() > 0


def test_a_killed_run_of_lift_ends_with_the_same_bits(model, rows, mesh, tmp_path):
    config = of(Lift(rank=4, budget=3, every=2), checkpoint_every=3)
    whole, _ = tune(model, rows, config, mesh)
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path), on_step=kill_after(4))
    tuned, _ = tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path))
    assert_bits(tuned, whole)
    still, _ = tune(model, rows, of(Lift(rank=4, budget=3, every=0)), mesh)
    assert sum(c.sum() for c in moved(model, whole).values()) > sum(c.sum() for c in moved(model, still).values())


# --- heads and layers --------------------------------------------------------------------------------------


def test_given_heads_are_their_rows_and_columns_and_those_of_their_group(model, rows, mesh):
    tuned, state = last_state(model, rows, mesh, of(Heads(heads=((1, 2), (0, 0)))))
    found = moved(model, tuned)
    for layer, head in ((1, 2), (0, 0)):
        at, rows_of = f"model/layers/{layer}/self_attn/", slice(16 * head, 16 * head + 16)
        group = slice(16 * (head // 2), 16 * (head // 2) + 16)
        for name, cut in (("q", np.s_[rows_of]), ("o", np.s_[:, rows_of]), ("k", np.s_[group]), ("v", np.s_[group])):
            changed = found.pop(f"{at}{name}_proj/weight")
            wanted = np.zeros(changed.shape, bool)
            wanted[cut] = True
            np.testing.assert_array_equal(changed, wanted, err_msg=f"{layer} {head} {name}")
    assert not any(changed.any() for changed in found.values())
    assert floats(state.optimizer) == 2 * 2 * 4 * 16 * 64


def test_heads_of_fused_projections_are_the_rows_that_the_model_splits(model):
    config = dataclasses.replace(model.config, **FUSED)
    (_, _, o), (path, axis, at) = sorted(Heads(heads=((1, 3),)).slices(given_of(config)))
    assert (path, axis) == ("model/layers/1/self_attn/qkv_proj/weight", 0)
    assert o == tuple(range(48, 64))
    assert at == (*range(48, 64), *range(64 + 16, 64 + 32), *range(96 + 16, 96 + 32))


def importance_of(model, rows):
    """|w·∂L/∂w| of all examples, by autodiff of the mean loss."""
    batch = {"tokens": jnp.asarray(rows.tokens), "weights": jnp.asarray(rows.weights)}

    @jax.jit
    @jax.grad
    def gradient(params):
        loss, weight = loss_sums(model.config, params, batch)
        return loss / weight

    found = gradient(model.params)
    return {
        path: np.abs(np.float64(w) * np.float64(g))
        for (path, w), g in zip(named_leaves(model.params).items(), jax.tree.leaves(found), strict=True)
    }


def test_the_most_important_heads_and_mlps_are_found(model, rows, mesh):
    scores = importance_of(model, rows)
    by_head = {
        (layer, head): scores[f"model/layers/{layer}/self_attn/q_proj/weight"][16 * head : 16 * head + 16].sum()
        + scores[f"model/layers/{layer}/self_attn/o_proj/weight"][:, 16 * head : 16 * head + 16].sum()
        for layer in range(2)
        for head in range(4)
    }
    mlps = [sum(v.sum() for p, v in scores.items() if f"layers/{i}/mlp" in p) for i in range(2)]
    config, entries = of_run(model, rows, mesh, Heads(count=3, mlps=1))
    wanted = sorted(by_head, key=lambda h: -by_head[h])[:3]
    given = Heads(heads=tuple(wanted)).entries(given_of(model.config))
    assert isinstance(entries, Slices)
    assert isinstance(given, Slices)
    assert sorted(entries.slices) == sorted(given.slices)
    named = {path for path, *_ in entries.slices} | set(config.stay.freeze)
    rest = set(named_leaves(model.params)) - named
    assert rest == {path for path in named_leaves(model.params) if f"layers/{mlps.index(max(mlps))}/mlp/" in path}


def of_run(model, rows, mesh, mask):
    return settled(of(mask), model.config, model.params, rows, mesh=mesh, seed=7, dtype="float32")


@pytest.mark.parametrize("train", ["most", "least"])
def test_layers_are_trained_by_their_importance(model, rows, mesh, train):
    scores = importance_of(model, rows)
    sums = [sum(v.sum() for p, v in scores.items() if f"layers/{i}/" in p) for i in range(2)]
    config, entries = of_run(model, rows, mesh, Layers(train=train))
    chosen = sums.index(max(sums) if train == "most" else min(sums))
    assert entries is None
    assert set(config.stay.freeze) == {path for path in named_leaves(model.params) if f"layers/{1 - chosen}/" in path}


def test_a_layer_that_is_not_trained_keeps_its_bits(model, rows, mesh):
    tuned, state = last_state(model, rows, mesh, of(Layers()))
    found = moved(model, tuned)
    kept = {path for path, changed in found.items() if not changed.any()}
    assert kept in [{path for path in found if f"layers/{i}/" in path} for i in range(2)]
    assert floats(state.optimizer) == 2 * sum(changed.size for path, changed in found.items() if path not in kept)


def test_all_layers_trained_is_fine_tuning(model, rows, mesh):
    config, entries = of_run(model, rows, mesh, Layers(count=2))
    assert (config.stay, entries) == (SFT.stay, None)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mask": {"name": "lift", "rank": 0}}, r"sft\.mask\.rank is 0; it must be at least 1"),
        ({"mask": {"name": "heads"}}, r"sft\.mask: give one of heads, a list of \[layer, head\], and count"),
        ({"mask": {"name": "heads", "heads": [[1]]}}, r"sft\.mask\.heads: \[1\] is no head"),
        ({"mask": {"name": "lift"}, "optimizer": {"name": "muon"}}, "lift trains single entries, and muon does not"),
        ({"mask": {"name": "half"}, "lora": {"rank": 2}}, "leave sft.lora"),
        ({"mask": {"name": "half"}, "step": {"layers": "stacked"}}, "sft.step.layers at unrolled"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        build(Sft, keys, "sft")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Heads(heads=((2, 0),)),
            r"sft\.mask\.heads: \[2, 0\] is not there; the model has layers 0 to 1 of heads 0 to 3",
        ),
        (Heads(count=9), r"sft\.mask\.count is 9; the model has 8 heads"),
        (Heads(count=1, mlps=3), r"sft\.mask\.mlps is 3; the model has 2 layers"),
        (Layers(count=3), r"sft\.mask\.count is 3; the model has 2 layers"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, rows, mesh, mask, message):
    with pytest.raises(UserError, match=message):
        of_run(model, rows, mesh, mask)
