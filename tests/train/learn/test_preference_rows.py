"""Every row of docs/methods/objective.yaml trains: its own keys through the verb, with a tiny model."""

import dataclasses

import jax
import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.line_cases import write
from helpers.tiny_tokenizers import CHATML, byte_level

from train.cli import __main__ as cli
from train.data.formats import read_row
from train.learn.pairs import encode_pair
from train.log import UserError
from train.models.decoder import init
from train.models.hf import save_hf
from train.models.open import Model, random_model
from train.models.tokenizer import Tokenizer
from train.runtime.jsonl import read_jsonl
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

ROWS = {row["name"]: row for row in yaml.safe_load((ROOT / "docs/methods/objective.yaml").read_text())}
TRAINED = [name for name, row in ROWS.items() if row["verb"] == "sft"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    small = random_model(SIZES, make_mesh(Mesh()), seed=0)
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, chat_template=CHATML)
    config = dataclasses.replace(small.config, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_ids)
    return Model(config, init(config, jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    """What the capitals of a row stand for."""
    home = tmp_path_factory.mktemp("rows")
    save_hf(home / "hf", model.config, model.params, tokenizer_from=model.tokenizer)
    asked = [[{"role": "user", "content": f"{i} plus {i}?"}] for i in range(4)]
    answers = [[[{"role": "assistant", "content": f"It is {2 * i + d}."}] for d in (0, 1)] for i in range(4)]
    together = list(zip(asked, answers, strict=True))
    return {
        "MODEL": home / "hf",
        "EXAMPLES": write(
            home / "a.jsonl", [{"messages": q + a[0], "reward": i / 4} for i, (q, a) in enumerate(together)]
        ),
        "PAIRS": write(home / "b.jsonl", [{"prompt": q, "chosen": a[0], "rejected": a[1]} for q, a in together]),
        "LABELLED": write(
            home / "c.jsonl",
            [{"prompt": q, "completion": a[i % 2], "label": i % 2 == 0} for i, (q, a) in enumerate(together)],
        ),
    }


def train(places, keys, out):
    (data,) = [places[key.removeprefix("data.path=")] for key in keys if key.startswith("data.path=")]
    settings = [key for key in keys if not key.startswith("data.path=")]
    words = ["sft", str(places["MODEL"]), str(data), str(out), *settings]
    words += ["sft.epochs=1", "sft.batch=2", "sft.max_length=96", "sft.learning_rate=1e-3"]
    return cli.main(words)


@pytest.mark.parametrize("name", TRAINED)
def test_a_row_trains(places, tmp_path, name, capsys):
    assert train(places, ROWS[name]["keys"], tmp_path / "out") == 0, capsys.readouterr().err
    (record,) = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert record["steps"] == 2
    assert record["loss_last"] != record["loss_first"]


def test_held_out_pairs_give_the_plain_loss_of_their_chosen_answers(places, model, tmp_path, capsys):
    keys = [*ROWS["DPO"]["keys"], "sft.watch.held_out=1"]
    assert train(places, keys, tmp_path / "out") == 0, capsys.readouterr().err
    (record,) = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert record["loss_first"] == pytest.approx(np.log(2), abs=1e-3)
    clueless = np.log(model.config.vocab_size)
    assert record["held_out_loss"] == pytest.approx(clueless, rel=0.05)
    assert record["tokens"] == 3  # pairs
    (steps,) = tmp_path.glob("out/**/steps.jsonl")
    assert {"preferred", "margin", "chosen_logp", "rejected_logp"} <= set(read_jsonl(steps)[0])


def test_pairs_are_shown_before_they_are_learnt(places, capsys):
    assert cli.main(["data", str(places["PAIRS"]), "examples=1"]) == 0
    said = capsys.readouterr().out
    assert "format pairs, told by the keys chosen, rejected" in said
    assert "assistant: ⟦It is 0.⟧\nrejected: It is 1." in said
    assert cli.main(["data", str(places["PAIRS"]), "examples=1", f"model={places['MODEL']}"]) == 0
    assert "rejected: ⟦It is 1.<|im_end|>⟧" in capsys.readouterr().out


def test_data_of_another_kind_is_refused_in_one_line(places, tmp_path, capsys):
    assert train(places, ["data.path=PAIRS"], tmp_path / "a") == 2
    assert "data.format=chosen" in capsys.readouterr().err
    assert train(places, ["data.path=EXAMPLES", "sft.objective={name: dpo}"], tmp_path / "b") == 2
    assert "prompt, chosen, rejected" in capsys.readouterr().err


def test_the_last_turn_of_each_answer_is_learnt_and_nothing_else(model):
    start = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"))]
    answers = [[{"role": "assistant", "content": text}] for text in ("It is 4", "5")]
    record = read_row({"chosen": start + answers[0], "rejected": start + answers[1]})
    pair = encode_pair(model.tokenizer, record)
    begin = pair["prompt_length"]
    said = [model.tokenizer.decode(pair[name][begin:], special=True) for name in ("tokens", "rejected")]
    assert said == ["It is 4<|im_end|>", "5<|im_end|>"]
    assert pair["tokens"][:begin] == pair["rejected"][:begin]


def test_a_template_that_reads_the_answer_first_is_refused(model):
    template = "{{ messages[-1]['content'] if messages[-1]['role'] == 'assistant' else 'x' }}" + CHATML
    tokenizer = dataclasses.replace(model.tokenizer, chat_template=template)
    better, worse = ([{"role": "assistant", "content": text}] for text in "bc")
    record = read_row({"prompt": "a", "chosen": better, "rejected": worse})
    with pytest.raises(UserError, match=r"prefix-stable|renders the prompt otherwise"):
        encode_pair(tokenizer, record)
