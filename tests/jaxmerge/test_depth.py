"""A list over depth: which siblings are layers, and what is refused by name."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge import depth
from jaxmerge.tree import named_leaves

LINEAR = {"kernel": (2, 2), "bias": (2,)}


def zeros_and_ones(shapes):
    make = lambda fill: jax.tree.map(lambda s: jnp.full(s, fill), shapes, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
    return [make(0.0), make(1.0)]


def shares(shapes, value, **more):
    """The t that each leaf is merged with."""
    merged = jaxmerge.interpolate(zeros_and_ones(shapes), t=value, **more)
    return {path: pytest.approx(float(np.ravel(leaf)[0])) for path, leaf in named_leaves(merged).items()}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(4)(x))
        return nn.LayerNorm()(x)


def test_every_layer_of_a_linen_model_has_its_own_number():
    one, two = (Mlp().init(jax.random.key(seed), jnp.ones((1, 2)))["params"] for seed in (0, 1))
    assert one["Dense_0"]["kernel"].shape != one["Dense_1"]["kernel"].shape  # alike in their leaves, not in their sizes
    merged = jax.jit(lambda t: jaxmerge.interpolate([one, two], t=[t, 0.8]))(0.2)
    for layer, t in enumerate((0.2, 0.5, 0.8)):
        a, b = one[f"Dense_{layer}"]["kernel"], two[f"Dense_{layer}"]["kernel"]
        np.testing.assert_allclose(merged[f"Dense_{layer}"]["kernel"], (1 - t) * a + t * b, rtol=1e-5, atol=1e-6)
    # What is in no layer is at depth 0, as an embedding.
    base = jax.tree.map(jnp.zeros_like, one)
    far = jaxmerge.extrapolate([one], base=base, alpha=[0.2, 0.8])
    np.testing.assert_allclose(far["LayerNorm_0"]["scale"], 1.2)


@pytest.mark.parametrize("name", ["Dense_", "layers_", "h_", "block", "layers/", "encoder/layers_"])
def test_siblings_that_are_numbered_are_layers(name):
    tree: dict = {"embed": {"embedding": (2, 2)}, "head": {"kernel": (2, 2)}}
    for layer in range(12):  # 10 is after 9, not after 1
        *parents, last = f"{name}{layer}".split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = {"attn": LINEAR, "norm": {"scale": (2,)}}
    found = shares(tree, [0.0, 1.1])
    for layer in range(12):
        assert found[f"{name}{layer}/attn/kernel"] == found[f"{name}{layer}/norm/scale"] == 0.1 * layer
    assert found["embed/embedding"] == found["head/kernel"] == 0.0


GATED = {"wi_0": {"kernel": (2, 4)}, "wi_1": {"kernel": (2, 4)}, "wo": {"kernel": (4, 2)}}


def test_the_halves_of_a_gated_mlp_are_no_layers():
    found = shares({"encoder": {f"layers_{l}": {"mlp": GATED} for l in range(3)}, "scale": (2,)}, [0.2, 0.8])
    for layer, t in enumerate((0.2, 0.5, 0.8)):
        assert found[f"encoder/layers_{layer}/mlp/wi_0/kernel"] == found[f"encoder/layers_{layer}/mlp/wi_1/kernel"] == t
    with pytest.raises(ValueError, match=r"'mlp/wi_\*' are no layers, for they lie side by side; wanted siblings"):
        shares({"mlp": GATED}, [0.2, 0.8])


def test_an_encoder_and_a_decoder_each_run_from_end_to_end():
    tree = {"encoder": {f"block_{l}": LINEAR for l in range(2)}, "decoder": {f"block_{l}": LINEAR for l in range(3)}}
    found = shares(tree, [0.0, 1.0])
    assert [found[f"encoder/block_{l}/bias"] for l in range(2)] == [0.0, 1.0]
    assert [found[f"decoder/block_{l}/bias"] for l in range(3)] == [0.0, 0.5, 1.0]


def test_whole_numbers_come_first_as_they_did():
    paths = ["layers/0/Dense_0/w", "layers/0/Dense_1/w", "layers/1/Dense_0/w", "layers/1/Dense_1/w", "layers/1/e/7/w"]
    assert list(depth.depths(paths).values()) == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert depth.depths(["h/0/w", "head/w"]) == {"h/0/w": 0.0, "head/w": 0.0}


UNLIKE = {"Dense_0": LINEAR, "Dense_1": {"kernel": (2, 2)}}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"w": (2,), "v": (2,)}, r"no leaf that it decides for is in layers \(2, first 'v'\); wanted siblings such as"),
        (UNLIKE, r"'Dense_\*' are no layers, for number 1 has other leaves than number 0"),
        ({"w1": (2,), "w2": (2,), "w3": (2,)}, r"'w\*' are no layers, for their numbers are 1, 2, 3"),
        ({"Dense_0": LINEAR}, r"'Dense_\*' are no layers, for there is one"),
    ],
)
def test_a_list_without_layers_is_refused(tree, words):
    with pytest.raises(ValueError, match=r"t=\[0\.2, 0\.8\] is a list over depth, but .*" + words):
        shares(tree, [0.2, 0.8])
    assert all(t == 0.3 for t in shares(tree, [0.3]).values())  # one number, whatever the depth


def test_a_leaf_in_two_sets_of_layers_is_refused():
    tree = {f"Block_{b}": {f"Dense_{d}": LINEAR for d in range(2)} for b in range(4)}
    words = (
        "t=[0.2, 0.8] is a list over depth, but leaf 'Block_0/Dense_0/bias' is in two sets of layers, 'Block_*' (4) "
        "and 'Block_0/Dense_*' (2); give each layer its number by a pattern: t={'Block_0': …, 'Block_1': …, '**': …}"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        shares(tree, [0.2, 0.8])
    with pytest.raises(ValueError, match=r"is in two sets of layers, 'Block_\*' \(2\) and 'Block_0/layers/\*' \(2\)"):
        shares({f"Block_{b}": {"layers": [LINEAR, LINEAR]} for b in range(2)}, {"**": [0.2, 0.8]})
    found = shares(tree, {"Block_0": 0.1, "Block_3": 0.4, "**": 0.2})  # the way out that the error names
    assert [found[f"Block_{b}/Dense_1/bias"] for b in range(4)] == [0.1, 0.2, 0.2, 0.4]


LAYERS = {"layers": [LINEAR, LINEAR], "head": {"kernel": (2, 2)}}


def test_a_pattern_that_matches_no_leaf_is_refused():
    words = (
        r"t: the pattern 'layer/0' matches none of the 5 leaves; did you mean 'layers'\? the first leaf is "
        "'head/kernel'; change the pattern, or leave it out"
    )
    with pytest.raises(ValueError, match=words):
        shares(LAYERS, {"layer/0": 0.1, "**": 0.5})
    with pytest.raises(ValueError, match=r"the pattern 'kernal' matches none of the 5 leaves; did you mean 'kernel'\?"):
        shares(LAYERS, {"kernal": 0.1, "**": 0.5})
    with pytest.raises(ValueError, match=r"weights\[1\]: the pattern 'hed' matches none .* did you mean 'head'\?"):
        jaxmerge.average(zeros_and_ones(LAYERS), weights=[1.0, {"hed": 0.1, "**": 0.5}])
    with pytest.raises(
        ValueError, match=r"t\['head'\]=\[0.1, 0.2\] is a list over depth, but no leaf .* \(1, first 'head"
    ):
        shares(LAYERS, {"head": [0.1, 0.2], "**": 0.5})


def test_lists_of_models_are_no_lists_over_depth():
    flat = zeros_and_ones({"w": (2,)})
    assert float(jaxmerge.average(flat, weights=[1, 3])["w"][0]) == 0.75
    assert float(jaxmerge.average(flat, weights=jnp.array([1.0, 3.0]))["w"][0]) == 0.75
    with pytest.raises(ValueError, match=r"weights\[1\]=\[0, 1\] is a list over depth, but no leaf"):
        jaxmerge.average(flat, weights=[1, [0, 1]])
    with pytest.raises(ValueError, match=r"weights\[0\] is a list over depth, but no leaf"):
        jaxmerge.average(flat, weights=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"^alpha is a list over depth, but no leaf"):
        jax.jit(lambda a: jaxmerge.extrapolate(flat[:1], base=flat[1], alpha=a))(jnp.array([0.1, 0.2]))


def test_stacked_layers_count_under_a_mask_too():
    stacked = {"layers": {"w": (3, 2), "v": (3, 2)}, "head": (2,)}
    values = {"layers/1/w": 0.9, "layers": [0.1, 0.3], "**": 0.5}
    assert shares(stacked, values, stacked=("layers",))["layers/w"] == 0.1
    merged = jaxmerge.masked(jaxmerge.interpolate, "head", "first")(
        zeros_and_ones(stacked), t=values, stacked=("layers",)
    )
    assert float(merged["head"][0]) == 0.5
    assert not merged["layers"]["w"].any()
    mine = jaxmerge.masked(jaxmerge.interpolate, "layers/v", "first")(
        zeros_and_ones(stacked), t=[0.0, 1.0], stacked=("layers",)
    )
    assert mine["layers"]["v"][:, 0].tolist() == [0.0, 0.5, 1.0]
