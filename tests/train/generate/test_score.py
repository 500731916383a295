"""Log-probabilities of continuations: a teacher-forced pass, whatever else is in the batch."""

import math

import jax
import numpy as np
import pytest

from train.evaluate.choices import choose, summary
from train.generate.score import STEPS, TOKENS_AT_ONCE, arrays, by_length, encode_pair, score
from train.log import UserError
from train.models.decoder import forward
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.tasks.task import Question

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(SIZES, make_mesh(Mesh()), seed=0)


@pytest.fixture(scope="module")
def pairs():
    r = np.random.default_rng(0)
    sizes = [(1, 1), (5, 3), (30, 2), (3, 40), (63, 1), (12, 12), (1, 64), (7, 3), (9, 1)]
    return [tuple(r.integers(2, 64, n).tolist() for n in pair) for pair in sizes]


def teacher_forced(model, pairs):
    """(log-probability, greedy) of each pair by a plain forward pass over whole right-padded rows."""
    tokens = np.zeros((len(pairs), 66), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        tokens[row, : len(context) + len(continuation)] = context + continuation
    logits = jax.jit(forward, static_argnums=0)(model.config, model.params, tokens)
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row, (context, continuation) in enumerate(pairs):
        at = np.arange(len(context), len(context) + len(continuation))
        yield logp[row, at - 1, tokens[row, at]].sum(), bool((logp[row, at - 1].argmax(-1) == tokens[row, at]).all())


def test_scores_equal_a_teacher_forced_pass_in_any_company(model, pairs):
    together = score(model.config, model.params, pairs)
    for (logprob, greedy), found in zip(teacher_forced(model, pairs), together, strict=True):
        assert found.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
        assert found.greedy == greedy
    (alone,) = score(model.config, model.params, pairs[3:4])
    assert alone.logprob == pytest.approx(together[3].logprob, rel=1e-6)


def test_greedy_is_what_greedy_decoding_writes(model, pairs):
    context = list(pairs[5][0])
    written = []
    for _ in range(3):
        written.append(
            int(np.asarray(forward(model.config, model.params, np.array([context + written])))[0, -1].argmax())
        )
    other = [*written[:-1], (written[-1] + 1) % 64]
    found = score(model.config, model.params, [(context, written), (context, other)])
    assert [s.greedy for s in found] == [True, False]


def test_every_pair_is_in_one_batch_of_few_shapes(pairs):
    r = np.random.default_rng(1)
    many = [([1] * a, [2] * b) for a, b in zip(r.integers(1, 900, 700), r.integers(1, 100, 700), strict=True)]
    batches = list(by_length(many))
    assert sorted(i for b in batches for i in b) == list(range(700))
    shapes = {tuple(array.shape for array in arrays(many, batch)) for batch in batches}
    assert len(shapes) < 12
    for tokens, targets, _ in (arrays(many, batch) for batch in batches):
        assert tokens.size <= 2 * TOKENS_AT_ONCE
        assert {tokens.shape[1] - 1, targets.shape[1]} <= set(STEPS)


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(UserError, match="sequence 1: 0 tokens before 1"):
        score(model.config, model.params, [([1], [2]), ([], [2])])
    with pytest.raises(UserError, match="sequence 0 has 66 tokens, and the model ends at 64"):
        score(model.config, model.params, [([1] * 60, [2] * 6)])


def test_a_pair_is_split_where_the_context_ends(model):
    head, tail = encode_pair(model.tokenizer, "1+1= ", "2")
    assert model.tokenizer.decode(head) == "1+1="
    assert model.tokenizer.decode(tail) == " 2"


def test_choices_are_scored_as_they_are_and_by_length(model):
    questions = [
        Question(f"q{i}", "choice", "id", "test", "", gold, None, {"question": f"{i}+{i}?", "choices": choices})
        for i, (gold, choices) in enumerate([("A", ["3", "a long choice"]), ("B", ["a long choice", "3"])])
    ]
    rows = choose(model, questions)
    logprobs = [row["logprobs"] for row in rows]
    assert all(short > long for short, long in (logprobs[0], logprobs[1][::-1]))
    assert [row["acc"] for row in rows] == [1.0, 1.0]
    # Divided by its length, a choice of 13 symbols is judged by the symbol.
    expected = [float((a / 1 > b / 13) == (gold == "A")) for (a, b), gold in ((logprobs[0], "A"),)]
    assert [rows[0]["acc_norm"]] == expected
    found = summary(rows)
    assert found["acc"]["accuracy"] == 1.0
    assert found["acc"]["n"] == 2
    assert found["acc_norm"]["accuracy"] == sum(r["acc_norm"] for r in rows) / 2
    assert math.isfinite(sum(map(sum, logprobs)))
