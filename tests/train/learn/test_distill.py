"""Distillation: divergences and their limits, the teacher in the step, and a student that converges."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.sft_cases import SIZES, InMemory, Killed, assert_bits, kill_after, tune

from train.cli import __main__ as cli
from train.learn import step as steps
from train.learn.batches import to_rows
from train.learn.distill import Distill, ForwardKL, GeneralisedJSD, ReverseKL, SkewedKL, SkewedReverseKL
from train.learn.settings import Sft
from train.learn.teacher import check_vocabulary, first_difference, open_teacher
from train.log import UserError
from train.models.characters import PAD_ID
from train.models.config import Lora
from train.models.decoder import forward
from train.models.loss import Compute, Teacher, loss_sums, objective_sums
from train.models.open import random_model
from train.models.settings import Source
from train.resolve import build

V = 7
EVERY = {
    "reverse": ReverseKL(),
    "forward": ForwardKL(),
    "skewed": SkewedKL(alpha=0.3),
    "skewed_reverse": SkewedReverseKL(alpha=0.3),
    "jsd": GeneralisedJSD(beta=0.2),
}


def kl(a, b):
    return float((a * np.log(a / b)).sum())


def mixed(share, a, b):
    return share * a + (1 - share) * b


FORMULAS = {
    "reverse": lambda p, q: kl(p, q),
    "forward": lambda p, q: kl(q, p),
    "skewed": lambda p, q: kl(q, mixed(0.3, q, p)),
    "skewed_reverse": lambda p, q: kl(p, mixed(0.3, p, q)),
    "jsd": lambda p, q: 0.2 * kl(q, mixed(0.2, q, p)) + 0.8 * kl(p, mixed(0.2, q, p)),
}


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", EVERY)
def test_a_divergence_and_its_gradient_are_the_formula(name, temperature):
    """The gradient by the student's logits, against central differences of the formula in float64."""
    random = np.random.default_rng(0)
    z, z_0 = random.normal(size=V), random.normal(size=V)
    apart = Distill(divergence=EVERY[name], temperature=temperature).apart

    def wanted(z):
        return FORMULAS[name](softmax(z / temperature), softmax(z_0 / temperature))

    def found(z):
        return apart(jax.nn.log_softmax(z), jax.nn.log_softmax(jnp.asarray(z_0, jnp.float32)), jnp.int32(0))

    value, slopes = jax.value_and_grad(found)(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(value, wanted(z), rtol=1e-5)
    steps = 1e-5 * np.eye(V)
    np.testing.assert_allclose(slopes, [(wanted(z + h) - wanted(z - h)) / 2e-5 for h in steps], atol=2e-6)


def test_known_values_and_limits():
    """KL of a coin (3/4, 1/4) and a fair one; JSD(β)/β and JSD(β)/(1 − β) at the ends; skewed KL stays below −log α."""
    p, q = jnp.log(jnp.array([0.75, 0.25])), jnp.log(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(ReverseKL()(p, q, 0), 0.75 * np.log(1.5) + 0.25 * np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(ForwardKL()(p, q, 0), -0.5 * np.log(0.75), rtol=1e-6)
    np.testing.assert_allclose(GeneralisedJSD(beta=1e-3)(p, q, 0) / 1e-3, ForwardKL()(p, q, 0), rtol=5e-3)
    np.testing.assert_allclose(GeneralisedJSD(beta=1 - 1e-3)(p, q, 0) / 1e-3, ReverseKL()(p, q, 0), rtol=5e-3)
    never = jnp.array([0.0, -1e4])
    assert float(ForwardKL()(never, q, 0)) > 1000
    assert float(SkewedKL(alpha=0.1)(never, q, 0)) < -np.log(0.1)
    np.testing.assert_allclose(SkewedKL(alpha=1e-6)(p, q, 0), ForwardKL()(p, q, 0), rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_equal_models_have_no_loss_and_no_gradient(model, rows, name):
    batch = {key: jnp.asarray(value) for key, value in rows.take(np.arange(4), 0).items()}
    teacher = Teacher(model.config, model.params, Compute(), Distill(divergence=EVERY[name]).apart)
    found, slopes = jax.jit(
        jax.value_and_grad(lambda params: loss_sums(model.config, params, batch, teacher=teacher)[0])
    )(model.params)
    assert abs(float(found)) < 1e-4
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes)) < 1e-4


@pytest.fixture(scope="module")
def larger(mesh):
    """A teacher of other sizes over the same symbols, whose matrix for the logits has rows that are no token's."""
    found = random_model({**SIZES, "hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 72}, mesh, seed=5)
    return dataclasses.replace(found, params=jax.tree.map(lambda x: 3 * x, found.params))


@functools.partial(jax.jit, static_argnums=0)
def log_p(config, params, tokens):
    """Of the 64 symbols, at every token."""
    return jax.nn.log_softmax(forward(config, params, tokens)[..., :64])


@pytest.mark.parametrize("at_once", [16, 4096])
def test_a_larger_teacher_and_tokens_that_are_not_learnt(model, larger, rows, at_once):
    """The sum is that over the learnt tokens alone of whole distributions written out; so is the gradient."""
    batch = {key: jnp.asarray(value) for key, value in rows.take(np.arange(4), 0).items()}
    how, apart = Compute(logits_at_once=at_once), Distill(divergence=EVERY["jsd"]).apart
    teacher = Teacher(larger.config, larger.params, how, apart)
    q = log_p(larger.config, larger.params, batch["tokens"])[:, :-1]

    def written_out(params):
        p = log_p(model.config, params, batch["tokens"])[:, :-1]
        return jnp.sum(batch["weights"][:, 1:] * apart(p, q, None))

    def found_out(params):
        return loss_sums(model.config, params, batch, how, teacher=teacher)

    wanted, d_wanted = jax.jit(jax.value_and_grad(written_out))(model.params)
    (found, weight), d_found = jax.jit(jax.value_and_grad(found_out, has_aux=True))(model.params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert weight == batch["weights"].sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), d_found, d_wanted)


def test_a_share_of_the_loss_is_the_divergence(model, larger, rows):
    batch = {key: jnp.asarray(value) for key, value in rows.take(np.arange(4), 0).items()}

    def loss(share, objective=None):
        teacher = share and Teacher(larger.config, larger.params, Compute(), Distill().apart, share)
        if objective is None:
            return float(jax.jit(lambda p: loss_sums(model.config, p, batch, teacher=teacher or None)[0])(model.params))
        found = jax.jit(
            lambda p: objective_sums(model.config, p, batch, Compute(), objective, teacher=teacher or None)[:2]
        )(model.params)
        return float(found[0] / found[1])

    def halved(logps, weights, beside):
        assert not beside
        return -(weights * logps).sum() / 2, weights.sum() / 2, {}

    tokens = float(batch["weights"].sum())
    plain, apart = loss(0.0), loss(1.0)
    np.testing.assert_allclose(loss(0.25), 0.75 * plain + 0.25 * apart, rtol=1e-5)
    np.testing.assert_allclose(loss(0.25, halved), (0.75 * plain + 0.25 * apart) / tokens, rtol=1e-5)


def test_a_teacher_may_read_another_prompt_before_the_same_completion(model, larger):
    """Row 0 has a longer prompt for the teacher, row 1 the same: D is that at the completion's tokens."""
    rng = np.random.default_rng(3)
    prompts, shown = [[5, 6, 7], [8, 9]], [[11, 12, 13, 14, 5, 6, 7], [8, 9]]
    completions = [rng.integers(2, 60, 4).tolist(), rng.integers(2, 60, 3).tolist()]

    def arrays(prompts, length):
        tokens, weights, targets = (
            np.zeros((2, length), np.int32),
            np.zeros((2, length), np.float32),
            np.zeros((2, 8), np.int32),
        )
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            places = np.arange(len(prompt), len(prompt) + len(completion))
            tokens[i, : places[-1] + 1] = prompt + completion
            weights[i, places] = 1.0
            targets[i, : len(places)] = places
        return tokens, weights, targets

    ours, theirs = arrays(prompts, 17), arrays(shown, 33)
    names = ("tokens", "weights", "targets")
    batch = dict(zip(names, map(jnp.asarray, ours), strict=True))
    batch |= dict(zip(map("teacher_{}".format, names), map(jnp.asarray, theirs), strict=True))
    apart = Distill().apart
    teacher = Teacher(larger.config, larger.params, Compute(), apart)
    found, weight = jax.jit(lambda p: loss_sums(model.config, p, batch, teacher=teacher))(model.params)
    wanted = 0.0
    p, q = (log_p(m.config, m.params, read[0]) for m, read in ((model, ours), (larger, theirs)))
    for i, completion in enumerate(completions):
        before, before_0 = len(prompts[i]) - 1, len(shown[i]) - 1
        n = len(completion)
        wanted += float(apart(p[i, before : before + n], q[i, before_0 : before_0 + n], None).sum())
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert weight == 7


# --- in a run ---

RANDOM = Source(random={**SIZES, "hidden_size": 48})
TAUGHT = Sft(learning_rate=1e-2, epochs=20, batch=16, max_length=96, distill=Distill(teacher=RANDOM))


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()])
def test_a_student_converges_to_its_teacher(model, mesh, examples, divergence):
    """A few rows and a teacher of other sizes: half of the divergence is gone in forty updates."""
    config = dataclasses.replace(TAUGHT, distill=dataclasses.replace(TAUGHT.distill, divergence=divergence))
    teacher = open_teacher(config.distill, model, mesh, seed=3)
    head = {**teacher.params["lm_head"], "weight": 20 * teacher.params["lm_head"]["weight"]}
    sharp = dataclasses.replace(teacher, params={**teacher.params, "lm_head": head})
    _, log = tune(model, to_rows(examples, config, PAD_ID), config, mesh, teacher=sharp)
    assert log[0]["loss"] > 0.2
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


SELF = dataclasses.replace(TAUGHT, epochs=2, batch=8, distill=Distill(ema=0.9))


def test_the_average_teaches_and_the_student_is_returned(model, rows, mesh):
    """The first update has nothing to learn from itself; the average follows at its own rate, from the first one on."""
    config = dataclasses.replace(
        SELF, step=dataclasses.replace(SELF.step, weight_decay=0.0), distill=Distill(ema=0.9, share=0.5)
    )
    make = steps.make_step(model.config, config, "float32")
    state = steps.init_state(config, model.params, mesh)
    batch = {key: jnp.asarray(value) for key, value in rows.take(np.arange(8), 0).items()}
    before = jax.tree.map(np.array, state.params)
    state, first = make(state, batch, np.float32(1e-2), np.float32(steps.optim.ema_keep(config, 0)))
    after = jax.tree.map(np.array, state.params)
    jax.tree.map(
        lambda a, p, b: np.testing.assert_allclose(a, 0.9 * b + 0.1 * p, rtol=1e-5, atol=1e-7),
        state.average, after, before,
    )  # fmt: skip
    plain = float(jax.jit(loss_sums, static_argnums=0)(model.config, model.params, batch)[0])
    np.testing.assert_allclose(first["loss"], 0.5 * plain, rtol=1e-4)  # D = 0: student and teacher are equal
    assert_bits(jax.tree.map(np.array, steps.result(state, config)), after)
    kept = dataclasses.replace(config, distill=None, step=dataclasses.replace(config.step, ema=0.9))
    assert_bits(steps.result(state, kept), state.average)


def test_the_average_that_teaches_is_resumed_bit_for_bit(model, rows, mesh):
    config = dataclasses.replace(SELF, distill=Distill(ema=0.9, share=0.5), checkpoint_every=3)
    undisturbed, _ = tune(model, rows, config, mesh)
    memory = InMemory()
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=memory, on_step=kill_after(5))
    tuned, _ = tune(model, rows, config, mesh, checkpoints=memory)
    assert_bits(tuned, undisturbed)


def test_an_adapter_teaches_itself(model, rows, mesh):
    """With LoRA the average is the adapter's: at the start no loss, later some."""
    config = dataclasses.replace(SELF, lora=Lora(rank=2, dropout=0.0), distill=Distill(ema=0.9, share=1.0))
    _, log = tune(model, rows, config, mesh)
    assert abs(log[0]["loss"]) < 1e-6


def test_one_average_is_kept():
    with pytest.raises(UserError, match=r"step\.ema"):
        build(Sft, {"distill": {}, "step": {"ema": 0.9}})
    with pytest.raises(UserError, match=r"must lie in \(0, 1\)"):
        build(Sft, {"distill": {"divergence": {"name": "jsd", "beta": 1.0}}})


def test_another_vocabulary_is_refused_by_its_first_token(model, larger):
    from tokenizers import Tokenizer as Backend

    text = json.loads(model.tokenizer.backend.to_str())
    vocabulary = text["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    other = dataclasses.replace(model.tokenizer, backend=Backend.from_str(json.dumps(text)))
    assert first_difference(model.tokenizer, larger.tokenizer) is None
    with pytest.raises(UserError, match=r"token 9 is '8' to the teacher and '7' to the student"):
        check_vocabulary(model, dataclasses.replace(larger, tokenizer=other), where="sft.distill.teacher=there")


# --- through the verb ---

ROWS = [row for row in yaml.safe_load((ROOT / "docs/methods/distillation.yaml").read_text()) if row["verb"] == "sft"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A config of `sft` with a tiny model and eight sums."""
    place = tmp_path_factory.mktemp("distilled")
    lines = ({"prompt": f"{i}+1?", "completion": f"#{i + 1}"} for i in range(8))
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"model": {"random": SIZES}, "data": {"path": str(place / "data.jsonl")}, "sft": {"epochs": 1, "batch": 8}}
    (place / "config.yaml").write_text(json.dumps(config))
    return ["sft", str(place / "config.yaml")]


@pytest.fixture(scope="module")
def teacher(words, tmp_path_factory):
    """A folder of Hugging Face with a model of other sizes."""
    out = tmp_path_factory.mktemp("teacher")
    assert cli.main([*words, f"model.random={json.dumps({**SIZES, 'hidden_size': 48})}", f"out={out}"]) == 0
    return out / "hf"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_row_of_the_map_trains(row, words, teacher, tmp_path):
    keys = [key.replace("MODEL", str(teacher)) for key in row["keys"]]
    assert cli.main([*words, f"out={tmp_path}", *keys]) == 0
    (log,) = tmp_path.glob("**/steps.jsonl")
    (step,) = map(json.loads, log.read_text().splitlines())
    assert step["loss"] > 0
    assert step["gradient_norm"] > 0


def test_the_verb_has_no_samples_for_a_student_that_teaches_itself(words, tmp_path, capsys):
    assert cli.main([*words, f"out={tmp_path}", "sft.distill={}"]) == 2
    assert "in a method of improve with improver: distill" in capsys.readouterr().err
