"""Pairs whose answers share a row, and rows of which one sequence is only looked at: what is learnt is unchanged."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.batches import batches
from train.learn.on_policy import sharing_of
from train.learn.pairs import rows_of
from train.learn.policy import Policy
from train.learn.reference import with_reference
from train.learn.settings import Sft
from train.learn.shared_pairs import Forked, with_shared_prompts
from train.learn.shares import Shares
from train.learn.speed import batch_flops, step_flops
from train.learn.step import _sums, looks_only
from train.models.decoder import init
from train.models.loss import Compute, objective_sums
from train.models.open import random_config
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

CONFIG = random_config({
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
})  # fmt: skip
HOW = Compute()
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.3, "smoothing": 0.1},
    "ipo": {"name": "ipo", "length_normalised": True},
    "orpo": {"name": "orpo"},
    "cpo": {"name": "cpo", "beta": 0.2},
    "aft": {"name": "aft", "constraint": "boundary", "beta": 0.3},
    "aft detached": {"name": "aft"},
}


def config_of(objective, **changes) -> Sft:
    return build(Sft, {"objective": objective, "batch": 6, "micro_batch": 3, "max_length": 64, **changes}, "sft")


def examples():
    """Five pairs, so that a batch of six is filled up; prompts and answers of several lengths, one weight of 0.5."""
    draw = np.random.default_rng(0)
    made = []
    for prompt, chosen, rejected in ((30, 5, 9), (12, 1, 7), (25, 12, 1), (31, 3, 3), (20, 8, 4)):
        start, better, worse = (draw.integers(3, 64, n).tolist() for n in (prompt, chosen, rejected))
        made.append({"tokens": start + better, "prompt_length": prompt, "rejected": start + worse, "reward": 1.0})
    made[3]["weight"] = 0.5
    return made


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


def referenced(config, rows, reference) -> Any:
    if not config.objective.reference_model():
        return rows
    return with_reference(CONFIG, reference, rows, config, HOW, mesh=make_mesh(Mesh()))


def first_of(config, rows):
    return {name: jnp.asarray(x) for name, x in next(batches(rows, config, seed=3)).items()}


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-6)
    assert float(found[0][1]["weight"]) == float(wanted[0][1]["weight"])
    for name, value in wanted[0][1]["metrics"].items():
        np.testing.assert_allclose(found[0][1]["metrics"][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(*(jax.tree.leaves(side[1]) for side in (found, wanted)), strict=True):
        assert float(jnp.linalg.norm(a - b)) < 2e-6 * float(jnp.linalg.norm(b))


@pytest.fixture(scope="module")
def either(params):
    """Loss and gradient of a batch whose answers have rows of their own, and of one whose answers share them.

    Each is a function of how much every objective counts, so that one program is compiled and not one an objective.
    """
    objectives: list[Any] = [config_of(options).objective.loss for options in OBJECTIVES.values()]
    config, other = config_of(OBJECTIVES["dpo"]), jax.tree.map(lambda w: w * 1.05, params)

    @jax.jit
    def run(params, batch, shares, kl):
        def of(logps, weights, beside):
            told = [loss(logps, weights, beside) for loss in objectives]
            loss = sum((c * one for c, (one, *_) in zip(shares, told, strict=True)), jnp.float32(0))
            return loss, told[0][1], told[0][2]

        def mean(params):
            loss, weight, metrics = objective_sums(CONFIG, params, batch, HOW, of, near=(other, kl))
            return loss / weight, {"weight": weight, "metrics": metrics}

        return jax.value_and_grad(mean, has_aux=True)(params)

    apart = rows_of(examples(), config)
    shared = with_shared_prompts(CONFIG, apart, config, HOW)
    assert isinstance(shared, Forked)
    given = [first_of(config, referenced(config, rows, other)) for rows in (apart, shared)]
    return [functools.partial(run, params, batch) for batch in given]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_rows_of_one_answer(name, either):
    """With a pair of half the weight and a pair that only fills up; for one of them a divergence is added."""
    given = [jnp.float32(other == name) for other in OBJECTIVES], jnp.float32(0.1 * (name == "orpo"))
    wanted, found = (run(*given) for run in either)
    assert 4 < float(wanted[0][1]["weight"]) < 5
    assert_same(found, wanted)


def test_a_row_holds_the_prompt_once_and_both_answers():
    config = config_of(OBJECTIVES["orpo"])
    rows: Any = with_shared_prompts(CONFIG, rows_of(examples(), config), config, HOW)
    batch = rows.take(np.array([2, 3]), 0)
    pair = examples()[2]
    # The prompt and the answers without their last tokens, of which one is a single token: 25 + 11 + 0.
    assert batch["tokens"][0, :36].tolist() == pair["tokens"][:-1]
    assert not batch["segments"][0, 36:].any()
    assert [a[:n].tolist() for a, n in zip(batch["answers"][0], (12, 1), strict=True)] == [
        pair["tokens"][25:], pair["rejected"][25:],
    ]  # fmt: skip
    assert batch["sources"][0, :13].tolist() == [*range(24, 36), 24]
    assert batch["weights"].max(axis=-1).tolist() == [[1, 1], [0.5, 0.5]]
    assert batch["tokens"].shape == (2, 48)
    assert rows.summary() == rows_of(examples(), config).summary()
    assert batch_flops(CONFIG, batch) == step_flops(CONFIG, 2, 48, batch["sources"].size)


def test_what_keeps_rows_of_its_own_says_why(capsys):
    config = config_of(OBJECTIVES["dpo"])
    pairs = examples()

    def said(examples, config=config, how=HOW):
        rows = rows_of(examples, config)
        assert with_shared_prompts(CONFIG, rows, config, how) is rows
        return capsys.readouterr().out + capsys.readouterr().err

    other = [{**pairs[0], "rejected": [4, *pairs[0]["rejected"][1:]]}, *pairs[1:]]
    assert other[0]["rejected"][0] != pairs[0]["rejected"][0]
    assert "the answers of 1 pairs follow different prompts" in said(other)
    bare = [{"tokens": [5, 6], "prompt_length": 0, "rejected": [7]}, *pairs]
    assert "a pair has no prompt" in said(bare)
    long = [{"tokens": [5] + [6] * 40, "prompt_length": 1, "rejected": [5] + [7] * 40}]
    assert "take no fewer operations here" in said(long)
    assert "splash attention knows segments" in said(pairs, how=Compute(attention="splash"))
    assert "kto learns one answer of a row" in said(pairs, config_of({"name": "kto"}))
    assert said(pairs, config_of(OBJECTIVES["dpo"], share_prompts=False)) == ""
    rows = rows_of(pairs, config)
    assert with_shared_prompts(CONFIG, rows, config, HOW) is not rows
    assert "prompts are computed once for both answers: rows of 48 tokens in place of two of" in capsys.readouterr().out


def test_a_loss_of_micro_batches_says_that_it_keeps_rows_of_one_answer(capsys):
    shares = Shares(make_mesh(Mesh()), Sft(batch=8, micro_batch=4))
    drawing: Any = None
    assert sharing_of(CONFIG, Policy(normalise="bnpo"), drawing, HOW, shares) is None
    assert "improver.normalise=bnpo" in capsys.readouterr().out
    assert sharing_of(CONFIG, Policy(normalise="bnpo", share_prompts=False), drawing, HOW, shares) is None
    assert capsys.readouterr().out == ""


# --- sequences that are only looked at ---


@pytest.mark.parametrize("objective", [{"name": "kto", "beta": 0.3}, {"name": "aft"}], ids=str)
def test_a_sequence_without_a_gradient_needs_no_backward_pass(objective, params, monkeypatch):
    """The same values and gradients as of the whole batch, with a third fewer operations."""
    config = config_of(objective, share_prompts=False)
    rows: Any = rows_of([e | {"reward": (-1.0) ** i} for i, e in enumerate(examples())], config)
    batch = first_of(config, referenced(config, rows, jax.tree.map(lambda w: w * 1.05, params)))
    assert looks_only(CONFIG, batch, config, None)

    def program():
        def mean(params):
            loss, others = _sums(CONFIG, params, batch, HOW, config, None, None)
            return loss / others["weight"], others

        return jax.jit(jax.value_and_grad(mean, has_aux=True)).lower(params).compile()

    ours = program()
    monkeypatch.setattr("train.learn.step.looks_only", lambda *given: False)
    whole = program()
    assert_same(ours(params), whole(params))
    few, many = (p.cost_analysis() for p in (ours, whole))
    assert few is not None
    assert many is not None
    assert few["flops"] < 0.8 * many["flops"]


def test_others_read_the_second_sequence_too(params):
    config = config_of({"name": "kto"})
    batch = first_of(config, rows_of(examples(), config))
    assert not looks_only(CONFIG, batch, config, (params, 0.1))
    dropped = dataclasses.replace(config, lora=build(Sft, {"lora": {"dropout": 0.1}}, "sft").lora)
    assert not looks_only(CONFIG, batch, dropped, None)
    assert not looks_only(CONFIG, batch, config_of(OBJECTIVES["aft"]), None)
