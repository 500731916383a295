"""The merge at the end of a round: what each rule makes of an anchor, a tuned model and α."""

import jax
import numpy as np
import pytest

import jaxmerge
from train.improve import merge as combine
from train.improve.settings import Merge
from train.log import UserError
from train.resolve import build

OTHERS = (
    "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "della", "della_linear", "breadcrumbs",
    "breadcrumbs_ties", "sce",
)  # fmt: skip


def params(value):
    return {"model": {"layers": {str(i): {"mlp": {"weight": np.full((2, 2), value, np.float32)}} for i in range(2)}}}


def drawn(seed, scale=1.0):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * numbers.standard_normal((8, 16))).astype(np.float32), params(0.0))


def test_merge_is_imm_with_every_option():
    anchor, tuned = params(1.0), params(3.0)

    def merged(alpha=0.5, **options):
        key = jax.random.key(0)
        leaves = jax.tree.leaves(combine.merged(anchor, tuned, Merge(rule="imm", **options), alpha, key=key))
        return [float(np.mean(x)) for x in leaves]

    assert merged() == [2.0, 2.0]
    assert merged([0.0, 1.0]) == [1.0, 3.0]
    assert merged({"layers/0": 0.25, "**": 0.5}) == [1.5, 2.0]
    assert merged(combine.by_layer([0.25, 0.75])) == [1.5, 2.5]
    with pytest.raises(ValueError, match=r"'layers/0' decides for no leaf, for '\*\*' stands before it"):
        merged({"**": 0.5, "layers/0": 0.25})
    assert merged(where=("layers/1",)) == [3.0, 2.0]
    dropped = combine.merged(anchor, tuned, Merge(rule="imm", drop=0.5), 0.5, key=jax.random.key(0))
    assert set(np.concatenate([np.ravel(x) for x in jax.tree.leaves(dropped)]).tolist()) <= {1.0, 3.0}


@pytest.mark.parametrize("rule", OTHERS)
def test_alpha_0_is_the_anchor_and_every_rule_moves_with_alpha(rule):
    anchor, tuned = drawn(0), jax.tree.map(np.add, drawn(0), drawn(1, 0.1))
    parameters = {"della": {"density": 0.5, "epsilon": 0.1}, "della_linear": {"density": 0.5, "epsilon": 0.1}}.get(
        rule, {"density": 0.5} if rule in ("ties", "dare", "dare_ties", "breadcrumbs", "breadcrumbs_ties") else {}
    )
    parameters = parameters | ({"gamma": 0.1} if rule.startswith("breadcrumbs") else {})
    config = Merge(rule=rule, parameters=parameters)
    still, moved = (combine.merged(anchor, tuned, config, alpha, key=jax.random.key(0)) for alpha in (0.0, 0.5))
    for a, s, m in zip(*map(jax.tree.leaves, (anchor, still, moved)), strict=True):
        np.testing.assert_allclose(s, a, atol=1e-6)
        assert np.max(np.abs(m - a)) > 1e-3


def test_rules_are_the_library_s():
    anchor, tuned, alpha = drawn(0), drawn(1), 0.3
    same = [
        (Merge(rule="slerp"), jaxmerge.slerp([anchor, tuned], t=alpha)),
        (
            Merge(rule="ties", parameters={"density": 0.4}),
            jaxmerge.ties([tuned], base=anchor, weights=[alpha], normalize=False, density=0.4),
        ),
        (Merge(rule="task_arithmetic"), jaxmerge.imm([tuned], base=anchor, alpha=alpha)),
    ]
    for config, wanted in same:
        found = combine.merged(anchor, tuned, config, alpha)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_slerp_of_some_layers_leaves_the_others_tuned():
    anchor, tuned = drawn(0), drawn(1)
    found = combine.merged(anchor, tuned, Merge(rule="slerp", where=("layers/1",)), {"**": [0.2, 0.6]})
    layers = [tree["model"]["layers"] for tree in (found, tuned)]
    np.testing.assert_array_equal(layers[0]["0"]["mlp"]["weight"], layers[1]["0"]["mlp"]["weight"])
    assert np.max(np.abs(layers[0]["1"]["mlp"]["weight"] - layers[1]["1"]["mlp"]["weight"])) > 0.1


def test_a_wrong_parameter_is_named():
    with pytest.raises(ValueError, match=r"merge\.parameters=\{'dencity': 0\.4\}: ties does not take"):
        combine.merged(drawn(0), drawn(1), Merge(rule="ties", parameters={"dencity": 0.4}), 0.5)


def test_the_running_average_counts_the_original_once_and_every_round_once():
    average = combine.running_average([params(1.0), params(2.0), params(6.0)])
    assert {float(np.mean(x)) for x in jax.tree.leaves(average)} == {3.0}
    one = params(1.0)
    assert combine.running_average([one]) is one


def test_layers_that_matter_and_move_are_protected_most():
    assert combine.layer_alphas([1.0, 5.0, 1.0], [1.0, 1.0, 4.0], [0.3, 0.7]) == [0.7, 0.3, 0.5]
    assert combine.layer_alphas([1.0], [1.0], [0.3, 0.7]) == [0.7]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"rule": "ties", "drop": 0.2}, r"drop and reference are imm's, and the rule is ties"),
        ({"rule": "imm", "parameters": {"density": 0.2}}, r"imm has drop and reference instead"),
        ({"rule": "imm", "alpha": {"importance": [0.2]}}, r"\{importance: \[α, α\]\}"),
        ({"rule": "thighs"}, r"rule"),
    ],
)
def test_mistakes_are_named(block, said):
    with pytest.raises(UserError, match=said):
        build(Merge, block, "merge")
