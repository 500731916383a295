"""`jaxmerge data`: what is shown is what `sft` would learn, and what it would cut."""

from __future__ import annotations

import json

import pytest
from helpers.line_cases import CHAT, CHOICES, GSM8K, write
from helpers.played_hub import as_parquet, played_hub
from helpers.tiny_models import write_folder as write_model
from helpers.tiny_tokenizers import CHATML, byte_level
from helpers.tiny_tokenizers import write_folder as write_tokenizer

from train.cli import __main__ as cli
from train.data.versions import write_version
from train.learn.batches import to_arrays
from train.learn.settings import Data, Sft
from train.learn.sources import load_sources
from train.models.open import open_tokenizer

SIZES = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a config and a tokenizer, and no weights: none are read."""
    folder = write_tokenizer(
        tmp_path_factory.mktemp("model"), byte_level(), eos_token="<|im_end|>", chat_template=CHATML
    )
    write_model(folder, SIZES)
    (folder / "model.safetensors").unlink()
    return str(folder)


def said(capsys, *words: str) -> str:
    assert cli.main(["data", *words]) == 0
    return capsys.readouterr().out


def test_what_is_learnt_and_cut_is_what_sft_learns_and_cuts(tmp_path, model, capsys):
    rows = [{**GSM8K, "question": "word " * n + "?"} for n in range(60)]
    path = str(write(tmp_path / "g.jsonl", rows))
    out = said(capsys, path, f"model={model}", "max_length=240", "examples=3")
    (examples,), _ = load_sources(Data(path=path), open_tokenizer(model), home=tmp_path / "home", seed=0)
    _, weights, dropped, truncated = to_arrays(examples, Sft(max_length=240))
    assert 0 < dropped < 60
    assert truncated == 0
    assert f"sft.max_length=240, sft.overlong=drop: {dropped} longer examples are left out, 0 are cut" in out
    assert f"; {sum(len(e['tokens']) for e in examples):,} in all" in out
    learnt = sum(sum(e["learnt"]) for e in examples)
    assert f"{learnt:,} in all, {100 * learnt / sum(len(e['tokens']) for e in examples):.1f} %" in out
    assert sum(w.sum() for w in weights) < learnt
    shown = [line for line in out.splitlines() if line.startswith("--- ")]
    assert [line.split(":")[0] for line in shown] == ["--- 1 of 60", "--- 31 of 60", "--- 60 of 60"]
    assert shown[2].endswith("longer than sft.max_length, left out")
    assert (
        "<|im_start|>assistant\n⟦She sold 48/2 = 24 clips in May.\nIn all 48+24 = 72 clips.\n#### 72<|im_end|>⟧" in out
    )
    cut = said(capsys, path, f"model={model}", "max_length=240", "overlong=truncate", "examples=0")
    assert f"0 longer examples are left out, {dropped} are cut" in cut
    assert "---" not in cut


def test_without_a_model_characters_are_counted(tmp_path, capsys):
    out = said(capsys, str(write(tmp_path / "c.jsonl", [CHAT, CHAT])), "examples=1")
    head, counts = out.splitlines()[:2]
    assert head == "format chat, told by the keys messages"
    assert counts == "2 examples; 2 with several turns of the assistant; 1 repeat another; 2 with a system message"
    assert "system: Be brief.\nuser: Hi\nassistant: ⟦Hello⟧\nuser: 2+2?\nassistant: ⟦4⟧" in out
    length = len("Be brief.HiHello2+2?4")
    assert f"characters: {length} on average, half have at most {length}, 95 % at most {length}, the longest" in out
    assert "choices: wood | iron | glass\nanswer: B" in said(capsys, str(write(tmp_path / "q.jsonl", [CHOICES])))


def test_every_turn_may_be_an_example(tmp_path, model, capsys):
    out = said(capsys, str(write(tmp_path / "c.jsonl", [CHAT])), f"model={model}", "learn=each")
    assert "--- 1 of 2" in out
    assert "--- 2 of 2" in out


def test_a_dataset_of_the_hub_is_shown_with_what_else_it_has(tmp_path, capsys):
    with played_hub(tmp_path / "cache") as served:
        files = {f"main/{s}-00000-of-00001.parquet": as_parquet([GSM8K]) for s in ("train", "test")}
        commit = served.add("datasets/org/name", files)
        out = said(capsys, "hf:org/name/main:test")
        assert out.startswith(f"hf:org/name/main:test: commit {commit}; subsets main; splits test, train\nformat gsm8k")
        assert "1 with an answer or tests: `jaxmerge evaluate` asks them as gsm8k" in out
        assert cli.main(["data", "hf:org/name/minor"]) == 2
        assert "no subset 'minor'; there are: main" in capsys.readouterr().err


def test_the_samples_of_a_run_are_shown(tmp_path, model, capsys):
    tokenizer = open_tokenizer(model)
    before, after = tokenizer.join("1+1=", "2")
    row = {
        "question_id": "q", "family": "gcd", "prompt": "1+1=", "completion": "2", "tokens": [*before, *after],
        "prompt_length": len(before), "score": 1.0, "weight": 1.0, "sample": 0,
    }  # fmt: skip
    write_version(tmp_path, "imm", "1.0.0", [row], {})
    assert "1+1=⟦2⟧" in said(capsys, str(tmp_path / "imm" / "1.0.0"), f"model={model}")
    assert "user: 1+1=\nassistant: ⟦2⟧" in said(capsys, str(tmp_path / "imm" / "1.0.0"))


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"a": 1}, (), "the keys a fit no format; set data.format"),
        ({**GSM8K, "odd": 1}, (), "the key 'odd' is not understood"),
        (GSM8K, ("examples=-1",), "data.examples is -1; it must be at least 0"),
        (GSM8K, ("split=test", "frmat=x"), "frmat: no such key; did you mean format?"),
        (GSM8K, ("model=org/none",), "org/none: no such folder here"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, row, words, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert cli.main(["data", str(path), *words]) == 2
    assert message in capsys.readouterr().err
