"""`jaxmerge sft` on the formats people have: what is learnt, packed or not, mixed, resumed; what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import yaml
from helpers.line_cases import ALPACA, CHAT, CHOICES, GSM8K, MBPP, write
from helpers.tiny_tokenizers import CHATML, MARKED, byte_level

from train.cli import __main__ as cli
from train.cli import verbs
from train.data.builders import prepare
from train.data.versions import write_version
from train.evaluate.run import open_suite
from train.evaluate.settings import QuestionOptions
from train.learn import sources
from train.learn.progress import Checkpoints
from train.learn.run import describe_rows, finetune, read_rows
from train.learn.settings import Data, Finetune, Part
from train.learn.sft import fine_tune
from train.learn.sources import ReasoningGym, load_sources
from train.log import UserError
from train.models.decoder import init
from train.models.hf import save_hf
from train.models.open import Model, random_model
from train.models.tokenizer import Tokenizer
from train.resolve import build
from train.runtime.folder import write_config
from train.runtime.jsonl import read_jsonl
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.tasks.settings import FamilySpec

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512, "vocab_size": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    small = random_model({k: v for k, v in SIZES.items() if k != "vocab_size"}, make_mesh(Mesh()), seed=0)
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, chat_template=CHATML)
    config = dataclasses.replace(small.config, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_ids)
    return Model(config, init(config, jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    save_hf(path, model.config, model.params, tokenizer_from=model.tokenizer)
    return path


def finetune_of(**given):
    return build(Finetune, {"model": {"path": "x"}, **given})


@pytest.mark.parametrize("row", [GSM8K, MBPP, CHAT, ALPACA, CHOICES, {"prompt": "1+1=", "completion": "2"}])
def test_every_format_is_accepted(tmp_path, model, row):
    path = write(tmp_path / "data.jsonl", [row, row])
    config = finetune_of(data={"path": str(path)}, sft={"max_length": 500})
    rows, _, notes = read_rows(config, model, tmp_path / "home")
    assert rows.summary()["examples"] == notes[0]["examples"] == 2
    assert rows.take(np.array([0]), 0)["weights"].sum() > 0


def run(folder, data, out, *assignments):
    settings = ["sft.epochs=1", "sft.batch=2", "sft.max_length=500", *assignments]
    return verbs.sft([str(folder), str(data), str(out)], settings, False)


def test_the_command_takes_a_model_a_file_and_a_folder(tmp_path, folder, capsys):
    data = write(tmp_path / "a.jsonl", [ALPACA] * 2)
    assert cli.main(["sft", str(folder), str(data), str(tmp_path / "out"), "sft.epochs=1", "sft.batch=2"]) == 0
    assert (tmp_path / "out" / "hf" / "config.json").exists()
    card = (tmp_path / "out" / "hf" / "README.md").read_text()
    assert "| a.jsonl | 2 |" in card
    assert "in 1 steps" in card
    assert f"# out\n\n{folder.name}, fine-tuned by jaxmerge." in card
    assert str(tmp_path) not in card.split("<details>")[0]
    assert cli.main(["sft", str(folder), str(data)]) == 2
    assert "wanted CONFIG or MODEL DATA OUT" in capsys.readouterr().err


def record_of(out):
    (row,) = read_jsonl(out / "metrics.jsonl")
    return row


def test_the_verb_packs_mixes_counts_and_says_so(tmp_path, folder, capsys):
    rows = [{**GSM8K, "question": f"{i}? {GSM8K['question']}"} for i in range(6)] + [
        {**GSM8K, "question": "long " * 200}
    ]
    data = write(tmp_path / "gsm8k.jsonl", rows)
    assert run(folder, data, tmp_path / "out", "sft.packing=true") == 0
    said = capsys.readouterr().out
    assert "7 examples" in said
    assert "% unpacked)" in said
    assert "longer than sft.max_length: 1 dropped, 0 cut" in said
    record = record_of(tmp_path / "out")
    assert record["dropped"] == 1
    assert record["examples"] == 6
    assert record["rows"] < 6
    assert record["efficiency"] > record["unpacked"] * 0.9
    assert (tmp_path / "out" / "hf" / "config.json").exists()
    assert run(folder, data, tmp_path / "out", "sft.packing=true") == 0  # finished: changes nothing
    # Unpacked, an epoch has the same targets.
    assert run(folder, data, tmp_path / "plain") == 0
    assert record_of(tmp_path / "plain")["tokens"] == record["tokens"]


def test_a_changed_file_is_refused_on_the_way(tmp_path, folder, monkeypatch, capsys):
    data = write(tmp_path / "a.jsonl", [GSM8K] * 4)

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    home = tmp_path / "out" / "data"
    monkeypatch.setattr(sources, "tokenise", stop)
    with pytest.raises(Stop):
        run(folder, data, tmp_path / "out")
    monkeypatch.undo()
    (written,) = home.glob("part-0/*/*/*/dataset_info.json")
    torn = written.parent.with_name("1.0.0.incompleteX")  # what TFDS leaves when it is killed
    torn.mkdir()
    (torn / written.name).write_text("{")
    write(data, [GSM8K] * 5)
    with pytest.raises(UserError, match="was made from other contents than are there now"):
        run(folder, data, tmp_path / "out")
    write(data, [GSM8K] * 4)
    assert run(folder, data, tmp_path / "out") == 0


def test_a_template_of_ones_own_is_used_and_saved(tmp_path, folder):
    template = tmp_path / "own.jinja"
    template.write_text(MARKED.replace("<|im_start|>", "<|endoftext|>"))
    data = write(tmp_path / "a.jsonl", [CHAT] * 2)
    run(folder, data, tmp_path / "out", f"data.chat_template={template}")
    saved = Tokenizer.from_folder(tmp_path / "out" / "hf")
    assert saved.chat_template == template.read_text()
    with pytest.raises(UserError, match=r"data\.chat_template: .*nowhere.* cannot be read"):
        run(folder, data, tmp_path / "other", "data.chat_template=nowhere")


def test_learning_the_last_turn_alone(tmp_path, model):
    data = write(tmp_path / "a.jsonl", [CHAT])
    learnt = []
    for learn in ("assistant", "last"):
        config = finetune_of(data={"path": str(data), "learn": learn})
        learnt.append(read_rows(config, model, tmp_path / learn)[0].take(np.array([0]), 0)["weights"].sum())
    assert learnt[0] > learnt[1] > 0
    config = finetune_of(data={"path": str(data), "learn": "each"})
    rows, *_ = read_rows(config, model, tmp_path / "each")
    assert rows.summary()["examples"] == 2
    assert rows.take(np.array([0, 1]), 0)["weights"].sum() == learnt[0]


def samples(tmp_path, model, text="2"):
    prompt = model.tokenizer.encode("1+1=")
    row = {
        "question_id": "q", "family": "f", "prompt": "1+1=", "completion": text,
        "tokens": [*prompt, *model.tokenizer.encode("2"), model.tokenizer.eos_ids[0]],
        "prompt_length": len(prompt), "score": 1.0, "weight": 1.0, "sample": 0,
    }  # fmt: skip
    write_version(tmp_path / "samples", "round_1", "1.0.0", [row | {"question_id": f"q{i}"} for i in range(8)], {})
    return tmp_path / "samples" / "round_1" / "1.0.0"


def test_real_and_synthetic_examples_are_mixed_at_their_rates(tmp_path, model):
    data = {
        "parts": [
            {"path": str(write(tmp_path / "real.jsonl", [GSM8K] * 3)), "rate": 0.25},
            {"path": str(samples(tmp_path, model)), "rate": 0.5},
            {"families": [{"family": "chain_sum", "domain": "id", "train": 4}], "rate": 0.25},
        ],
        "draws": 16,
    }
    config = finetune_of(data=data, sft={"epochs": 2})
    rows, _, notes = read_rows(config, model, tmp_path / "home")
    assert [note["examples"] for note in notes] == [3, 8, 4]
    for epoch in rows.epochs:
        numbers = [i for row in epoch for i in row]
        assert [sum(a <= i < b for i in numbers) for a, b in ((0, 3), (3, 11), (11, 15))] == [4, 8, 4]
    assert "rate 0.5" in describe_rows(rows, notes)[1]
    both = build(Data, {"parts": [{**p, "rate": None} for p in data["parts"]]})
    config = Finetune(model=config.model, data=both)
    rows, _, _ = read_rows(config, model, tmp_path / "home")
    assert sorted(i for row in rows.epochs[0] for i in row) == list(range(15))


def test_samples_of_another_tokenizer_are_refused(tmp_path, model):
    path = samples(tmp_path, model, text="3")
    with pytest.raises(UserError, match="do not spell its text with this model's tokenizer"):
        load_sources(Data(path=str(path)), model.tokenizer, home=tmp_path, seed=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"give one of data\.path, data\.parts and data\.pretraining_tokens"),
        ({"path": "a", "parts": [{"path": "b"}]}, "give one of"),
        ({"parts": [{"path": "b", "rate": 1}, {"path": "c"}]}, "1 of 2 parts have a rate"),
        ({"parts": [{"path": "b", "rate": 0}]}, "the rate of b is 0"),
        ({"parts": [{}]}, "either a path or families"),
        ({"parts": [{"path": "b"}], "split": "test"}, "give them to each of"),
        ({"parts": [{"families": [{"family": "gcd", "domain": "id", "test": 1}], "format": "chat"}]}, "has neither"),
        ({"path": "a", "draws": 0}, "draws is 0; it must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        build(Data, data)


def test_what_a_source_does_not_have_is_refused(tmp_path, model):
    path = write(tmp_path / "a.jsonl", [GSM8K, {"messages": [{"role": "user", "content": "x"}]}])
    for number, (data, message) in enumerate(
        [
            (Data(path=str(path), split="test"), "a file has no split 'test'"),
            (Data(path=str(path)), "a.jsonl, example 2: no assistant's turn"),
            (Data(path=str(tmp_path), format="chat"), "has neither format nor ignored keys"),
            (Data(path=str(tmp_path)), "not the folder of a TFDS version"),
            (Data(path=str(samples(tmp_path, model)), split="test"), "a run's samples have no split"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            load_sources(data, model.tokenizer, home=tmp_path / str(number), seed=0)
    families = (FamilySpec("chain_sum", "id", {}, test=2),)
    with pytest.raises(UserError, match="no split 'train'; there are: test"):
        load_sources(Data(parts=(Part(families=families),)), model.tokenizer, home=tmp_path / "f", seed=0)


def test_a_packed_and_mixed_run_that_is_stopped_ends_as_the_undisturbed_one(tmp_path, model):
    """Bit for bit, from a checkpoint within the second epoch."""
    data = {
        "parts": [
            {"path": str(write(tmp_path / f"{name}.jsonl", rows)), "rate": rate}
            for name, rows, rate in (
                ("a", [{**ALPACA, "output": "x" * n} for n in range(1, 9)], 0.5),
                ("b", [CHAT] * 3, 1),
            )
        ]
    }
    config = finetune_of(data=data, sft={"epochs": 2, "batch": 2, "packing": True, "max_length": 400})

    class Memory(Checkpoints):
        kept: tuple | None = None

        def restore(self, like):
            return self.kept or (None, 0, [])

        def save(self, state, step, metrics):
            if self.kept is None:
                self.kept = (jax.tree.map(np.array, state), step, [dict(m) for m in metrics])

    def tune(kept, home):
        rows, *_ = read_rows(config, model, home)
        half = max(1, -(-rows.count(0) // 2)) + 1
        sft = dataclasses.replace(config.sft, checkpoint_every=half)
        mesh = make_mesh(Mesh())
        return fine_tune(model.config, model.params, rows, sft, mesh=mesh, seed=0, checkpoints=kept)[0], half

    memory = Memory()
    whole, half = tune(memory, tmp_path / "one")
    assert memory.kept is not None
    assert memory.kept[1] == half
    again, _ = tune(memory, tmp_path / "two")
    jax.tree.map(np.testing.assert_array_equal, whole, again)


# --- evaluating on a file ---


def test_a_file_of_questions_is_evaluated(tmp_path, folder, capsys):
    for name, rows in (("g", [GSM8K] * 2), ("c", [CHOICES, {**CHOICES, "question": "Other?"}])):
        path = write(tmp_path / f"{name}.jsonl", rows)
        out = tmp_path / f"{name}.json"
        words = ["evaluate", str(folder), str(path), "max_new_tokens=4", "slots=8", f"out={out}"]
        assert cli.main(words) == 0
        result = json.loads(out.read_text())
        assert result["rows"][0]["n"] == len({r["question"] for r in rows})
        if name == "c":
            assert set(result["likelihood"]) == {"acc", "acc_norm"}
            assert "acc_norm" in capsys.readouterr().out
    assert cli.main(["evaluate", str(folder), str(path), "prompt=cot"]) == 2
    assert "are of gsm8k questions" in capsys.readouterr().err
    path = write(tmp_path / "m.jsonl", [{"instruction": "Say it.", "output": "it"}])
    assert cli.main(["evaluate", str(folder), str(path)]) == 2
    assert "lines of the format alpaca cannot be asked" in capsys.readouterr().err


def test_a_base_model_is_asked_by_examples_or_likelihood(tmp_path, folder, capsys):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / "chat_template.jinja").unlink()
    path = write(tmp_path / "g.jsonl", [GSM8K])
    assert cli.main(["evaluate", str(base), str(path)]) == 2
    assert "no chat template to ask gsm8k questions with; take prompt=cot" in capsys.readouterr().err
    path = write(tmp_path / "c.jsonl", [CHOICES])
    out = tmp_path / "c.json"
    assert cli.main(["evaluate", str(base), str(path), f"out={out}"]) == 0
    assert json.loads(out.read_text())["rows"] == []


def test_every_key_of_evaluating_a_file_is_read(tmp_path, folder):
    """What each changes; the ones of the engine are the engine's own (tests/train/cli/test_main.py)."""
    rows = [{**GSM8K, "question": f"{i}?"} for i in range(4)]
    path = write(tmp_path / "g.jsonl", rows)
    assert len(open_suite(path, QuestionOptions()).all) == 4
    assert len(open_suite(path, QuestionOptions(limit=3)).all) == 3
    assert open_suite(path, QuestionOptions()).specs[0].family == "gsm8k"
    suite = open_suite(path, QuestionOptions(prompt="cot", extract="strict"))
    assert suite.prompt(suite.all[0]).startswith("Q: There are 15 trees")
    assert suite.verify(suite.all[0], "72") == 0.0
    as_problem = open_suite(path, QuestionOptions(task="problem"))
    assert as_problem.specs[0].family == "problem"
    families = (FamilySpec("chain_sum", "id", {}, train=2, test=3),)
    version = prepare(ReasoningGym(families=families, seed=0, data_dir=tmp_path / "data"))
    assert len(open_suite(version, QuestionOptions(task="gsm8k", split="test")).all) == 3
    with pytest.raises(UserError, match="does not say how answers are judged; set task="):
        open_suite(version, QuestionOptions())
    with pytest.raises(UserError, match="limit is 0; it must be at least 1"):
        QuestionOptions(limit=0)


def test_a_run_begun_before_optax_is_not_gone_on_with(tmp_path):
    """Before anything is read: there is neither the model nor the file."""
    config = finetune_of(data={"path": "nowhere.jsonl"})
    write_config(tmp_path, config)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del values["sft"]["optimizer"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"begun before there was sft\.optimizer.*finish it with commit aa22b70"):
        finetune(config, name="x", out=tmp_path)


def test_a_run_tells_its_template_the_date_it_began(tmp_path, folder):
    """Gone on with on another day, it has the same examples and ends with the same weights."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + CHATML)
    data = write(tmp_path / "data.jsonl", [CHAT, CHAT])
    digests = {}
    for name, date in (("a", "2025-12-31"), ("b", "2026-01-01"), ("again", "2025-12-31")):
        out = tmp_path / name
        out.mkdir()
        (out / "date.txt").write_text(f"{date}\n")  # the day on which it was begun
        assert run(folder, data, out, f"data.chat_template={template}") == 0
        assert (out / "date.txt").read_text().strip() == date
        digests[name] = read_jsonl(out / "metrics.jsonl")[-1]["digest"]
    assert digests["a"] == digests["again"] != digests["b"]
    assert run(folder, data, tmp_path / "undated") == 0
    assert not (tmp_path / "undated" / "date.txt").exists()
