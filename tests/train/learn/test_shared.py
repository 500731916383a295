"""Answers that share their prompt's row: the log-probabilities, losses and gradients of rows of one answer each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.policies import COURSE, group_of

from train.learn.policy import Policy
from train.learn.settings import Sft
from train.learn.shared import Layout, Sharing
from train.models.decoder import init
from train.models.loss import Compute, objective_sums, token_logps
from train.models.open import random_config

CONFIG = random_config({
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
})  # fmt: skip
SHARING = Sharing(CONFIG, size=8, parts=1, ways=1, longest=12)
LONG = tuple(range(3, 40))
OPTIONS = [
    {"normalise": "dapo"},
    {"normalise": "grpo", "beta": 0.3, "clip_low": 0.1, "clip_high": 0.28, "importance_cap": 1.2},
    {"normalise": "dr_grpo", "advantage": "leave_one_out"},
    {"normalise": "bnpo", "advantage": "mean"},
]


def groups():
    """Two questions: four answers, of which one could not be judged, one is a token long and one was cut short."""
    first = group_of([1.0, 0.0, np.nan, 0.5], lengths=(3, 12, 5, 1), reasons=("eos", "length", "eos", "eos"))
    return [first._replace(prompt=LONG), group_of([1.0, 0.0, 0.0, 1.0], question=1, seed=1, lengths=(4, 2, 7, 3))]


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def logps(params):
    """`Course.logps`, slightly off under `student`, so that ratios are on both sides of every clip."""
    run = jax.jit(lambda batch: token_logps(CONFIG, params, batch, Compute(attention="tiled")))

    def found(model, batch, rows=0):
        del rows
        values = np.asarray(run({k: v for k, v in batch.items() if k != "advantages"}))
        return np.where(batch["weights"] > 0, values + model * np.sin(40 * values), 0).astype(np.float32)

    return found


def lessons(logps, options, several=False):
    course = COURSE._replace(logps=logps, reference=0.3, student=0.2, several=several)
    policy = Policy(**options)
    apart = policy.lesson(groups(), course)
    shared = policy.lesson(groups(), course._replace(sharing=SHARING))
    assert (apart.rows, shared.rows) == (0, 2)
    assert apart.batch is not None
    assert shared.batch is not None
    assert shared.batch["tokens"].shape == (2, 64)
    assert apart.metrics == shared.metrics
    return apart.batch, shared.batch


def test_a_loss_and_its_gradient_are_those_of_unshared_rows(params, logps):
    objective = Policy(normalise="grpo").objective(COURSE.drawing).loss

    def mean(params, batch):
        loss, weight, metrics = objective_sums(CONFIG, params, batch, Compute(attention="tiled"), objective)
        return loss / weight, metrics

    (wanted, theirs), (found, ours) = (
        jax.jit(jax.value_and_grad(mean, has_aux=True))(params, batch) for batch in lessons(logps, OPTIONS[1])
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert float(jnp.linalg.norm(a - b)) < 2e-6 * float(jnp.linalg.norm(b))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_loss_is_the_same_function_of_the_log_probabilities(logps, options):
    """With ratios on both sides of every clip, a divergence, importance ratios."""
    loss = Policy(**options).objective(COURSE.drawing).loss
    apart, shared = lessons(logps, options, True)
    given = {k: v[:, 1:] if v.shape == apart["tokens"].shape else v for k, v in apart.items()}

    def of(batch):
        def sums(logps):
            value, weight, metrics = loss(logps, batch["weights"], batch)
            return value, (weight, metrics)

        (value, (weight, metrics)), slope = jax.value_and_grad(sums, has_aux=True)(jnp.asarray(batch["old"] * 1.1))
        return value, slope[batch["weights"] > 0], weight, metrics

    (value, slope, weight, metrics), wanted = of(shared), of(given)
    assert float(weight) == float(wanted[2])
    np.testing.assert_allclose(value, wanted[0], rtol=2e-6)
    np.testing.assert_allclose(slope, wanted[1], rtol=2e-5, atol=1e-6)  # both in the order of the answers
    for name, told in wanted[3].items():
        np.testing.assert_allclose(metrics[name], told, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_row_holds_a_prompt_once_and_its_answers_in_their_order(logps):
    apart, shared = lessons(logps, {"overlong": "mask"})
    first = shared["tokens"][0]
    samples = groups()[0].samples
    assert first[: len(LONG)].tolist() == list(LONG)
    # The second was cut short and the third not judged; the last token of an answer predicts nothing.
    assert first[37:39].tolist() == list(samples[0].tokens[:2])
    assert not shared["segments"][0, 39:].any()
    assert shared["answers"][0, 0, :3].tolist() == list(samples[0].tokens)
    assert shared["sources"][0, :4].tolist() == [36, 37, 38, 36]  # each answer begins at the prompt's end
    assert shared["weights"].sum(axis=-1).tolist() == [[3, 0, 0, 1], [4, 2, 7, 3]]
    np.testing.assert_array_equal(shared["advantages"].reshape(-1), apart["advantages"])
    np.testing.assert_array_equal(shared["rows"], np.ones((2, 4)))
    np.testing.assert_array_equal(shared["sampled"][1, 2, :7], np.array(groups()[1].samples[2].logprobs, np.float32))


def test_rows_are_those_that_take_the_fewest_operations():
    """Short answers share one row; long ones, whose squares of a row grow, fewer or none."""
    prompt, other = tuple(range(60)), tuple(range(1, 61))
    short, long = (0,) * 10, (0,) * 20_000
    wide = dataclasses.replace(SHARING, model=dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=1024))
    assert wide.layout([(prompt, short)] * 8) == Layout(8, 1, 160, 128)  # 60 + 8·9 in steps of 32; 60 − 8 have 1
    assert wide.layout([(prompt, long)] * 8) is None
    assert wide.layout([(prompt, short), (other, short)] * 4) is None  # nothing is shared
    # An update of eight answers has groups of 6 and 2, then 4 and 2; of two micro-batches each has as many rows.
    pairs = [(prompt, short)] * 6 + [(other, short)] * 6 + [(prompt, short)] * 2
    layout = dataclasses.replace(wide, parts=2).layout(pairs)
    assert layout is not None
    assert (layout.answers, layout.rows) == (6, 2)
    batch = SHARING.batch(pairs, layout, 0, sampled=[short] * 14)
    assert (batch["weights"].sum(axis=-1) > 0).sum(axis=-1).tolist() == [6, 2, 4, 2]


def test_lengths_of_rows_are_few():
    assert len({SHARING.rows_of([(LONG, (0,) * n)] * 8, 8).length for n in range(1, 129)}) == 16


def test_a_loss_of_micro_batches_keeps_its_rows():
    """bnpo is a mean over micro-batches: which answers are in one decides."""
    assert Policy(normalise="bnpo").shares(Sft(batch=8))
    assert not Policy(normalise="bnpo").shares(Sft(batch=8, micro_batch=4))
    assert Policy(normalise="dapo").shares(Sft(batch=8, micro_batch=4))
    assert not Policy(share_prompts=False).shares(Sft())
