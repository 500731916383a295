"""`benchmarks/footprint.py`: the tables of docs/gpu.md are what it prints."""

import pytest
from helpers import ROOT

from benchmarks import footprint

PAGE = (ROOT / "docs/gpu.md").read_text()


@pytest.mark.parametrize("words", [[], ["models=qwen2.5-7b", "devices=4"]])
def test_the_tables_of_the_page_are_printed(words, capsys):
    footprint.main(words)
    assert capsys.readouterr().out.strip() in PAGE


def test_the_state_is_five_models_in_float32(tmp_path):
    """A model of a folder with config.json alone: 16 layers of width 1024, counted by hand."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, '
        '"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, '
        '"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": false}'
    )
    layer = 2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 4096 + 2 * 1024
    count = 16 * layer + 2 * 1000 * 1024 + 1024
    _, _, parameters, state, *_ = footprint.row(str(tmp_path), rows=8, length=128, slots=8, devices=1).split("|")
    assert parameters.strip() == f"{count / 1e6:,.0f} M"
    assert float(state) == round(20 * count / 1e9, 1) > 5


def test_more_devices_hold_less_and_more_rows_more():
    def columns(**sizes):
        return [float(cell) for cell in footprint.row("llama-3.2-1b", **sizes).split("|")[3:8]]

    small, spread, long = (
        columns(rows=8, length=1024, slots=64, devices=1), columns(rows=8, length=1024, slots=64, devices=4),
        columns(rows=8, length=2048, slots=64, devices=1),
    )  # fmt: skip
    assert all(a > b for a, b in zip(small, spread, strict=True))
    assert long[0] == small[0]
    assert all(a < b for a, b in zip(small[1:], long[1:], strict=True))
    assert small[1] > small[2] > small[3] > small[0]  # remat keeps less, bfloat16 masters are half


def test_devices_divide_the_rows():
    with pytest.raises(SystemExit, match="rows and slots are divided over devices=3; give multiples of it"):
        footprint.main(["devices=3"])
