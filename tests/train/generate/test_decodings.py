"""Several models that decide a token together, against sums of whole passes in float64 NumPy."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.goldens.family_cases import FAMILY_CASES
from helpers.tiny_families import IDS, logits, run_engine, weights
from helpers.tiny_models import config_of

from train.cli.__main__ import main
from train.generate import engine as engines
from train.generate.decodings import DECODINGS, Alone, EmulatedFineTuning, ProxyTuning, UniR
from train.generate.engine import Decoding, Engine
from train.generate.rollout import Prompt, rollout, sample_keys
from train.generate.score import score
from train.generate.settings import SampleOptions, Settings
from train.generate.slots import Request
from train.generate.together import Together, compose, join
from train.log import UserError
from train.models.characters import SYMBOLS, encode
from train.models.decoder import forward
from train.models.hf import save_hf
from train.models.open import Model, open_model, random_model
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

LARGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.35,
}  # fmt: skip
SMALL = LARGE | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXTS = ("1", "12+7-5?", "g48,18?", "s31,5,12<?", "23*47?", "t50,60?", "zz")
PROMPTS = [Prompt(f"q{i}", tuple(encode(text))) for i, text in enumerate(TEXTS)]
KEY = jax.random.key(5)
V = len(SYMBOLS)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of a large model, of small ones, and of one with eight rows of padding in its embedding."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"large": LARGE, "one": SMALL, "two": SMALL, "three": SMALL, "padded": SMALL | {"vocab_size": V + 8}}
    for seed, (name, given) in enumerate(sizes.items()):
        made = random_model(given, make_mesh(Mesh()), seed=seed)
        save_hf(root / name, made.config, made.params, tokenizer_from=made.tokenizer)
    return {name: str(root / name) for name in sizes}


@pytest.fixture(scope="module")
def models(paths):
    return {name: open_model(path) for name, path in paths.items()}


def run(model, prompts=PROMPTS, **settings):
    given = {"max_new_tokens": 12, "slots": 8, **settings}
    return rollout(model.config, model.params, model.tokenizer, prompts, Settings(**given), KEY)


def padded(samples, length=32):
    """(tokens [B, length], where the completion of each begins)."""
    prompts = {p.id: p.tokens for p in PROMPTS}
    rows = np.zeros((len(samples), length), np.int32)
    for row, s in zip(rows, samples, strict=True):
        row[: len(prompts[s.prompt_id]) + len(s.tokens)] = (*prompts[s.prompt_id], *s.tokens)
    return rows, [len(prompts[s.prompt_id]) for s in samples]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def passes(models, rows):
    """Log-probabilities [B, T, V] float64 of each model by whole passes, over the tokens that all have."""
    jitted = jax.jit(forward, static_argnums=0)
    found = (np.asarray(jitted(m.config, m.params, jnp.asarray(rows)), np.float64)[..., :V] for m in models)
    return [log_softmax(logits) for logits in found]


def proxy_tuning(base, expert, antiexpert):
    return base + 0.7 * (expert - antiexpert)


def up_scaling(large, small, tuned):
    order = np.argsort(-tuned, axis=-1)
    before = np.cumsum(np.take_along_axis(np.exp(tuned), order, -1), -1) - np.take_along_axis(np.exp(tuned), order, -1)
    inside = np.zeros(tuned.shape, bool)
    np.put_along_axis(inside, order, before < 0.8, -1)
    return tuned + np.where(inside, large - small, 0)


# The settings, the models in the order of the formula, and the formula of their log-probabilities.
CASES = {
    "proxy_tuning": ({"expert": "one", "antiexpert": "two", "alpha": 0.7}, ("one", "two"), proxy_tuning),
    "padded": (
        {"name": "proxy_tuning", "expert": "padded", "antiexpert": "two", "alpha": 0.7}, ("padded", "two"),
        proxy_tuning,
    ),
    "emulated_fine_tuning": (
        {"small": "one", "tuned": ["two", "three"], "weights": [0.25, 0.75]}, ("one", "two", "three"),
        lambda large, small, a, b: large + 0.25 * (a - small) + 0.75 * (b - small),
    ),
    "up_scaling": (
        {"name": "emulated_fine_tuning", "small": "one", "tuned": ["two"], "top_p": 0.8}, ("one", "two"), up_scaling
    ),
    "unir": (
        {"reasoners": ["one", "three"], "weights": [1, 0.5]}, ("one", "three"), lambda base, a, b: base + a + 0.5 * b
    ),
}  # fmt: skip


def settings_of(case, paths):
    """The settings as a config has them, with folders for names."""
    keys = {"name": case} | CASES[case][0]
    named = ("expert", "antiexpert", "small")
    keys |= {key: paths[keys[key]] for key in named if key in keys}
    return keys | {key: [paths[name] for name in keys[key]] for key in ("tuned", "reasoners") if key in keys}


def composed(case, paths, models):
    return compose(models["large"], build(SampleOptions, {"decode": settings_of(case, paths)}).decode)


def exactly(samples):
    return [(s.prompt_id, s.index, s.tokens, [float(p).hex() for p in s.logprobs]) for s in samples]


def assert_same(found, wanted, atol=1e-4):
    assert [(s.prompt_id, s.index, s.tokens) for s in found] == [(s.prompt_id, s.index, s.tokens) for s in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)


# --- the formulas ---


@pytest.mark.parametrize("case", CASES)
def test_each_token_is_the_likeliest_of_the_sum_and_has_its_probability(case, paths, models):
    """Token by token: given what came before, as whole passes of each model in float64 have it."""
    _, others, formula = CASES[case]
    samples = run(composed(case, paths, models))
    rows, starts = padded(samples)
    together = log_softmax(formula(*passes([models[name] for name in ("large", *others)], rows)))
    for row, start, s in zip(together, starts, samples, strict=True):
        at = np.arange(start - 1, start - 1 + len(s.tokens))
        assert tuple(row[at].argmax(-1).tolist()) == s.tokens
        np.testing.assert_allclose(s.logprobs, row[at, list(s.tokens)], atol=2e-4)
    assert [s.tokens for s in samples] != [s.tokens for s in run(models["large"])]


@pytest.mark.parametrize("case", ["proxy_tuning", "up_scaling"])
def test_continuations_are_scored_under_the_sum(case, paths, models):
    model, (_, others, formula) = composed(case, paths, models), CASES[case]
    samples = run(model, samples=2, temperature=1.0)
    rows, starts = padded(samples)
    pairs = [(row[:n].tolist(), list(s.tokens)) for row, n, s in zip(rows, starts, samples, strict=True)]
    together = log_softmax(formula(*passes([models[name] for name in ("large", *others)], rows)))
    for row, start, s, found in zip(together, starts, samples, score(model.config, model.params, pairs), strict=True):
        at = np.arange(start - 1, start - 1 + len(s.tokens))
        assert found.logprob == pytest.approx(row[at, list(s.tokens)].sum(), abs=1e-3)
        assert found.logprob == pytest.approx(sum(s.logprobs), abs=1e-3)
        assert found.greedy == (tuple(row[at].argmax(-1).tolist()) == s.tokens)


# --- the limits ---


@pytest.mark.parametrize(
    "decode",
    [
        lambda p: ProxyTuning(expert=p["one"], antiexpert=p["two"], alpha=0.0),
        lambda p: ProxyTuning(expert=p["one"], antiexpert=p["one"], alpha=0.7),
        lambda p: EmulatedFineTuning(small=p["two"], tuned=(p["two"],)),
        lambda p: EmulatedFineTuning(small=p["two"], tuned=(p["one"], p["three"]), weights=(0.0, 0.0)),
        lambda p: UniR(reasoners=(p["one"],), weights=(0.0,)),
        lambda p: Alone(),
    ],
)
def test_without_a_change_the_model_stays_as_it_is_bit_for_bit(decode, paths, models):
    drawn = {"samples": 2, "temperature": 0.8}
    assert exactly(run(compose(models["large"], decode(paths)), **drawn)) == exactly(run(models["large"], **drawn))


def test_up_scaling_is_proxy_tuning_with_alpha_1(paths, models):
    one = compose(models["large"], EmulatedFineTuning(small=paths["two"], tuned=(paths["one"],)))
    other = compose(models["large"], ProxyTuning(expert=paths["one"], antiexpert=paths["two"]))
    assert_same(run(one, samples=2, temperature=0.8), run(other, samples=2, temperature=0.8), atol=1e-5)


def test_a_reasoner_equal_to_the_model_is_the_model_at_half_the_temperature(paths, models):
    """π² is what is drawn from at T 1 / 2, so both draw the same with the same keys."""
    model = compose(models["large"], UniR(reasoners=(paths["large"],)))
    found = run(model, samples=3, temperature=1.0)
    assert [s.tokens for s in found] == [s.tokens for s in run(models["large"], samples=3, temperature=0.5)]


# --- independent of company ---


@pytest.fixture(scope="module")
def tuned(paths, models):
    return composed("proxy_tuning", paths, models)


@pytest.fixture(scope="module")
def sampled(tuned):
    return run(tuned, samples=4, temperature=1.0)


def test_results_do_not_depend_on_slots_or_other_prompts(tuned, sampled):
    assert_same(run(tuned, samples=4, temperature=1.0, slots=32), sampled)
    assert_same(run(tuned, [PROMPTS[3]], samples=4, temperature=1.0), sampled[12:16])


def test_results_do_not_depend_on_the_mesh(paths, sampled):
    """The large model and the small ones over the same eight devices, each divided by the same rules."""
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    tuning = ProxyTuning(expert=paths["one"], antiexpert=paths["two"], alpha=0.7)
    model = compose(open_model(paths["large"], mesh), tuning)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(model.params["models"]))
    assert_same(run(model, samples=4, temperature=1.0), sampled)


def test_kept_prompts_change_nothing(tuned):
    stem = tuple(np.random.default_rng(0).integers(3, 40, 30).tolist())
    keys = sample_keys(KEY, [str(i) for i in range(12)], 1)[:, 0]
    asked = [Request(i, (*stem[: 10 + i], 5 + i), keys[i], 12) for i in range(12)]

    def done(shelf):
        how = Decoding(False)
        engine = Engine(tuned.config, tuned.params, slots=8, how=how, eos=tuned.tokenizer.eos_ids, shelf=shelf)
        waves = iter([asked[:5], asked[5:], None])
        return {c.id: c for ended in engine.serve(lambda: next(waves)) for c in ended}, engine.computed

    (wanted, none), (found, computed) = done(0), done(16)
    assert none == 0 < computed < sum(len(r.prompt) for r in asked)
    assert {i: c.tokens for i, c in found.items()} == {i: c.tokens for i, c in wanted.items()}


def test_each_model_turns_its_keys_at_its_own_length(models):
    """LongRoPE models of 16 and of 22 tokens: a sequence is prefilled again where either turns."""
    sizes = [FAMILY_CASES["phi3_long"] | {"original_max_position_embeddings": n} for n in (16, 22)]
    configs = [config_of(attributes) for attributes in sizes]
    two = [Model(config, weights(config), models["one"].tokenizer) for config in configs]
    joined = join(two[0], two[1:], UniR(reasoners=("m",)).formula, {"weights": (1.0,)})
    prompt = IDS[1, :12].tolist()
    (new,) = run_engine(joined.config, joined.params, [prompt], 14)
    ids = np.zeros((2, 32), np.int32)
    ids[:, :26] = [*prompt, *new]
    steps = [sum(logits(m.config, m.params, ids, lengths=[n] * 2)[0, n - 1] for m in two) for n in range(12, 26)]
    assert list(new) == np.argmax(steps, axis=-1).tolist()


def test_another_alpha_compiles_nothing(paths, models, sampled):
    decode: Any = engines.decode
    before = decode._cache_size()
    other = compose(models["large"], ProxyTuning(expert=paths["one"], antiexpert=paths["two"], alpha=1.5))
    assert [s.tokens for s in run(other, samples=4, temperature=1.0)] != [s.tokens for s in sampled]
    assert decode._cache_size() == before


def test_bfloat16_operands_stay_close(tuned):
    for a, b in zip(run(tuned, dtype="bfloat16"), run(tuned), strict=True):
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.5


# --- refused ---


def test_the_first_token_that_differs_is_named(tmp_path, paths, models):
    other = tmp_path / "other"
    save_hf(other, models["one"].config, models["one"].params, tokenizer_from=models["one"].tokenizer)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(
        UserError, match=r"decode.antiexpert=.*other: token 20 is '.', and MODEL has '.' there"
    ) as error:
        compose(models["large"], ProxyTuning(expert=paths["one"], antiexpert=str(other)))
    assert repr(a) in str(error.value)
    assert repr(b) in str(error.value)


def test_a_model_with_fewer_tokens_is_refused_and_one_with_more_is_cut(tmp_path, paths, models):
    import tokenizers

    more = random_model(LARGE | {"vocab_size": V + 8}, make_mesh(Mesh()), seed=0)
    backend = tokenizers.Tokenizer.from_str(more.tokenizer.backend.to_str())
    backend.add_tokens(["<extra>"])
    more = dataclasses.replace(more, tokenizer=dataclasses.replace(more.tokenizer, backend=backend))
    with pytest.raises(UserError, match=rf"decode.expert=.*: token {V} is no token, and MODEL has '<extra>' there"):
        compose(more, ProxyTuning(expert=paths["one"], antiexpert=paths["two"]))
    save_hf(tmp_path / "more", more.config, more.params, tokenizer_from=more.tokenizer)
    together = compose(models["one"], UniR(reasoners=(str(tmp_path / "more"),)))
    assert isinstance(together.config, Together)
    assert together.config.vocabulary == V


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "proxy"}, r"decode.name is 'proxy'; no such name; did you mean proxy_tuning\?"),
        ({"name": "proxy_tuning", "expert": "m"}, "decode.antiexpert is missing"),
        ({"name": "proxy_tuning", "expert": "m", "antiexpert": "m", "beta": 1}, "decode.beta: no such key"),
        ({"name": "unir", "reasoners": []}, "decode.reasoners is an empty list"),
        ({"name": "unir", "reasoners": ["m"], "weights": [1, 2]}, "decode.weights has 2 numbers for 1 reasoners"),
        ({"name": "emulated_fine_tuning", "small": "m", "tuned": ["m"], "top_p": 0}, "decode.top_p is 0.0"),
        ({"name": "emulated_fine_tuning", "small": "m", "tuned": ["m", "n"], "top_p": 0.9}, "decode.top_p is 0.9: the"),
    ],
)
def test_settings_are_checked(keys, said):
    with pytest.raises(UserError, match=said):
        build(SampleOptions, {"decode": keys})


def test_every_name_is_that_of_its_class():
    for name, cls in DECODINGS.items():
        assert dataclasses.is_dataclass(cls)
        assert {field.name: field.default for field in dataclasses.fields(cls)}["name"] == name


# --- the verbs ---


ROWS = {row["name"]: row["keys"] for row in yaml.safe_load((ROOT / "docs/methods/decoding.yaml").read_text())}
FOLDERS = {
    "EXPERT": "one",
    "ANTIEXPERT": "two",
    "SMALL": "one",
    "TUNED": "two",
    "OTHER": "three",
    "ONE": "one",
    "TWO": "three",
}


def test_every_decoding_has_a_row():
    named = {key.partition("name: ")[2].partition(",")[0] for keys in ROWS.values() for key in keys}
    assert named == DECODINGS.keys() - {"alone"}


@pytest.mark.parametrize(("row", "case"), list(zip(ROWS, [case for case in CASES if case != "padded"], strict=True)))
def test_sample_takes_the_keys_of_a_row(row, case, tmp_path, paths, models):
    lines = [json.dumps({"prompt": text, "id": p.id}) for text, p in zip(TEXTS, PROMPTS, strict=True)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    keys = [re.sub(r"\b[A-Z]+\b", lambda word: paths[FOLDERS[word[0]]], key) for key in ROWS[row]]
    words = ["sample", paths["large"], str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *keys]
    assert main([*words, "max_new_tokens=12", "slots=8", "chat=false"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [tuple(row["tokens"]) for row in rows] == [s.tokens for s in run(composed(case, paths, models))]


def test_evaluate_asks_the_models_together(tmp_path, paths, models):
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "choices": ["2", "3"], "answer": "A"}\n')
    words = [
        "evaluate",
        paths["large"],
        str(tmp_path / "q.jsonl"),
        f"decode={json.dumps(settings_of('proxy_tuning', paths))}",
    ]
    assert main([*words, f"out={tmp_path / 'found.json'}", "max_new_tokens=4"]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["scored"]
    model = composed("proxy_tuning", paths, models)
    context = model.tokenizer.encode("Question: 1+1?\nAnswer:")
    pairs = [(context, model.tokenizer.encode(f" {choice}")) for choice in "23"]
    assert found["logprobs"] == pytest.approx([s.logprob for s in score(model.config, model.params, pairs)], abs=1e-4)
