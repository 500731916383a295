"""Measures of weights against the same by hand: a decoder of two layers in NumPy, small matrices, all permutations."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import analysis_by_hand as hand

from train.evaluate import agreement, change, line, rank
from train.evaluate.importance import loss_of, of_layers, skip_importance, taylor_importance, without_layer
from train.evaluate.texts import Text, batches, mean_loss
from train.evaluate.tuco import share, tuco
from train.log import UserError
from train.models.config import FULL, SLIDING
from train.models.stacked import stack_layers
from train.studies import stats

SEQUENCES = [((1, 2, 3), (4, 5)), ((6, 1), (2,)), ((3, 3, 1, 5, 2), (1, 1, 6)), ((4,), (2, 5, 1, 3))]
TEXTS = [Text(a, b) for a, b in SEQUENCES]


# --- importance --------------------------------------------------------------------------------------------


def test_mean_loss_is_of_completions_alone_however_batched():
    params = hand.params(0)
    wanted = hand.nll(hand.float64(params), SEQUENCES)
    for rows in (1, 3, 4):
        found = mean_loss(loss_of(hand.CONFIG), params, batches(TEXTS, rows=rows))
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", ["unrolled", "stacked"])
def test_leaving_a_layer_out_by_hand(shape):
    params, tree = hand.params(1), hand.float64(hand.params(1))
    whole = hand.nll(tree, SEQUENCES)
    wanted = [hand.nll(tree, SEQUENCES, layers=(1,)) - whole, hand.nll(tree, SEQUENCES, layers=(0,)) - whole]
    given = params if shape == "unrolled" else stack_layers(params)
    found, nll = skip_importance(hand.CONFIG, given, batches(TEXTS))
    assert nll == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_layer_that_adds_nothing_has_no_importance():
    params = hand.params(2)
    layer = params["model"]["layers"]["0"]
    for module, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        layer[module][name]["weight"] = jnp.zeros_like(layer[module][name]["weight"])
    skipped, _ = skip_importance(hand.CONFIG, params, batches(TEXTS))
    assert skipped[0] == pytest.approx(0, abs=1e-6)
    assert abs(skipped[1]) > 1e-2
    taylor = taylor_importance(loss_of(hand.CONFIG), params, batches(TEXTS))
    # Its matrices that write to the stream are 0, and nothing before them can matter.
    assert taylor["model/layers/0"] == pytest.approx(0, abs=1e-6)


def test_remaining_layers_keep_their_kind():
    config = dataclasses.replace(
        hand.CONFIG, num_hidden_layers=3, sliding_window=2, layer_types=(SLIDING, FULL, SLIDING),
        rope_layers=(True, False, True),
    )  # fmt: skip
    layers = {str(i): {"mark": jnp.float32(i)} for i in range(3)}
    shorter, params = without_layer(config, {"model": {"layers": layers}}, 0)
    assert shorter.layers == config.layers[1:]
    assert {name: int(layer["mark"]) for name, layer in params["model"]["layers"].items()} == {"0": 1, "1": 2}
    with pytest.raises(UserError, match="needs two or more, and the model has 1"):
        without_layer(dataclasses.replace(hand.CONFIG, num_hidden_layers=1), {}, 0)


def test_first_order_importance_by_differences():
    params, step = hand.params(3), 1e-5
    tree, wanted = hand.float64(params), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(entry.key for entry in path)
        for index in np.ndindex(leaf.shape):
            keep = leaf[index]
            leaf[index] = keep + step
            up = hand.nll(tree, SEQUENCES)
            leaf[index] = keep - step
            slope = (up - hand.nll(tree, SEQUENCES)) / (2 * step)
            leaf[index] = keep
            group = name.split("/self_attn")[0].split("/mlp")[0].split("/input")[0].split("/post")[0]
            group = group.removesuffix("/weight")
            wanted[group] = wanted.get(group, 0.0) + abs(keep * slope)
    found = taylor_importance(loss_of(hand.CONFIG), params, batches(TEXTS, rows=3))
    assert found.keys() == wanted.keys()
    for group, value in wanted.items():
        assert found[group] == pytest.approx(value, rel=1e-3), group
    assert of_layers(found, 2) == [found["model/layers/0"], found["model/layers/1"]]


# --- change ------------------------------------------------------------------------------------------------


def two_layers(scale):
    def layer(i):
        q = jnp.full((2, 2), 3.0 + scale * (i + 1))
        return {"self_attn": {"q_proj": {"weight": q}}, "input_layernorm": {"weight": jnp.full(4, 2.0)}}

    embed = {"embed_tokens": {"weight": jnp.array([[1.0, 0.0]]) * (1 + scale)}}
    return {"model": {**embed, "layers": {"0": layer(0), "1": layer(1)}}, "lm_head": {"weight": jnp.ones((1, 2))}}


def test_change_by_hand():
    base, tuned = two_layers(0.0), two_layers(1.0)
    # q: Δ is 1 in layer 0 and 2 in layer 1 on four elements of 3; norms are unchanged, four elements of 2.
    assert change.by_kind(tuned, base) == pytest.approx(
        {"embed": 1.0, "norms": 0.0, "q": math.sqrt((4 + 16) / (36 + 36)), "head": 0.0}
    )
    layers = change.by_layer(tuned, base)
    assert layers["model/layers/0"] == pytest.approx(math.sqrt(4 / (36 + 16)))
    assert layers["model/layers/1"] == pytest.approx(math.sqrt(16 / (36 + 16)))
    cells = change.by_layer_and_kind(tuned, base)
    assert cells == {"q": pytest.approx([1 / 3, 2 / 3]), "norms": [0.0, 0.0]}


def test_what_was_zero_and_moved_has_no_relative_change():
    """As the last norm of an untrained Gemma: infinity can stand in no record."""
    base = {"model": {"norm": {"weight": jnp.zeros(3)}, "layers": {"0": {"w": jnp.array([2.0])}}}}
    tuned = {"model": {"norm": {"weight": jnp.ones(3)}, "layers": {"0": {"w": jnp.array([3.0])}}}}
    assert change.by_layer(tuned, base) == {"model/layers/0": 0.5}
    assert change.by_layer(base, base) == {"model/layers/0": 0.0, "model/norm": 0.0}
    overflown = {"model": {"norm": {"weight": jnp.zeros(3)}, "layers": {"0": {"w": jnp.array([jnp.inf])}}}}
    assert change.by_layer(overflown, base)["model/layers/0"] == math.inf


def test_kinds_of_a_decoder():
    kinds = change.by_kind(hand.params(1), hand.params(0))
    assert set(kinds) == set(change.KINDS)
    assert change.by_kind(stack_layers(hand.params(1)), hand.params(0)) == kinds


# --- rank correlation --------------------------------------------------------------------------------------


def test_rho_shares_the_ranks_of_ties_and_is_unknown_where_a_side_does_not_vary():
    # Ranks 1, 2½, 2½, 4 against 1, 3, 2, 4: ρ = 4.5 / √(4.5 · 5).
    assert stats.permutation_test([1.0, 2.0, 2.0, 4.0], [1.0, 3.0, 2.0, 4.0]).rho == pytest.approx(4.5 / 22.5**0.5)
    flat = stats.permutation_test([1, 1, 1], [1, 2, 3])
    assert (math.isnan(flat.rho), math.isnan(flat.p), flat.permutations) == (True, True, 0)


def test_few_layers_are_tested_exactly():
    # Of the 6 orders of three layers only two give |ρ| = 1; of two layers, both do.
    found = stats.permutation_test([1.0, 2.0, 3.0], [5.0, 4.0, 3.0])
    assert (found.rho, found.p, found.permutations, found.exact) == (-1.0, pytest.approx(2 / 6), 6, True)
    assert stats.permutation_test([0.1, 0.2], [4.0, 3.0]).p == 1.0
    # By hand: |ρ| over all orders of (0, 1, 2, 3) against a value with a tie.
    a, b = [1.0, 2.0, 2.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    rho = abs(scipy.stats.spearmanr(a, b).statistic)
    as_much = [abs(scipy.stats.spearmanr(a, order).statistic) >= rho - 1e-9 for order in itertools.permutations(b)]
    assert stats.permutation_test(a, b).p == pytest.approx(sum(as_much) / 24)
    with pytest.raises(ValueError, match="found 2 and 3 values"):
        stats.permutation_test([1, 2], [1, 2, 3])


@pytest.mark.parametrize(("layers", "draws"), [(7, 0), (12, 199)])
def test_p_is_calibrated_on_shuffled_layers(layers, draws):
    rng, trials = np.random.default_rng(7), 400
    importance = rng.standard_normal(layers)
    ps = [
        stats.permutation_test(importance, rng.permutation(layers).astype(float), seed=i, draws=draws).p
        for i in range(trials)
    ]
    for level in (0.05, 0.2, 0.5):
        # Never too small on average, and no more than a little too large: ρ of few layers has few values.
        low, high = scipy.stats.binom.ppf([0.001, 0.999], trials, level)
        assert low - 0.02 * trials <= sum(p <= level for p in ps) <= high
    strong = stats.permutation_test(np.arange(layers), np.arange(layers)[::-1], draws=draws or 1)
    assert strong.p < 0.01
    again = [stats.permutation_test(importance, np.arange(layers), seed=3, draws=50).p for _ in range(2)]
    assert again[0] == again[1]


# --- agreement and rank ------------------------------------------------------------------------------------


def test_agreement_by_hand():
    one = {"a": np.array([1.0, -1.0, 0.0]), "b": np.array([[2.0]])}
    two = {"a": np.array([1.0, 1.0, 5.0]), "b": np.array([[-2.0]])}
    cosine, conflict = agreement.agreement([one, two, jax.tree.map(np.zeros_like, one)])
    assert cosine[0][1] == cosine[1][0] == pytest.approx((1 - 1 - 4) / math.sqrt(6 * 31))
    assert conflict[0][1] == pytest.approx(2 / 3), "of three elements that both change, two go apart"
    assert cosine[0][2] is None
    assert cosine[2][2] == 1.0


def test_rank_by_hand():
    assert rank.effective_rank(rank.singular_values(np.diag([3.0, 3.0, 3.0]))) == pytest.approx(3)
    values = rank.singular_values(np.diag([3.0, 1.0])[:, ::-1])
    p = np.array([0.75, 0.25])
    assert rank.effective_rank(values) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert rank.stable_rank(values) == pytest.approx(10 / 9)
    wide = np.random.default_rng(0).standard_normal((3, 8))
    np.testing.assert_allclose(rank.singular_values(wide), np.linalg.svd(wide)[1])
    np.testing.assert_allclose(rank.singular_values(wide.T), np.linalg.svd(wide)[1])
    assert rank.effective_rank(np.zeros(2)) == rank.stable_rank(np.zeros(2)) == 0.0
    found = rank.ranks(two_layers(1.0), two_layers(0.0))
    assert found["q"] == pytest.approx({"effective": 1.0, "stable": 1.0, "full": 2.0, "matrices": 2}, abs=1e-4)
    assert found["head"]["effective"] == 0.0


# --- TuCo --------------------------------------------------------------------------------------------------


def test_tuco_by_hand():
    base, tuned = hand.params(0), hand.params(1)
    before, after = hand.float64(base)["model"]["layers"], hand.float64(tuned)["model"]["layers"]
    prompts = [[1, 2, 3], [4, 5, 6, 1, 2]]
    wanted = []
    for prompt in prompts:
        x = hand.float64(tuned)["model"]["embed_tokens"]["weight"][prompt]
        ptc, ftc, shares = 0.0, 0.0, []
        for l in ("0", "1"):
            original, full = hand.block(before[l], x) - x, hand.block(after[l], x) - x
            ptc, ftc = ptc + original[-1], ftc + (full - original)[-1]
            shares.append(np.linalg.norm(ftc) / (np.linalg.norm(ptc) + np.linalg.norm(ftc)))
            x = x + full
        wanted.append(shares)
    values, by_layer = tuco(hand.CONFIG, tuned, base, prompts)
    np.testing.assert_allclose(by_layer, wanted, rtol=1e-4)
    np.testing.assert_allclose(values, np.array(wanted)[:, -1], rtol=1e-4)


def test_tuco_at_its_ends():
    params = hand.params(0)
    values, _ = tuco(hand.CONFIG, params, params, [[1, 2]])
    assert values.tolist() == [0.0]
    silent = jax.tree.map(lambda w: w if w.ndim == 1 else jnp.zeros_like(w), params)
    values, _ = tuco(hand.CONFIG, params, silent, [[1, 2]])
    assert values.tolist() == [1.0]
    assert float(share(jnp.zeros(3), jnp.zeros(3))) == 0.0


# --- lines and planes --------------------------------------------------------------------------------------


def bowl(params, batch):
    """Σ (w − centre)², weighed."""
    return batch["weight"] * jnp.sum(jnp.square(params["w"] - batch["centre"])), batch["weight"]


def test_line_and_plane_of_a_bowl_by_hand():
    base, tuned = {"w": jnp.array([0.0, 0.0, 1.0])}, {"w": jnp.array([2.0, 0.0, 1.0])}
    given = {
        "one": [{"centre": jnp.array([1.0, 0.0, 1.0]), "weight": jnp.float32(3)}],
        "two": [
            {"centre": jnp.zeros(3), "weight": jnp.float32(1)},
            {"centre": jnp.array([0.0, 0.0, 1.0]), "weight": jnp.float32(3)},
        ],
    }
    found = line.along_line(bowl, base, tuned, [0.0, 0.5, 1.0, 2.0], given)
    assert found["one"] == pytest.approx([1.0, 0.0, 1.0, 9.0])
    assert found["two"] == pytest.approx([0.25, 1.25, 4.25, 16.25])
    other = {"w": jnp.array([1.0, 3.0, 1.0])}
    plane = line.plane(base, {"tuned": tuned, "other": other, "half": {"w": jnp.array([1.0, 0.0, 1.0])}})
    assert plane is not None
    assert plane.places["tuned"] == pytest.approx((1.0, 0.0, 0.0))
    assert plane.places["other"] == pytest.approx((0.5, 1.5, 0.0), abs=1e-3)
    assert plane.places["half"] == pytest.approx((0.5, 0.0, 0.0))
    # Any point is u·(2, 0, 0) + v·(0, 2, 0) from the base.
    values = line.over_points(bowl, base, plane.directions, [(0.5, 1.5), (0.0, 0.0), (0.0, 1.0)], given)["one"]
    assert values == pytest.approx([9.0, 1.0, 5.0])
    u, v = line.grid(plane.places, 5)
    assert (u[0], u[-1], v[0], v[-1]) == pytest.approx((-0.3, 1.3, -0.45, 1.95))


def test_no_plane_through_models_on_one_line():
    base = hand.params(0)
    tuned = hand.params(1)
    merged = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, base, tuned)
    beyond = jax.tree.map(lambda a, b: 1.5 * b - 0.5 * a, base, tuned)
    assert line.plane(base, {"tuned": tuned, "merged": merged, "beyond": beyond}) is None
    assert line.plane(base, {"tuned": base}) is None


def test_a_model_out_of_the_plane_says_how_far():
    base = {"w": jnp.zeros(3)}
    models = {"a": [1.0, 0.0, 0.0], "b": [0.0, 4.0, 0.0], "c": [0.0, 0.0, 1.0]}
    plane = line.plane(base, {name: {"w": jnp.array(w)} for name, w in models.items()})
    assert plane is not None
    assert plane.places["c"] == pytest.approx((0.0, 0.0, 1.0))


def test_many_points_compile_once():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return bowl(params, batch)

    base = {"w": jnp.zeros(3)}
    given = {"one": [{"centre": jnp.ones(3), "weight": jnp.float32(1)}]}
    line.along_line(loss, base, {"w": jnp.ones(3)}, [0.0, 0.5, 1.0, 1.5], given)
    assert len(traces) == 1
