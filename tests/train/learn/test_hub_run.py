"""`jaxmerge sft` on a dataset of the hub: its commit stays with the run, whatever becomes of the dataset."""

from __future__ import annotations

import jax
import pytest
import yaml
from helpers.line_cases import GSM8K
from helpers.played_hub import as_parquet, forget, played_hub
from helpers.tiny_tokenizers import CHATML, byte_level

from train.cli import __main__ as cli
from train.models.decoder import init
from train.models.hf import save_hf
from train.models.hf_config import config_from_hf
from train.models.tokenizer import Tokenizer

SIZES = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, chat_template=CHATML)
    config = config_from_hf({**SIZES, "eos_token_id": list(tokenizer.eos_ids)}, source="tiny")
    save_hf(tmp_path / "model", config, init(config, jax.random.key(0)), tokenizer_from=tokenizer)
    return str(tmp_path / "model")


def test_a_run_keeps_the_commit_it_began_with(tmp_path, model, capsys):
    def rows(count):
        return {"main/train-00000-of-00001.parquet": as_parquet([{**GSM8K, "id": f"q{i}"} for i in range(count)])}

    keys = ["sft.batch=2", "sft.epochs=1", "sft.max_length=400"]
    with played_hub(tmp_path / "cache") as hub:
        first = hub.add("datasets/org/name", rows(4))
        command = ["sft", model, "hf:org/name/main", str(tmp_path / "run"), *keys]
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        assert f"hf:org/name/main@{first}: 4 examples" in out
        assert "2 steps" in out
        kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert kept["data"]["path"] == f"hf:org/name/main@{first}"
        second = hub.add("datasets/org/name", rows(6))
        forget()
        assert cli.main(command) == 0  # the run is finished, and is the same
        assert cli.main(["sft", model, f"hf:org/name/main@{second}", str(tmp_path / "run"), *keys]) == 2
        assert f"data.path: 'hf:org/name/main@{first}' → 'hf:org/name/main@{second}'" in capsys.readouterr().err
        hub.offline()
        assert cli.main(command) == 0
