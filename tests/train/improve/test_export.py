"""`jaxmerge export`: a folder of one model in one form, with its card."""

import jax
import numpy as np
import pytest
from helpers.goldens.cases import BASE
from helpers.tiny_models import config_of
from helpers.tiny_tokenizers import CHATML, byte_level

from train.cli import __main__ as cli
from train.models.characters import write_tokenizer
from train.models.decoder import init
from train.models.hf import named, save_hf
from train.models.open import open_model
from train.models.tokenizer import Tokenizer

NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of({**BASE, "vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    tokenizer = Tokenizer(byte_level(), NAMES, chat_template=CHATML)
    save_hf(tmp_path / "model", config, init(config, jax.random.key(0)), tokenizer_from=tokenizer)
    return tmp_path / "model"


def refused(capsys, *words) -> str:
    assert cli.main(["export", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_folder_becomes_gguf_and_back(folder, tmp_path, capsys):
    assert cli.main(["export", "model", "small", "format=gguf", "type=bf16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "small/small-BF16.gguf"
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"small-BF16.gguf", "README.md"}
    card = (tmp_path / "small/README.md").read_text()
    assert "llama-cli -m small-BF16.gguf" in card
    assert 'from_pretrained("small", gguf_file="small-BF16.gguf")' in card
    assert "library_name: gguf" in card
    assert cli.main(["export", "small", "again", "dtype=bfloat16"]) == 0
    before, after = open_model("model"), open_model("again")
    assert (before.config, before.tokenizer.chat_template) == (after.config, after.tokenizer.chat_template)
    for (name, a), (_, b) in zip(named(before.params), named(after.params), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(b, a.astype("bfloat16").astype(np.float32), err_msg=name)
    assert "q8_0" not in card
    assert cli.main(["export", "model", "eight", "format=gguf"]) == 0
    assert (tmp_path / "eight/eight-Q8_0.gguf").stat().st_size < (tmp_path / "small/small-BF16.gguf").stat().st_size


def test_keys_of_one_form_are_refused_of_the_other(folder, capsys):
    assert "export.type is of GGUF files; add format=gguf" in refused(capsys, "model", "out", "type=f16")
    assert "export.pre is of GGUF files" in refused(capsys, "model", "out", "pre=gpt-2")
    line = refused(capsys, "model", "out", "format=gguf", "dtype=bfloat16")
    assert "export.dtype=bfloat16 is of Hugging Face folders; with format=gguf give type=" in line
    assert "already there and not empty" in refused(capsys, "model", "model", "format=gguf")


def test_a_tokenizer_without_words_in_gguf_is_named(folder, tmp_path, capsys):
    write_tokenizer(folder)  # one character a token
    line = refused(capsys, "model", "out", "format=gguf")
    assert "out/out-Q8_0.gguf: the tokenizer cannot be written as GGUF: its model is WordLevel" in line
    assert not (tmp_path / "out").exists()
