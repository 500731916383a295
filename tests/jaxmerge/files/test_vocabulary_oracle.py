"""Rows and tokenizers of models with different vocabularies against mergekit's, by token."""

import json

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from helpers.tiny_vocabularies import EMBED, HEAD, NAMES, D, built, folder, ids, pieces, words, written

from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
WEIGHTS = (0.2, 0.5, 0.9)
FORCED = {
    "a": {"source": "one", "force": True},
    "c": {"source": {"kind": "zero"}, "force": True},
    "b": {"source": "two"},
    "<new>": {"source": {"kind": "model_token", "model": "two", "token": "</s>"}},
    "<id>": {"source": {"kind": "model_token", "model": "one", "token_id": 3}},
}
KNOWN = {token: setting for token, setting in FORCED.items() if token in "abc"}
ORACLE = {
    "union": "union",
    "base": "base",
    "path": {"source": "two"},
    "forced": {"source": "union", "tokens": FORCED},
    # New tokens on top of source: base make mergekit stop (it takes them to be the base's own, without a row).
    "forced base": {"source": "base", "tokens": KNOWN},
    "padded": {"source": "union", "pad_to_multiple_of": 32},
    "padded base": {"source": "base", "tokens": KNOWN, "pad_to_multiple_of": 7},
}


def compare_with_mergekit(here, options, *, base: str | None = "base", **settings):
    """Merge linearly there and by NumPy here; rows by token, and the tokenizers."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoTokenizer

    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": m, "parameters": {"weight": w, "normalize": False}} for m, w in zip(NAMES, WEIGHTS, strict=True)
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
        **({"tokenizer_source": options} if isinstance(options, str) else {"tokenizer": options}),
        **({} if base is None else {"base_model": base}),
        **settings,
    }
    text = json.dumps(recipe)  # it takes a model to be a folder only where its name is a path
    for name in NAMES:
        text = text.replace(f': "{name}"', f': "{here / name}"')
    text = text.replace(f'"source": "{here / "base"}"', '"source": "base"')
    text = text.replace(f'"tokenizer_source": "{here / "base"}"', '"tokenizer_source": "base"')
    config = MergeConfiguration.model_validate(json.loads(text))
    run_merge(config, str(here / "theirs"), MergeOptions(allow_crimes=True, quiet=True))
    vocab, opened = built(options, base=base, dtype=np.dtype(np.float32))
    ours = written(vocab, here / "ours")
    theirs = tokenizers.Tokenizer.from_file(str(here / "theirs" / "tokenizer.json"))
    left, right = ours.get_vocab(), theirs.get_vocab()
    assert set(left) == set(right)
    first = ids("two" if isinstance(options, dict) and options["source"] == "two" else base or "base")
    assert all(left[token] == right[token] for token in first if base is not None and token in left)
    assert json.loads((here / "theirs" / "config.json").read_text())["vocab_size"] == vocab.size
    loaded = [AutoTokenizer.from_pretrained(here / name) for name in ("ours", "theirs")]
    assert loaded[0].get_vocab() == left
    flags = [{t.content: (t.special, t.normalized) for t in of.added_tokens_decoder.values()} for of in loaded]
    assert base is None or flags[0] == flags[1]  # without one, mergekit starts from any of the models
    merged = {name: read(tensor) for name, tensor in open_source("theirs").tensors.items()}
    for name in (EMBED, HEAD):
        found = sum(w * read(opened[m].tensors[name]) for m, w in zip(NAMES, WEIGHTS, strict=True))
        assert merged[name].shape == found.shape == (vocab.size, D)
        for token, i in left.items():
            np.testing.assert_allclose(found[i], merged[name][right[token]], rtol=1e-5, atol=1e-6, err_msg=token)
        spare = len(left)
        np.testing.assert_allclose(found[spare:], merged[name][spare:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ORACLE)
def test_rows_are_mergekits(here, case):
    compare_with_mergekit(here, ORACLE[case])


def test_rows_are_mergekits_with_byte_pairs_and_spare_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base", pieces("abc abd abe cab cabcab", 24, ["<|im|>", "<|gone|>"]), 0, rows=25)
    folder(tmp_path / "one", pieces("gab gag abbag fag faggaf", 22, ["<|im|>"]), 1)
    folder(tmp_path / "two", words(["Ġab", "y", "b"], ["plain", "<|end|>"]), 2)
    compare_with_mergekit(tmp_path, "union")
    for name in ("ours", "theirs"):
        (tmp_path / name).rename(tmp_path / f"{name}-union")
    compare_with_mergekit(tmp_path, {"source": "base", "pad_to_multiple_of": 8})


def test_rows_are_mergekits_without_a_base(here):
    compare_with_mergekit(here, "union", base=None)


@pytest.mark.parametrize("options", ["union", "base", {"source": "two", "pad_to_multiple_of": 4}])
def test_rows_are_mergekits_with_spare_rows_and_special_tokens_unmarked(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    half = ml_dtypes.bfloat16
    folder(tmp_path / "base", words(["a", "b", "c"], ["<|im|>"]), 0, rows=20, dtype=half)
    folder(
        tmp_path / "one", words(["d", "a"], ["<|im|>"], ["<s>", "</s>", "<pad>"], marked=False), 1, rows=16, dtype=half
    )
    folder(tmp_path / "two", words(["<pad>", "d", "b"], marked=False), 2, dtype=half)
    for path in tmp_path.glob("*/tokenizer_config.json"):
        pad = {"pad_token": "<pad>"} if path.parent.name != "base" else {}
        path.write_text(json.dumps({**json.loads(path.read_text()), **pad}))
    compare_with_mergekit(tmp_path, options)
