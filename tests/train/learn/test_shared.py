"""Answers that share their prompt's row: the log-probabilities, losses and gradients of rows of one answer each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.policies import COURSE, group_of

from train.generate.settings import Settings
from train.learn.on_policy import sharing_of
from train.learn.policy import Policy
from train.learn.rollouts import parts
from train.learn.settings import Sft, Stay
from train.learn.shared import Layout, Sharing
from train.learn.shares import Shares
from train.log import UserError
from train.models.config import Lora
from train.models.decoder import init
from train.models.loss import Compute, objective_sums, token_logps
from train.models.open import random_config
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

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


# --- samples without an advantage ---


def equal_and_other_groups():
    """Of four answers each: a group that is all right, two whose rewards differ, one that is all wrong."""
    rewards = [1.0] * 4, [1.0, 0.0, 0.0, 0.5], [0.0, 1.0, np.nan, 1.0], [0.0] * 4
    found = [group_of(r, question=q % 3, seed=q, lengths=(3 + q, 9, 5, 1)) for q, r in enumerate(rewards)]
    return [g._replace(prompt=LONG[q:]) for q, g in enumerate(found)]


def whole_and_skipped(options, size, course=COURSE):
    sharing = dataclasses.replace(SHARING, size=size)
    whole, skipped = (
        Policy(**options, skip_equal=skips).lesson(
            equal_and_other_groups(), course._replace(sharing=dataclasses.replace(sharing, skips=skips))
        )
        for skips in (False, True)
    )
    assert whole.metrics == skipped.metrics
    return whole, skipped


@pytest.mark.parametrize("normalise", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_samples_without_an_advantage_leave_the_loss_as_it_is(logps, normalise):
    course = COURSE._replace(logps=logps, student=0.2, several=True)
    loss = Policy(normalise=normalise).objective(COURSE.drawing).loss
    found = []
    for lesson in whole_and_skipped({"normalise": normalise, "advantage": "mean"}, 16, course):
        batch: Any = lesson.batch

        def sums(logps, batch=batch):
            value, weight, _ = loss(logps, batch["weights"], batch)
            return value, weight

        (value, weight), slope = jax.value_and_grad(sums, has_aux=True)(jnp.asarray(batch["old"] * 1.1))
        found.append((value, weight, np.sort(slope[slope != 0])))
    (value, weight, slope), skipped = found
    assert float(skipped[1]) == float(weight)
    np.testing.assert_allclose(skipped[0], value, rtol=1e-6)
    np.testing.assert_allclose(skipped[2], slope, rtol=1e-6)


def test_updates_without_those_samples_are_the_same_and_computed_in_fewer_rows(params):
    """Each of two updates has a group to learn from and one that is all right, or all wrong."""
    objective = Policy().objective(COURSE.drawing).loss

    @jax.jit
    def gradient(batch):
        def total(params):
            return objective_sums(CONFIG, params, batch, Compute(), objective)[:2]

        return jax.value_and_grad(total, has_aux=True)(params)

    whole, skipped = whole_and_skipped({}, 8)
    assert (whole.rows, skipped.rows) == (2, 1)
    assert whole.batch is not None
    assert skipped.batch is not None
    assert skipped.batch["absent"].tolist() == [18, 21]  # 3 + 9 + 5 + 1, 6 + 9 + 5 + 1
    for update in range(2):
        found = []
        for made, rows in ((whole.batch, whole.rows), (skipped.batch, skipped.rows)):
            batch = parts(made, rows)[update]
            (loss, weight), slopes = gradient({k: jnp.asarray(v) for k, v in batch.items()})
            found.append((loss / weight, jax.tree.map(lambda g, by=weight: g / by, slopes)))
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
        for a, b in zip(*(jax.tree.leaves(side[1]) for side in found), strict=True):
            assert float(jnp.linalg.norm(a - b)) < 2e-6 * float(jnp.linalg.norm(b))


def test_a_step_without_any_other_sample_still_makes_its_updates():
    """Moments of an optimizer move without a gradient, too."""
    groups = [g._replace(rewards=np.ones(4)) for g in equal_and_other_groups()]
    course = COURSE._replace(sharing=dataclasses.replace(SHARING, skips=True, parts=2))
    lesson = Policy(skip_equal=True).lesson(groups, course)
    assert lesson.batch is not None
    assert len(parts(lesson.batch, lesson.rows)) == 2
    assert not lesson.batch["advantages"].any()
    assert lesson.batch["rows"].reshape(2, -1).sum(axis=1).tolist() == [8, 8]
    tokens = sum(len(s.tokens) for g in groups for s in g.samples)
    assert lesson.batch["absent"].sum() + lesson.batch["weights"].sum() == tokens


def test_what_reads_every_sample_keeps_them(capsys):
    mesh, drawing = make_mesh(Mesh()), Settings(samples=4, temperature=1.0)

    def skips(config, **options):
        found = sharing_of(CONFIG, Policy(skip_equal=True, **options), drawing, Compute(), Shares(mesh, config))
        return found is not None and found.skips

    assert skips(Sft(batch=8))
    assert capsys.readouterr().out == ""
    assert not skips(Sft(batch=8, stay=Stay(kl=0.1)))
    assert "samples without an advantage are computed: sft.stay.kl" in capsys.readouterr().out
    assert not skips(Sft(batch=8, lora=Lora(dropout=0.1)))
    assert "sft.lora.dropout" in capsys.readouterr().out
    assert not skips(Sft(batch=8, micro_batch=4), normalise="bnpo")
    assert "and samples without an advantage are computed: with improver.normalise=bnpo" in capsys.readouterr().out
    refused: list[dict[str, Any]] = [{"beta": 0.1}, {"share_prompts": False}]
    for options in refused:
        with pytest.raises(UserError, match=r"m\.improver: skip_equal is true, beta is 0"):
            Policy(skip_equal=True, **options).check(drawing, {}, "m")
