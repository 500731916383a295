"""`benchmarks/footprint.py`: the tables of docs/gpu.md are what it prints, and `state` is what `--dry-run` says."""

import re

import pytest
from helpers import ROOT

from benchmarks import footprint
from train.improve.dry import show_plan
from train.improve.settings import Improve
from train.resolve import build

PAGE = (ROOT / "docs/gpu.md").read_text()


@pytest.mark.parametrize("words", [[], ["models=qwen2.5-7b", "devices=4"]])
def test_the_tables_of_the_page_are_printed(words, capsys):
    footprint.main(words)
    assert capsys.readouterr().out.strip() in PAGE


def test_the_state_is_what_a_dry_run_says(tmp_path, capsys):
    """A model of 0.2 G parameters; neither loads anything."""
    sizes = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 128,
    }  # fmt: skip
    family = {"family": "gcd", "domain": "id", "args": {"max_value": 30}, "train": 2, "test": 2}
    config = {"model": {"random": sizes}, "tasks": {"style": "compact", "families": [family]}, "methods": {"plain": {}}}
    show_plan(build(Improve, config))
    (said,) = re.findall(r"fine-tuning ([\d.]+) GB", capsys.readouterr().out)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, '
        + str(sizes)[1:].replace("'", '"')
    )
    line = footprint.row(str(tmp_path), rows=8, length=128, slots=8, devices=1)
    state = float(line.split("|")[3])
    assert state == pytest.approx(float(said), abs=0.051)  # one and two digits after the point
    assert float(said) == pytest.approx(20 * 189e6 / 1e9, rel=0.01)


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
