"""Weights of either sign: the loss is divided by the number of learnt tokens, and a negative weight unlearns."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers.sft_cases import SFT, tune

from train.learn.batches import batches, to_rows
from train.learn.objectives import ResponseOnly, Signed
from train.log import UserError
from train.models.characters import PAD_ID
from train.models.loss import Compute, loss_sums, objective_sums

SIGNED = dataclasses.replace(SFT, objective=Signed())
WEIGHTS = (1.0, -0.5, 0.0, 0.25)


@pytest.fixture(scope="module")
def weighted(examples):
    return [e | {"weight": WEIGHTS[i % 4]} for i, e in enumerate(examples[:16])]


def sums(model, rows, *, signed):
    batch: Any = next(batches(rows, dataclasses.replace(SFT, batch=16), seed=0))

    def of(params):
        if signed:
            return objective_sums(model.config, params, batch, Compute(), Signed().loss)[:2]
        return loss_sums(model.config, params, batch)

    return jax.value_and_grad(of, has_aux=True)(model.params)


def test_the_loss_and_its_gradient_are_the_weighted_sum_over_the_number_of_tokens(model, weighted):
    (loss, count), gradient = sums(model, to_rows(weighted, SIGNED, PAD_ID), signed=True)
    parts = {}
    for weight in WEIGHTS:
        alone = [{**e, "weight": 1.0} for e in weighted if e["weight"] == weight]
        parts[weight] = sums(model, to_rows(alone, SFT, PAD_ID), signed=False)
    learnt = {w: float(found[0][1]) for w, found in parts.items()}
    assert float(count) == sum(n for w, n in learnt.items() if w), "what has weight 0 is left out"
    np.testing.assert_allclose(loss, sum(w * float(found[0][0]) for w, found in parts.items()), rtol=1e-4)
    wanted = jax.tree.map(lambda *g: sum(w * x for w, x in zip(parts, g, strict=True)), *(f[1] for f in parts.values()))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_packed_rows_and_padded_ones_have_the_same_loss(model, weighted, mesh):
    config = dataclasses.replace(SIGNED, learning_rate=0.0, epochs=1, batch=16)
    losses = [
        tune(model, to_rows(weighted, c, PAD_ID), c, mesh)[1][0]["loss"]
        for c in (config, dataclasses.replace(config, packing=True))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_line_s_reward_is_the_weight_and_others_are_refused():
    assert Signed().weight_of({"reward": -2.0}) == -2.0
    with pytest.raises(UserError, match=r"weight -1; weights below 0 are learnt by sft\.objective=\{name: signed\}"):
        ResponseOnly().weight_of({"weight": -1.0})
    with pytest.raises(UserError, match="all 2 examples have the weight 0"):
        to_rows([{"tokens": [1, 2, 3], "prompt_length": 1, "reward": 0.0}] * 2, SIGNED, PAD_ID)
