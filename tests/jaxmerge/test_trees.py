"""Paths, patterns, checks and measures, over the containers people use."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxmerge
from jaxmerge import where
from jaxmerge.tree import named_leaves


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.1, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: jax.Array
    right: jax.Array


def test_paths_of_containers():
    state = nnx.state(Block(nnx.Rngs(0)))
    assert jaxmerge.leaf_paths(state)[-2:] == ["layers/1/bias", "layers/1/kernel"]
    assert jaxmerge.leaf_paths(FrozenDict({"a": {"b": 1.0}})) == ["a/b"]
    assert jaxmerge.leaf_paths([{"w": 1}, (2, 3)]) == ["0/w", "1/0", "1/1"]
    assert jaxmerge.leaf_paths(Pair(jnp.ones(1), jnp.ones(1))) == ["left", "right"]
    with pytest.raises(ValueError, match="two leaves are both named 'a/b'"):
        jaxmerge.leaf_paths({"a/b": 1, "a": {"b": 2}})


def test_nnx_state_and_frozen_dict_merge():
    one, two = (nnx.state(Block(nnx.Rngs(seed))) for seed in (0, 1))
    merged = jaxmerge.interpolate([one, two], t=0.5)
    assert jax.tree.structure(merged) == jax.tree.structure(one)
    leaves, ones, twos = (np.asarray(jax.tree.leaves(state)[-1]) for state in (merged, one, two))
    np.testing.assert_allclose(leaves, (ones + twos) / 2, rtol=1e-6)
    frozen, plain = FrozenDict({"w": jnp.ones(2)}), {"w": jnp.zeros(2)}
    assert isinstance(jaxmerge.average([frozen, plain]), FrozenDict)


def test_complex_leaves_are_refused():
    x = {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(ValueError, match=r"leaf 'w' of models\[0\] is complex64\[2\]"):
        jaxmerge.average([x, x])


@pytest.mark.parametrize(
    ("pattern", "hit", "miss"),
    [
        ("mlp", "model/layers/0/mlp/w", "model/layers/0/mlps/w"),
        ("layers/1", "model/layers/1/w", "model/layers/10/w"),
        ("?_proj", "a/q_proj/w", "a/up_proj/w"),
        ("*_proj", "a/up_proj/w", "a/projection/w"),
        ("layers/**/weight", "m/layers/0/a/b/weight", "m/other/weight"),
        ("/lm_head", "lm_head/weight", "vision/lm_head/weight"),
        ("**", "anything/at/all", None),
        ("mlp/w", "a/mlp/w", "a/mlp/x/w"),
    ],
)
def test_patterns(pattern, hit, miss):
    assert where.matches(pattern, hit)
    assert miss is None or not where.matches(pattern, miss)


def test_select_and_predicates():
    tree = {"a": {"w": 1}, "b": {"w": 2}}
    assert jaxmerge.select(tree, lambda path: path.startswith("b")) == ["b/w"]
    assert jaxmerge.select(tree, ["a", "b/w"]) == ["a/w", "b/w"]
    with pytest.raises(ValueError, match="'c' selects none of the 2 leaves"):
        jaxmerge.select(tree, "c")
    with pytest.raises(ValueError, match="selects none"):
        jaxmerge.masked(jaxmerge.average, "nothing", otherwise="first")([{"w": jnp.ones(1)}])
    with pytest.raises(ValueError, match="takes no base; pass otherwise='first'"):
        jaxmerge.masked(jaxmerge.average, "w")


def test_traced_dicts_lose_their_order():
    models = [{"w": jnp.zeros(1)}, {"w": jnp.ones(1)}]
    run = jax.jit(lambda t: jaxmerge.interpolate(models, t=t))
    with pytest.raises(ValueError, match="jit sorts the keys"):
        run({"w": 0.25, "**": 0.5})
    assert float(run(collections.OrderedDict([("w", 0.25), ("**", 0.5)]))["w"][0]) == 0.25


def test_a_gradient_over_depth_ignores_the_mask():
    models = [{f"h/{l}/w": jnp.full(1, float(v)) for l in range(5)} for v in (0, 1)]
    merged = jaxmerge.masked(jaxmerge.interpolate, ["h/1", "h/2"], otherwise="first")(models, t=[0.0, 1.0])
    assert [float(leaf[0]) for leaf in merged.values()] == [0.0, 0.25, 0.5, 0.0, 0.0]


def test_a_mask_knows_trees_from_coefficients_and_matrices_by_path():
    """All of these have the models' paths; a tree of statistics is one whose leaves are like theirs."""
    square = lambda v: {"layers": [{"w": jnp.full((2, 2), v + l)} for l in range(12)]}  # noqa: E731
    base, one, two = (square(float(v)) for v in (0, 1, 3))
    paths = jaxmerge.leaf_paths(base)
    extrapolate = jaxmerge.masked(jaxmerge.extrapolate, "layers/0")
    for half in (0.5, jnp.float32(0.5)):
        found = extrapolate([one], base=base, alpha=dict.fromkeys(paths, half))
        assert [float(leaf[0, 0]) for leaf in jax.tree.leaves(found)] == [1.5, *range(1, 12)]
    flat = [jnp.zeros(2), jnp.ones(2)]
    found = jaxmerge.masked(jaxmerge.average, "1", "first")([flat, flat[::-1]], weights=[1, 3])
    assert [float(leaf[0]) for leaf in found] == [0.0, 0.25]
    deep = [{"layers": flat}, {"layers": flat[::-1]}]
    found = jaxmerge.masked(jaxmerge.interpolate, "layers/1", "first")(deep, t={"layers": [0.0, 0.75]})
    assert [float(leaf[0]) for leaf in found["layers"]] == [0.0, 0.25]

    grams = [{path: (i + 1) * jnp.eye(2) for path in paths} for i in range(2)]
    found = jaxmerge.masked(jaxmerge.regmean, "layers/0", "first")([one, two], grams=grams)
    assert [round(float(leaf[0, 0]), 3) for leaf in jax.tree.leaves(found)] == [2.333, *range(2, 13)]
    # Statistics by path, whose order is not that of a list of layers, and as a tree.
    for fishers in ([named_leaves(tree) for tree in (one, two)], [one, two]):
        found = jaxmerge.masked(jaxmerge.fisher, "layers/0", "first")([one, two], fishers=fishers, floor=0.0)
        assert [float(leaf[0, 0]) for leaf in jax.tree.leaves(found)] == [2.5, *range(2, 13)]
    wrong = {"layers": [{"w": jnp.ones((3, 2))} for _ in range(12)]}
    with pytest.raises(ValueError, match=r"leaf 'layers/0/w' of statistics\[1\] has shape \(3, 2\), wanted \(2, 2\)"):
        jaxmerge.masked(jaxmerge.fisher, "layers/0", "first")([one, two], fishers=[one, wrong])


def test_stacked_scalar_is_refused():
    with pytest.raises(ValueError, match=r"leaf 'layers/scale' has shape \(\), but stacked='layers'"):
        jaxmerge.average([{"layers": {"scale": jnp.float32(1)}}], stacked=("layers",))


def test_measures_against_numpy():
    rng = np.random.default_rng(0)
    base, tuned = (
        {"model": {"embed_tokens": {"w": rng.standard_normal((4, 3))},
                   "layers": {str(l): {"a": rng.standard_normal(5), "b": rng.standard_normal(2)} for l in range(2)},
                   "norm": {"w": rng.standard_normal(3)}},
         "lm_head": {"w": rng.standard_normal((4, 3))}}
        for _ in range(2)
    )  # fmt: skip
    x, y = (jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t) for t in (tuned, base))
    change = jaxmerge.to_floats(jax.jit(jaxmerge.change)(x, y))
    assert list(change) == ["lm_head", "model/embed_tokens", "model/layers/0", "model/layers/1", "model/norm"]
    flat = lambda t, l: np.concatenate([t["model"]["layers"][l]["a"], t["model"]["layers"][l]["b"]])  # noqa: E731
    wanted = np.linalg.norm(flat(tuned, "1") - flat(base, "1")) / np.linalg.norm(flat(base, "1"))
    assert change["model/layers/1"] == pytest.approx(wanted, rel=1e-6)
    stack = lambda t: {"model": {"layers": jax.tree.map(lambda *v: jnp.stack(v), *t["model"]["layers"].values())}}  # noqa: E731
    stacked = jaxmerge.to_floats(jaxmerge.change(stack(x), stack(y), stacked=("layers",)))
    assert stacked == pytest.approx({k: v for k, v in change.items() if "layers" in k}, rel=1e-6)
    assert jaxmerge.to_floats(jaxmerge.change(y, y)) == dict.fromkeys(change, 0.0)
    assert float(jaxmerge.norm(x)) ** 2 == pytest.approx(sum(np.sum(v**2) for v in jax.tree.leaves(tuned)), rel=1e-5)


def test_nonfinite_leaves_are_named():
    tree = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan, jnp.inf], jnp.bfloat16)}
    assert jaxmerge.to_floats(jaxmerge.nonfinite(tree)) == {"a": 0, "b": 2}
    others = {"activation": jax.nn.relu, "name": "mlp", "step": 3, "key": jax.random.key(0)}
    jaxmerge.check_finite({"a": tree["a"]} | others)
    tree |= others
    with pytest.raises(ValueError, match="merged has 2 NaN or infinite elements in leaf 'b'"):
        jaxmerge.check_finite(tree, "merged")


def test_other_rows_of_an_embedding_are_another_vocabulary():
    def model(words, width=4):
        mlp = {"kernel": jnp.ones((width, 3))}
        return {
            "blocks": [mlp],
            "embed": {"embedding": jnp.ones((words, width))},
            "lm_head": {"kernel": jnp.ones((width, words))},
        }

    words = (
        r"^the vocabularies differ: leaf 'embed/embedding' of models\[1\] has shape \(9, 4\), wanted \(7, 4\) as in "
        r"models\[0\] \(and 1 of 3 leaves more differ\); give the models one vocabulary first"
    )
    with pytest.raises(ValueError, match=words):
        jaxmerge.average([model(7), model(9)])
    odd = model(9) | {"blocks": [{"kernel": jnp.ones((4, 5))}]}
    with pytest.raises(ValueError, match=r"^the vocabularies differ: leaf 'embed/embedding' of base"):
        jaxmerge.extrapolate([model(7)], base=odd, alpha=0.3)
    with pytest.raises(
        ValueError, match=r"^leaf 'blocks/0/kernel' of models\[1\] has .*; merge models of one architecture$"
    ):
        jaxmerge.average([model(7), model(9, width=6)])
    with pytest.raises(ValueError, match=r"^leaf 'head/kernel' of models\[1\]"):  # of another width, with as many words
        jaxmerge.average([{"head": {"kernel": jnp.ones((4, 7))}}, {"head": {"kernel": jnp.ones((5, 7))}}])
