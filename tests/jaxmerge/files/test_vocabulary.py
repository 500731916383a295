"""Models with different tokenizers: every row where it belongs, the tokenizer written, and mergekit's figures."""

import json

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from helpers.tiny_vocabularies import (
    EMBED,
    HEAD,
    NAMES,
    NORM,
    D,
    built,
    folder,
    ids,
    pieces,
    row,
    sources,
    words,
    written,
)
from safetensors.numpy import save_file

from jaxmerge.files import vocabulary
from jaxmerge.files.checkpoints import orbax
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read


def test_a_union_keeps_the_base_and_adds_the_rest(here):
    vocab, opened = built("union")
    backend = written(vocab, here / "out")
    ours = backend.get_vocab()
    assert {token: ours[token] for token in ids("base")} == ids("base")
    # What the base lacks: words in the order of models and ids, then what the models had added.
    assert sorted(ours, key=ours.get)[len(ids("base")) :] == ["x", "shared", "y", "extra", "<|end|>"]
    assert vocab.tokenizer.vocabulary == dict(sorted(ours.items(), key=lambda pair: pair[1]))
    assert vocab.size == len(ours) == 13
    assert backend.encode("a shared<|end|>y", add_special_tokens=False).tokens == ["a", "shared", "<|end|>", "y"]
    assert {t.content for t in backend.get_added_tokens_decoder().values() if t.special} >= {"<|end|>", "<|im|>", "<s>"}
    for name in (EMBED, HEAD):
        found = {model: read(source.tensors[name]) for model, source in opened.items()}
        for model, array in found.items():
            for token in ids(model):
                assert np.array_equal(array[ours[token]], row(model, token, name))
        assert np.array_equal(found["base"][ours["y"]], row("two", "y", name))  # one has it
        assert np.array_equal(found["two"][ours["d"]], row("base", "d", name))  # the base has it
        mean = (row("one", "shared", name) + row("two", "shared", name)) / 2
        np.testing.assert_allclose(found["base"][ours["shared"]], mean, rtol=1e-6)
    assert opened["one"].tensors[NORM] == sources()["one"].tensors[NORM]
    assert opened["one"].config["vocab_size"] == 13
    companions = opened["two"].companions()
    assert companions["tokenizer.json"] == (here / "out" / "tokenizer.json").read_bytes()
    assert json.loads(companions["generation_config.json"]) == {"eos_token_id": 2}


def test_without_a_base_several_models_give_their_mean(here):
    _, opened = built("union", ("one", "base", "two"), None)
    vocab = opened["one"].companions()["tokenizer.json"]
    number = tokenizers.Tokenizer.from_str(vocab.decode()).token_to_id("d")
    assert np.array_equal(read(opened["one"].tensors[EMBED])[number], row("one", "d"))
    np.testing.assert_allclose(read(opened["two"].tensors[EMBED])[number], (row("one", "d") + row("base", "d")) / 2)


def test_base_and_path_take_their_own_tokens(here):
    vocab, opened = built("base")
    assert vocab.tokenizer.vocabulary == dict(sorted(ids("base").items(), key=lambda pair: pair[1]))
    assert vocab.tokenizer.files["tokenizer.json"] == (here / "base" / "tokenizer.json").read_bytes()
    assert opened["base"].tensors == sources()["base"].tensors  # nothing to move: read as they are stored
    assert np.array_equal(read(opened["two"].tensors[EMBED])[ids("base")["b"]], row("two", "b"))
    vocab, opened = built({"source": "two"})
    assert vocab.size == len(ids("two"))
    assert np.array_equal(read(opened["base"].tensors[HEAD])[ids("two")["b"]], row("base", "b", HEAD))
    (here / "bare").mkdir()
    words(["a", "nowhere"]).save(str(here / "bare" / "tokenizer.json"))
    vocab, opened = built({"source": "bare"})
    assert vocab.notes == ("1 tokens are in no model, first 'nowhere'; their rows are zero",)
    assert not read(opened["base"].tensors[EMBED])[ids("bare")["nowhere"]].any()


def test_tokens_take_the_rows_they_are_given(here):
    tokens = {
        "a": {"source": "one", "force": True},
        "b": {"source": "two"},
        "c": {"source": {"kind": "zero"}, "force": True},
        "d": {},
        "<new>": {"source": {"kind": "model_token", "model": "two", "token": "</s>"}},
        "<id>": {"source": {"kind": "model_token", "model": "one", "token_id": 3}},
    }
    vocab, opened = built({"source": "union", "tokens": tokens, "pad_to_multiple_of": 16})
    ours = vocab.tokenizer.vocabulary
    assert (len(ours), vocab.size) == (15, 16)
    for model in NAMES:
        found = read(opened[model].tensors[EMBED])
        assert np.array_equal(found[ours["a"]], row("one", "a"))
        assert np.array_equal(found[ours["b"]], row("base" if model == "base" else "two", "b"))
        assert not found[ours["c"]].any()
        assert np.array_equal(found[ours["d"]], row("one" if model == "one" else "base", "d"))
        assert np.array_equal(found[ours["<new>"]], row("two", "</s>"))
        assert np.array_equal(found[ours["<id>"]], row("one", "d"))
        np.testing.assert_allclose(found[15], found[:15].mean(0), rtol=1e-6, atol=1e-7)


def test_rows_are_the_same_however_they_are_read(here):
    _, opened = built({"source": "union", "pad_to_multiple_of": 32})
    for source in opened.values():
        tensor = source.tensors[HEAD]
        whole = read(tensor)
        assert (tensor.chunked, tensor.shape, tensor.size) == (True, (32, D), 32 * D * 4)
        for start, count in ((0, 4), (12, 100), (D * 4, D * 4), (13 * D * 4 - 4, 8), (tensor.size - 4, 4)):
            buffer = np.empty(count, np.uint8)
            tensor.read_into(buffer, start)
            assert np.array_equal(buffer, whole.reshape(-1).view(np.uint8)[start : start + count])
        assert all(model in tensor.where for model in ("one", "two"))


def test_dtypes_are_promoted_or_given(here):
    folder(here / "half", words(["a", "q"]), 5, dtype=ml_dtypes.bfloat16)
    folder(here / "more", words(["q", "z"]), 6, dtype=ml_dtypes.bfloat16)
    _, opened = built("union", ("base", "half"))
    assert opened["half"].tensors[EMBED].dtype == np.float32
    vocab, opened = built("union", ("half", "more", "two"), "two", dtype=np.dtype(np.float16))
    assert {source.tensors[EMBED].dtype for source in opened.values()} == {np.dtype(np.float16)}
    vocab, opened = built("union", ("half", "more"), None)
    assert opened["half"].tensors[EMBED].dtype == ml_dtypes.bfloat16
    found = read(opened["half"].tensors[EMBED])[vocab.tokenizer.vocabulary["a"]]
    assert np.array_equal(found.view(np.uint16), row("half", "a").view(np.uint16))


def test_a_model_without_tokenizer_counts_as_the_base(here):
    folder(here / "mute", None, 7, rows=len(ids("base")))
    vocab, opened = built("union", ("base", "mute", "one"))
    assert vocab.notes == ("mute has no tokenizer.json; its rows are taken to be those of base",)
    ours = vocab.tokenizer.vocabulary
    stored = read(sources(("mute",))["mute"].tensors[EMBED])
    assert np.array_equal(read(opened["mute"].tensors[EMBED])[ours["d"]], stored[ids("base")["d"]])


def test_tokens_beyond_the_embedding_are_left_out(here):
    folder(here / "short", words(["a", "b", "k"], ["<|gone|>"]), 8, rows=6)
    vocab, _ = built("union", ("short", "two"), "short")
    assert "<|gone|>" not in vocab.tokenizer.vocabulary
    assert vocab.notes == ("short: 1 tokens have no row in its embedding; left out",)
    folder(here / "pieces", pieces("abc abd abe cab cabcab", 24), 9, rows=17)
    vocab, _ = built("base", ("pieces", "two"), "pieces")
    backend = written(vocab, here / "out")
    assert backend.get_vocab_size() == 17
    backend.encode("cab abc")


def test_the_written_config_agrees_with_the_tokenizer(here):
    path = here / "one" / "tokenizer_config.json"
    entry = {"content": "<|late|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": {"9": entry}}))
    folder(here / "wide", words(["a"]), 3)
    (here / "wide" / "merges.txt").write_text("")
    vocab, _ = built("union", ("wide", "one"), "wide")
    out = written(vocab, here / "out")
    assert "<|late|>" not in out.get_vocab()  # the ninth has no row in `one`
    assert sorted(path.name for path in (here / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads((here / "out" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sauce": "union"}, "unknown key 'sauce' of 'tokenizer'; there are source, tokens, pad_to_multiple_of"),
        (3, "'tokenizer' is 3, wanted a mapping"),
        ({"source": ["union"]}, r"source of 'tokenizer' is \['union'\], wanted union, base"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, wanted a whole number from 1"),
        ({"tokens": ["a"]}, "tokens of 'tokenizer' is"),
        ({"tokens": {"a": {"force": 1}}}, "force of token 'a' is 1, wanted true or false"),
        ({"tokens": {"a": {"force": True}}}, "token 'a' has force without a source"),
        ({"tokens": {"a": {"from": "one"}}}, "unknown key 'from' of token 'a'"),
        (
            {"tokens": {"a": {"source": {"kind": "one"}}}},
            "the source of token 'a' is .*'kind': 'one'.*, wanted a model",
        ),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "one"}}}}, "either 'token' or 'token_id'"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "one", "token_id": "x"}}}}, "token_id a number"),
        ({"tokens": {"a": {"source": "three"}}}, "token 'a' takes its row from 'three', which is none of the models"),
        ({"tokens": {"q": {"source": "two"}}}, "token 'q' takes its row from 'q' of 'two', which has no such row"),
        (
            {"tokens": {"q": {"source": {"kind": "model_token", "model": "one", "token_id": 99}}}},
            "from 99 of 'one', which has no such row among 9",
        ),
        ({"source": "nowhere"}, "model 'nowhere' is no folder or file here"),
    ],
)
def test_what_is_refused(here, options, words):
    with pytest.raises(ValueError, match=words) as error:
        built(options)
    assert "\n" not in str(error.value)


def test_models_that_do_not_fit_are_refused(here):
    folder(here / "mute", None, 7)
    with pytest.raises(ValueError, match=r"model 'mute' has no tokenizer\.json, which the vocabulary starts from"):
        built("base", ("mute", "one"), "mute")
    folder(here / "wrong", words(["a"]), 3, vocab_size=30)
    with pytest.raises(ValueError, match=r"wrong: 'model.embed_tokens.weight' has 4 rows, .* vocab_size 30"):
        built("base", ("base", "wrong"))
    save_file({"conv.weight": np.ones((2, 2))}, here / "two" / "model.safetensors")
    with pytest.raises(ValueError, match="two: found no embedding"):
        built("base")
    vocab, _ = built("base", ("base", "one"))
    with pytest.raises(ValueError, match="built of base, one; 'mute' is none of them"):
        vocab.apply(open_source("mute"))


def test_ids_of_special_tokens_follow_their_tokens(here):
    folder(here / "swapped", words(["b", "a"], special=("</s>", "<s>")), 4)
    for name in ("base", "swapped"):
        path = here / name / "config.json"
        settings = {
            "bos_token_id": ids(name)["<s>"],
            "eos_token_id": [ids(name)["</s>"], ids(name)["b"]],
            "pad_token_id": None,
        }
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    _, opened = built({"source": "swapped"}, ("base", "swapped"))
    assert opened["base"].config == {**opened["swapped"].config}
    assert opened["base"].config["eos_token_id"] == [1, 3]
    assert json.loads(opened["base"].companions()["generation_config.json"]) == {"eos_token_id": 1}
    vocab, opened = built({"source": "one"}, ("base", "one"))
    assert vocab.notes == ("base: eos_token_id names 'b', which the result's tokenizer lacks; left out",)
    assert opened["base"].config["eos_token_id"] == [2]


def test_rows_may_come_from_tensors_that_are_read_whole(here):
    orbax.write(here / "one", here / "saved")
    options = {"source": "union", "pad_to_multiple_of": 16}
    _, wanted = built(options)
    _, found = built(options, ("base", "saved", "two"))
    for model, other in zip(NAMES, ("base", "saved", "two"), strict=True):
        tensor = found[other].tensors[EMBED]
        assert not tensor.chunked
        assert np.array_equal(read(tensor), read(wanted[model].tensors[EMBED]))
        buffer = np.empty(40, np.uint8)
        tensor.read_into(buffer, 100)
        assert np.array_equal(buffer, read(tensor).reshape(-1).view(np.uint8)[100:140])
    assert found["base"].companions()["tokenizer.json"] == wanted["base"].companions()["tokenizer.json"]


def test_among_says_whose_rows_fill_the_gaps(here):
    opened = sources()
    vocab = vocabulary.build("union", opened, "base")
    number = vocab.tokenizer.vocabulary["shared"]
    alone = read(vocab.apply(opened["base"], among=["base", "two"]).tensors[EMBED])
    assert np.array_equal(alone[number], row("two", "shared"))
    assert not read(vocab.apply(opened["base"], among=["base"]).tensors[EMBED])[number].any()


def test_broken_tokenizers_are_named(here):
    path = here / "one" / "tokenizer.json"
    state = json.loads(path.read_text())
    for content, message in [
        ("{", "one: tokenizer.json is no JSON"),
        ("{}", "one: tokenizer.json names no model with a vocabulary"),
        (json.dumps({**state, "model": {**state["model"], "vocab": {"<unk>": 0, "a": 1, "b": 1}}}), "have one id, 1"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            built({"source": "one"})
