"""Slots, refills and rollouts on a tiny model: what comes out depends on model, prompt and key alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.generate import engine as engines
from train.generate.engine import Decoding, Engine, bucket
from train.generate.rollout import Prompt, batched, fold_all, rollout, sample_keys
from train.generate.settings import Settings
from train.generate.slots import CHUNK, Request
from train.log import UserError
from train.models.characters import EOS_ID, encode
from train.models.decoder import forward, logprobs
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.35,
}  # fmt: skip
TEXTS = ("1", "12+7-5?", "g48,18?", "s31,5,12<?", "a?b", "23*47?", "t50,60?", "99-1+3-44?", "x" * 20, "0", "7*7?", "zz")
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    return random_model(SIZES, make_mesh(Mesh()), seed=3)


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(f"q{i}", tuple(encode(text))) for i, text in enumerate(TEXTS)]


def run(model, prompts, key=KEY, **settings):
    given = {"max_new_tokens": 12, "slots": 16, **settings}
    return rollout(model.config, model.params, model.tokenizer, prompts, Settings(**given), key)


@pytest.fixture(scope="module")
def greedy(model, prompts):
    return run(model, prompts)


@pytest.fixture(scope="module")
def sampled(model, prompts):
    """Four samples a prompt at T 1: 48 requests in 16 slots, so every slot is refilled."""
    return run(model, prompts, samples=4, temperature=1.0)


def assert_same(found, wanted):
    assert [(s.prompt_id, s.index, s.tokens, s.text, s.reason) for s in found] == [
        (s.prompt_id, s.index, s.tokens, s.text, s.reason) for s in wanted
    ]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def argmax_loop(model, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Greedy without a cache: one whole pass a token, at one padded length."""
    step = jax.jit(forward, static_argnums=0)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != EOS_ID):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(step(model.config, model.params, jnp.asarray(padded))[0, len(tokens) - 1].argmax()))
    return tuple(tokens[len(prompt) :])


# --- right ---


def test_greedy_equals_an_argmax_loop_without_cache(model, prompts, greedy):
    assert [s.tokens for s in greedy] == [argmax_loop(model, p.tokens, 12) for p in prompts]
    assert len({s.tokens for s in greedy}) > 6  # the model says different things to different prompts


def test_logprobs_equal_a_teacher_forced_pass(model, prompts, sampled):
    given = {p.id: p.tokens for p in prompts}
    tokens = np.zeros((len(sampled), 48), np.int32)
    for row, s in zip(tokens, sampled, strict=True):
        row[: len(given[s.prompt_id]) + len(s.tokens)] = given[s.prompt_id] + s.tokens
    logits = jax.jit(forward, static_argnums=0)(model.config, model.params, jnp.asarray(tokens[:, :-1]))
    forced = np.asarray(logprobs(logits, jnp.asarray(tokens[:, 1:])))
    for row, s in zip(forced, sampled, strict=True):
        start = len(given[s.prompt_id]) - 1
        np.testing.assert_allclose(s.logprobs, row[start : start + len(s.tokens)], atol=1e-4)


# --- independent of company ---


@pytest.mark.parametrize("slots", [8, 64])
def test_results_do_not_depend_on_slots(model, prompts, sampled, slots):
    """8 slots are refilled six times, 64 hold all requests at once."""
    assert_same(run(model, prompts, samples=4, temperature=1.0, slots=slots), sampled)


def test_a_prompt_alone_gives_what_it_gives_among_others(model, prompts, greedy, sampled):
    for i in (1, 8):
        assert_same(run(model, [prompts[i]], samples=4, temperature=1.0), sampled[4 * i : 4 * i + 4])
    assert_same(run(model, [prompts[1]]), greedy[1:2])


def test_results_do_not_depend_on_the_order_of_prompts(model, prompts, sampled):
    order = np.random.default_rng(0).permutation(len(prompts))
    found = run(model, [prompts[i] for i in order], samples=4, temperature=1.0)
    assert_same(found, [sampled[4 * i + s] for i in order for s in range(4)])


def test_fewer_samples_are_the_first_of_more(model, prompts, sampled):
    found = run(model, prompts, samples=2, temperature=1.0)
    assert_same(found, [s for s in sampled if s.index < 2])


def test_samples_differ_and_repeat(model, prompts, sampled):
    for i in range(len(prompts)):
        assert len({s.tokens for s in sampled[4 * i : 4 * i + 4]}) > 1
    assert_same(run(model, prompts, samples=4, temperature=1.0), sampled)
    other = run(model, prompts, samples=4, temperature=1.0, key=jax.random.key(6))
    assert sum(a.tokens != b.tokens for a, b in zip(other, sampled, strict=True)) > 40


def test_the_same_id_draws_the_same_and_another_id_does_not(model, prompts, sampled):
    twin = dataclasses.replace(prompts[1], id="another")
    found = run(model, [twin, prompts[1]], samples=4, temperature=1.0)
    assert_same(found[4:], sampled[4:8])
    assert [s.tokens for s in found[:4]] != [s.tokens for s in found[4:]]


def test_keys_are_the_documented_folds_and_all_different():
    keys = sample_keys(KEY, [f"q{i}" for i in range(50)], 8)
    assert keys.shape == (50, 8, 2)
    assert len({tuple(k) for k in keys.reshape(-1, 2).tolist()}) == 400
    import zlib

    salted = jax.random.fold_in(KEY, np.uint32(zlib.crc32(b"q7")))
    np.testing.assert_array_equal(keys[7, 3], jax.random.key_data(jax.random.fold_in(salted, 3)))
    np.testing.assert_array_equal(sample_keys(KEY, ["q7"], 4)[0], keys[7, :4])


# --- ends ---


def test_eos_ends_a_sequence_and_is_no_text(model, prompts, sampled):
    ended = [s for s in sampled if s.reason == "eos"]
    assert ended  # else this test shows nothing
    for s in sampled:
        assert EOS_ID not in s.tokens[:-1]
        assert (s.reason == "eos") == (s.tokens[-1] == EOS_ID)
        assert s.reason == "eos" or len(s.tokens) == 12
        whole = s.tokens[:-1] if s.reason == "eos" else s.tokens
        assert s.text == model.tokenizer.decode(whole)
        assert len(s.logprobs) == len(s.tokens)


def test_a_stop_string_cuts_exactly_there(model, prompts, sampled):
    """Strings that did occur: of one token, across a chunk's end, and two that compete."""
    long = next(s for s in sampled if len(s.text) == 12)
    across = long.text[CHUNK - 1 : CHUNK + 1]
    for strings in ((long.text[2],), (across,), (long.text[9:11], long.text[4:7]), ("never there",)):
        for s, free in zip(run(model, prompts, samples=4, temperature=1.0, stop=strings), sampled, strict=True):
            ends = [free.text.index(x) for x in strings if x in free.text]
            assert s.text == (free.text[: min(ends)] if ends else free.text)
            assert s.reason == ("stop" if ends else free.reason)
            assert s.tokens == free.tokens[: len(s.tokens)]
            assert len(s.logprobs) == len(s.tokens)


def test_every_request_has_its_own_length(model, prompts, greedy):
    engine = Engine(model.config, model.params, slots=8, how=Decoding(True), eos=())
    key = np.zeros(2, np.uint32)
    lengths = [1, 7, 8, 9, 16, 3, 20, 2, 1, 1, 5, 12]
    requests = [Request(i, p.tokens, key, n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]
    done = {c.id: c for c in engine.run(requests)}
    assert [len(done[i].tokens) for i in range(12)] == lengths
    assert {c.reason for c in done.values()} == {"length"}
    for i, s in enumerate(greedy):
        n = min(lengths[i], len(s.tokens))
        assert done[i].tokens[:n] == s.tokens[:n]


def test_no_prompts_give_no_samples(model):
    assert run(model, []) == []


def test_each_end_is_told(model, prompts):
    told = []
    settings = Settings(max_new_tokens=5, slots=8)
    found = rollout(model.config, model.params, model.tokenizer, prompts, settings, KEY, on_sample=told.append)
    assert sorted(told) == sorted(len(s.tokens) for s in found)


# --- cost ---


@pytest.mark.parametrize("slots", [8, 13, 64])
def test_a_prompt_is_prefilled_once(model, prompts, sampled, slots, monkeypatch):
    seen = []
    prefill = engines.prefill

    def counting(config, params, tokens, lengths, **how):
        seen.extend(tuple(row[row != 0].tolist()) for row in np.asarray(tokens) if row.any())
        return prefill(config, params, tokens, lengths, **how)

    monkeypatch.setattr(engines, "prefill", counting)
    assert_same(run(model, prompts, samples=4, temperature=1.0, slots=slots), sampled)
    assert sorted(seen) == sorted(p.tokens for p in prompts)


def test_slots_are_halved_at_the_end_and_nothing_else_changes(model, prompts, monkeypatch):
    """One long sequence among short ones: it does not pay for the slots that are idle."""
    keys = sample_keys(KEY, [p.id for p in prompts], 3).reshape(-1, 2)
    asked = [Request(i, prompts[i // 3].tokens, k, 60 if i == 20 else 2 + i % 5) for i, k in enumerate(keys)]

    def done():
        engine = Engine(model.config, model.params, slots=36, how=Decoding(False), eos=())
        return {c.id: c for c in engine.run(asked)}, engine.decoded

    found, steps = done()
    monkeypatch.setattr(engines, "FEWEST", 1000)
    wanted, without = done()
    assert {i: c.tokens for i, c in found.items()} == {i: c.tokens for i, c in wanted.items()}
    for i in found:
        np.testing.assert_allclose(found[i].logprobs, wanted[i].logprobs, atol=1e-4)
    assert without == 15 * CHUNK * 36
    assert steps == CHUNK * (36 + 18 + 13 * 9), "36 slots, half of them, then a quarter"


def test_like_runs_compile_nothing_new(model, prompts):
    """Other prompts, another temperature, other counts of refills: the same shapes, so the same executables."""
    jitted: Any = (engines.decode, engines.prefill, engines.fill)
    others = [f._cache_size() for f in jitted]  # what tests before this one in the same process compiled
    run(model, prompts, samples=2, temperature=1.0, slots=8)
    before = [f._cache_size() for f in jitted]
    run(model, prompts[3:], samples=3, temperature=0.7, slots=8, key=jax.random.key(9))
    assert [f._cache_size() for f in jitted] == before
    assert max(b - o for b, o in zip(before, others, strict=True)) < 10


def test_a_few_sizes_are_compiled_for_every_number_of_requests(model):
    """Of 1 to 70 requests in 64 slots: 64, 32, 16 and 8 slots, and no others."""
    jitted: Any = {"decode": engines.decode, "prefill": engines.prefill, "fill": engines.fill, "fold": fold_all}
    prompts = [Prompt(f"q{i}", (5, 6, 7 + i % 9)) for i in range(70)]
    settings = {"slots": 64, "max_new_tokens": 71}  # a length that no other test compiles
    before = {name: f._cache_size() for name, f in jitted.items()}
    numbers = [1, 3, 8, 9, 16, 17, 23, 33, 52, 64, 70]
    found = {n: run(model, prompts[:n], **settings) for n in numbers}
    compiled = {name: f._cache_size() - before[name] for name, f in jitted.items()}
    assert compiled["decode"] == 4
    assert compiled["prefill"] <= 1
    assert compiled["fill"] <= 4 + 3 + 2 + 1, "8, 16, … rows at once into as many slots or more"
    assert compiled["fold"] <= 8
    for n in numbers:
        assert_same(found[n], found[70][:n])


def test_lengths_are_rounded_up():
    assert [bucket(n) for n in (1, 32, 33)] == [32, 32, 64]
    assert [list(b) for b in batched(range(5), 2)] == [[0, 1], [2, 3], [4]]


def test_bfloat16_operands_stay_close(model, prompts, greedy):
    found = run(model, prompts, dtype="bfloat16")
    for a, b in zip(found, greedy, strict=True):
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.3


# --- refused ---


def test_an_empty_prompt_and_one_too_long_are_refused_by_name(model, prompts):
    with pytest.raises(UserError, match="prompt 'nothing' is empty"):
        run(model, [prompts[0], Prompt("nothing", ())])
    with pytest.raises(UserError, match=r"prompt 'long' has 120 tokens.*max_new_tokens=12.*132.*ends at 128"):
        run(model, [prompts[0], Prompt("long", (5,) * 120)])
    assert len(run(model, [Prompt("just", (5,) * 116)])) == 1


# --- requests that come up later ---


def requests_of(model, prompts, samples, **own):
    keys = sample_keys(KEY, [p.id for p in prompts], samples)
    return [
        Request(i * samples + s, p.tokens, keys[i, s], 12, **own) for i, p in enumerate(prompts) for s in range(samples)
    ]


def serve(model, waves, slots=8, **settings):
    """Completions by id when a wave comes up only after the one before it is done, or nothing is left to do."""
    engine = Engine(
        model.config, model.params, slots=slots, how=Decoding(False), eos=model.tokenizer.eos_ids, **settings
    )
    waves, done, asked = iter(waves), {}, 0

    def more():
        nonlocal asked
        if len(done) < asked:
            return []
        wave = next(waves, None)
        asked += len(wave or ())
        return wave

    for ended in engine.serve(more):
        done |= {c.id: c for c in ended}
    return done, engine


@pytest.mark.parametrize("size", [1, 5, 48])
def test_requests_that_come_up_later_give_the_same(model, prompts, sampled, size):
    asked = requests_of(model, prompts, 4)
    done, engine = serve(model, batched(asked, size))
    assert [done[i].tokens for i in range(48)] == [s.tokens for s in sampled]
    assert engine.decoded >= sum(len(s.tokens) for s in sampled)


def test_a_longer_request_makes_the_caches_grow(model, prompts, sampled):
    """The first ones are still being decoded when one comes up that has no room."""
    asked = [dataclasses.replace(r, max_new_tokens=r.max_new_tokens + 30) for r in requests_of(model, prompts, 1)]
    alone = {i: serve(model, [[dataclasses.replace(r)]])[0][r.id].tokens for i, r in enumerate(asked)}
    long = Request(99, (7,) * 80, asked[0].key, 12)
    engine = Engine(model.config, model.params, slots=16, how=Decoding(False), eos=model.tokenizer.eos_ids)
    feed = iter([asked, [long], None])
    done = {c.id: c for ended in engine.serve(lambda: next(feed, None)) for c in ended}
    assert [done[i].tokens for i in range(len(asked))] == list(alone.values())
    assert done[99].tokens == serve(model, [[long]])[0][99].tokens


def test_each_sequence_has_its_own_temperature_and_stop(model, prompts, greedy):
    cold = requests_of(model, prompts, 1, temperature=1e-6)
    warm = [dataclasses.replace(r, id=100 + r.id, temperature=None) for r in cold]
    done, _ = serve(model, [[r for pair in zip(cold, warm, strict=True) for r in pair]])
    assert [done[i].tokens for i in range(len(cold))] == [s.tokens for s in greedy]
    assert any(done[100 + i].tokens != done[i].tokens for i in range(len(cold)))
    cut = [dataclasses.replace(r, stop=lambda tokens: 2 if len(tokens) == 3 else None) for r in cold]
    found, _ = serve(model, [cut + warm])
    assert {found[r.id].reason for r in cut} <= {"stop", "eos"}
    assert [found[r.id].tokens for r in warm] == [done[r.id].tokens for r in warm]


def test_slots_are_halved_in_a_lull_and_come_back(model, prompts, monkeypatch):
    """One long sequence alone, then many: the slots go down and up again, and nobody notices."""
    keys = sample_keys(KEY, [p.id for p in prompts], 3).reshape(-1, 2)
    asked = [Request(i, prompts[i // 3].tokens, k, 90 if i == 5 else 6) for i, k in enumerate(keys)]

    def done():
        engine = Engine(model.config, model.params, slots=32, how=Decoding(False), eos=())
        feed, found, sizes = iter([asked[:20], *[[]] * 16, asked[20:35], None]), {}, [0]
        for ended in engine.serve(lambda: next(feed)):
            found |= {c.id: c for c in ended}
            sizes.append(engine.decoded)
        return found, np.diff(sizes) // CHUNK

    found, sizes = done()
    assert list(sizes[:17]) == [32] * 10 + [8] * 7, "a lull from the third chunk on, answered after LULL of them"
    assert sizes[17] == 16, "fifteen came up"
    monkeypatch.setattr(engines, "FEWEST", 1000)
    wanted, full = done()
    assert set(full) == {32}
    assert {i: c.tokens for i, c in found.items()} == {i: c.tokens for i, c in wanted.items()}


# --- prompts that begin alike ---


@pytest.mark.parametrize("shelf", [16, 40])
def test_kept_prompts_change_nothing_and_save_their_beginnings(model, shelf):
    rng = np.random.default_rng(0)
    stems = [tuple(rng.integers(3, 40, n).tolist()) for n in (30, 21, 40)]
    texts = [stems[i % 3] + tuple(rng.integers(3, 40, 1 + i % 7).tolist()) for i in range(24)]
    texts += [*texts[:5], stems[0], stems[1][:9]]
    prompts = [Prompt(f"p{i}", t) for i, t in enumerate(texts)]
    asked = requests_of(model, prompts, 2)

    def done(shelf):
        engine = Engine(
            model.config, model.params, slots=8, how=Decoding(False), eos=model.tokenizer.eos_ids, shelf=shelf
        )
        waves = iter([*batched(asked, 6), None])
        return {c.id: c for ended in engine.serve(lambda: next(waves)) for c in ended}, engine.computed

    wanted, none = done(0)
    found, computed = done(shelf)
    assert none == 0
    assert {i: c.tokens for i, c in found.items()} == {i: c.tokens for i, c in wanted.items()}
    for i in wanted:
        np.testing.assert_allclose(found[i].logprobs, wanted[i].logprobs, atol=1e-4)
    assert computed < 0.5 * sum(map(len, set(texts)))
