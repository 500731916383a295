"""Lines of JSON to records: every format, what is refused, and the TFDS versions written from them."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from helpers.line_cases import ALPACA, CHAT, CHOICES, GSM8K, MBPP, write

from train.data.formats import read_row
from train.data.records import Record, columns, from_columns
from train.data.tfds_sets import SETS, split_options
from train.log import UserError
from train.tasks.settings import FamilySpec


def said(record, role):
    return [m["content"] for m in record.messages if m["role"] == role]


def test_gsm8k():
    record = read_row(GSM8K)
    assert record.answer == "72"
    assert record.solution == "She sold 48/2 = 24 clips in May.\nIn all 48+24 = 72 clips.\n#### 72"
    assert read_row({"question": "?", "answer": "so\n#### 1,450"}).answer == "1450"


def test_mbpp():
    record = read_row(MBPP)
    assert record.tests == ("import math", *MBPP["test_list"])
    assert record.solution == "```python\ndef add(a, b):\n  return a + b\n```"
    assert record.question.endswith("\n\nassert add(1, 2) == 3\nassert add(0, 0) == 0")
    assert record.id == "11"
    assert read_row({**{k: v for k, v in MBPP.items() if k != "text"}, "prompt": "p"}).question.startswith("p\n")


@pytest.mark.parametrize("row", [GSM8K, MBPP, CHAT, ALPACA, CHOICES])
def test_a_line_of_any_format_may_have_a_reward(row):
    record = read_row(row | {"reward": -2})
    assert record.reward == -2.0
    assert record.id == read_row(row).id
    assert read_row(row).reward == 0.0
    (stored,) = columns([record])
    assert from_columns(stored) == record
    del stored["reward"]  # a set written before there were rewards
    assert from_columns(stored).reward == 0.0
    for wrong in ("2", True, float("nan"), None):
        with pytest.raises(UserError, match=r"reward is .*; a finite number is wanted"):
            read_row(row | {"reward": wrong})


def test_conversations():
    record = read_row(CHAT)
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert said(record, "assistant") == ["Hello", "4"]
    older = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert said(read_row(older), "assistant") == ["Hello"]


def test_alpaca_and_prompts():
    assert read_row(ALPACA).question == "Sort these.\n\n3, 1, 2"
    assert read_row({**ALPACA, "input": ""}).question == "Sort these."
    assert said(read_row({**ALPACA, "system": "Be brief."}), "system") == ["Be brief."]
    plain = read_row({"prompt": "1+1=", "completion": "2"})
    assert plain.plain
    assert said(plain, "assistant") == ["2"]


@pytest.mark.parametrize("answer", ["B", 1, "iron"])
def test_choices(answer):
    record = read_row({**CHOICES, "answer": answer})
    assert (record.answer, record.choices) == ("B", ("wood", "iron", "glass"))
    arc = {"text": CHOICES["choices"], "label": ["1", "2", "3"]}
    assert read_row({"question": "?", "choices": arc, "answerKey": "2"}).answer == "B"


def test_problems():
    assert read_row({"problem": "Half?", "answer": "\\frac{1}{2}", "solution": "It is it."}).solution == "It is it."
    assert read_row({"question": "6*7?", "answer": 42}).answer == "42"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"the keys text fit no format; set data\.format"),
        ({**ALPACA, **CHAT}, "fit chat and alpaca"),
        ({**ALPACA, "tools": []}, r"format alpaca: the key 'tools' is not understood .* data\.ignore=\[tools\]"),
        ({**CHAT, "messages": "hi"}, "messages is 'hi'"),
        ({"messages": []}, "a conversation without messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0: role is 'bot'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0: content is None"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "message 0: tool_calls is not understood"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "from one of system, human"),
        ({**CHOICES, "answer": "D"}, "answer is 'D'; wanted one of A, B, C"),
        ({**CHOICES, "answer": 3}, "answer is 3"),
        ({**CHOICES, "choices": ["one"]}, "two or more texts"),
        ({**MBPP, "test_list": "assert"}, "test_list is 'assert'"),
        ({"prompt": 3, "completion": "x"}, "prompt is 3; a text is wanted"),
    ],
)
def test_what_is_not_understood_is_named(row, message):
    with pytest.raises(UserError, match=message):
        read_row(row)


def test_a_format_may_be_given_and_keys_passed_over():
    assert read_row({**ALPACA, "tools": [], "note": 1}, ignore=["tools", "note"]).solution == "1, 2, 3"
    with pytest.raises(UserError, match="format gsm8k: question is missing; found instruction"):
        read_row(ALPACA, "gsm8k")
    with pytest.raises(UserError, match="answer ends in '42'; GSM8K's end in"):
        read_row({"question": "6*7?", "answer": "42"}, "gsm8k")
    with pytest.raises(UserError, match="no format 'gsm9k'; choose one of prompt, chat"):
        read_row(GSM8K, "gsm9k")


def test_ids_are_the_lines_own_or_made_from_the_contents():
    assert read_row({**GSM8K, "id": 7}).id == "7"
    assert read_row(GSM8K).id == read_row(dict(GSM8K)).id != read_row(CHAT).id
    for row in (GSM8K, MBPP, CHAT, ALPACA, CHOICES):
        (stored,) = columns([read_row(row)])
        as_bytes = {
            k: [x.encode() for x in v] if isinstance(v, list) else v.encode() if isinstance(v, str) else v
            for k, v in stored.items()
        }
        assert from_columns(stored) == from_columns(as_bytes) == read_row(row)


# --- TFDS versions ---


def test_a_file_becomes_a_tfds_version_in_its_order(tmp_path):
    from train.data.builders import JsonLines, prepare, read_folder

    rows = [{**GSM8K, "question": f"{i}? {GSM8K['question']}"} for i in range(25)]
    path = write(tmp_path / "GSM8K train.jsonl", rows)
    builder = JsonLines(path=path, data_dir=tmp_path / "data")
    folder = prepare(builder)
    assert folder.parent.name.startswith("gsm8k_train_")
    assert list(folder.glob("*.array_record*"))
    records = read_folder(folder)
    assert records == [read_row(row) for row in rows]
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare(JsonLines(path=path, data_dir=tmp_path / "data")) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    write(path, rows[:-1])
    changed = prepare(JsonLines(path=path, data_dir=tmp_path / "data"))
    assert changed != folder
    assert len(read_folder(changed)) == 24
    # What a killed writer left is written again; what was damaged later is named.
    (changed / "checksums.json").unlink()
    assert len(read_folder(prepare(JsonLines(path=path, data_dir=tmp_path / "data")))) == 24
    (record,) = changed.glob("*.array_record*")
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{record.name}: has .* truncated"):
        prepare(JsonLines(path=path, data_dir=tmp_path / "data"))


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    from train.data.builders import JsonLines, prepare

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    path = write(tmp_path / "x.jsonl", [GSM8K])
    prepare(JsonLines(path=path, data_dir=tmp_path / "data"))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_is_said_of_the_dataset(tmp_path, monkeypatch):
    from train.data.builders import JsonLines, prepare

    def full(self, **how):
        pathlib.Path(self.data_dir).mkdir(parents=True)
        raise RuntimeError("write() failed: No space left on device; writing x.array_record; at byte 9")

    monkeypatch.setattr(JsonLines, "download_and_prepare", full)
    builder = JsonLines(path=write(tmp_path / "x.jsonl", [GSM8K]), data_dir=tmp_path / "data")
    with pytest.raises(UserError, match=f"{builder.data_dir}: could not write the dataset: No space left on device$"):
        prepare(builder)
    assert not pathlib.Path(builder.data_dir).exists()


def test_a_bad_line_is_named(tmp_path):
    from train.data.builders import read_records

    path = write(tmp_path / "a.jsonl", [GSM8K, {"question": "?", "answer": 3, "choices": ["a", "b"]}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: answer is 3; wanted one of A, B"):
        read_records(path)
    with pytest.raises(UserError, match="no examples"):
        read_records(write(tmp_path / "b.jsonl", []))
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "c.jsonl")


def test_a_suite_becomes_a_tfds_version_with_its_splits(tmp_path):
    from train.data.builders import prepare, read_folder
    from train.learn.sources import ReasoningGym

    families = (FamilySpec("chain_sum", "id", {"max_terms": 2}, train=6, test=3), FamilySpec("gcd", "ood", test=2))
    folder = prepare(ReasoningGym(families=families, seed=4, data_dir=tmp_path))
    train, test = read_folder(folder, "train"), read_folder(folder, "test")
    assert (len(train), len(test)) == (6, 5)
    assert not {r.id for r in train} & {r.id for r in test}
    assert all(r.solution.endswith(f"Answer: {r.answer}") for r in [*train, *test])
    assert read_folder(prepare(ReasoningGym(families=families, seed=4, data_dir=tmp_path / "again"))) == train
    with pytest.raises(UserError, match="no split 'validation'; there are: t"):
        read_folder(folder, "validation")
    with pytest.raises(UserError, match="not the folder of a TFDS version"):
        read_folder(tmp_path)


def test_writing_and_reading_need_no_tensorflow(tmp_path):
    path = write(tmp_path / "a.jsonl", [GSM8K])
    code = (
        "import sys\n"
        "from train.data.builders import JsonLines, prepare, read_folder\n"
        f"folder = prepare(JsonLines(path={str(path)!r}, data_dir={str(tmp_path / 'data')!r}))\n"
        "assert read_folder(folder)[0].answer == '72'\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- sets that TFDS has: their features as its builders declare them, records of their kind ---


def features_of(name):
    import tensorflow_datasets as tfds

    T = tfds.features
    letters, text = T.ClassLabel(names=list("ABCDE")), T.Text()
    math_qa = "Problem Rationale options correct annotated_formula linear_formula category correct_option"
    lbpp = "task_id language title instruction completion test_file signature test_setup"
    return {
        "math_qa": dict.fromkeys(math_qa.split(), text),
        "ai2_arc": {
            "id": text,
            "question": text,
            "choices": T.Sequence({"text": text, "label": letters}),
            "answerKey": letters,
        },
        "openbookqa": {
            "question": dict.fromkeys(("stem", "choice_A", "choice_B", "choice_C", "choice_D"), text),
            "fact1": text,
            "humanScore": T.Tensor(shape=(), dtype=np.float32),
            "clarity": T.Tensor(shape=(), dtype=np.float32),
            "turkIdAnonymized": text,
            "answerKey": T.ClassLabel(names=list("ABCD")),
        },
        "lbpp": {
            **dict.fromkeys(lbpp.split(), text),
            "test_list": T.Sequence(text),
            "categories": T.Sequence(text),
        },
    }[name]  # fmt: skip


ROWS = {
    "math_qa": {
        "Problem": "a shopkeeper sold an article for 120 with 20 % profit . its cost ?",
        "Rationale": '"120 / 1.2 = 100 , answer is c"',
        "options": "a ) 90 , b ) 96 , c ) 1,00 , d ) 104 , e ) none",
        "correct": "c",
        "annotated_formula": "",
        "linear_formula": "",
        "category": "gain",
        "correct_option": "1,00",
    },
    "ai2_arc": {
        "id": "Mercury_7",
        "question": "Which is a metal?",
        "choices": {"text": ["wood", "iron", "glass"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "question": {"stem": "Sun?", "choice_A": "star", "choice_B": "moon", "choice_C": "sea", "choice_D": "tree"},
        "fact1": "the sun is a star",
        "humanScore": 1.0,
        "clarity": 2.0,
        "turkIdAnonymized": "x",
        "answerKey": "A",
    },
    "lbpp": {
        "task_id": "lbpp/3",
        "language": "python",
        "title": "add",
        "instruction": "Add two numbers.",
        "completion": "def add(a, b):\n    return a + b\n",
        "test_file": "",
        "test_list": ["assert add(1, 2) == 3"],
        "signature": "def add(a, b)",
        "categories": ["math"],
        "test_setup": "from code import add",
    },
}
WANTED = {
    "math_qa": (("90", "96", "1,00", "104", "none"), "C", "120 / 1.2 = 100 , answer is c\nAnswer: C"),
    "ai2_arc": (("wood", "iron", "glass"), "B", "B"),
    "openbookqa": (("star", "moon", "sea", "tree"), "A", "A"),
    "lbpp": ((), "", "```python\ndef add(a, b):\n    return a + b\n```"),
}


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_set_that_tfds_has_is_read(tmp_path, name):
    import tensorflow_datasets as tfds

    from train.data.builders import read_folder

    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=str(tmp_path), module_name="x"
        ),
        features=tfds.features.FeaturesDict(features_of(name)),
    )
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    pathlib.Path(info.data_dir).mkdir(parents=True, exist_ok=True)
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [ROWS[name]] * 2})
    writer.close_all()
    first, _ = read_folder(info.data_dir)
    assert isinstance(first, Record)
    assert (first.choices, first.answer, first.solution) == WANTED[name]
    if name == "lbpp":
        assert first.tests == ("from code import add", "assert add(1, 2) == 3")
        assert "def add(a, b)" in first.question
        assert first.id == "lbpp/3"


def test_the_features_of_the_sets_are_those_tfds_declares(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where each of its builders leaves a folder
    for name in SETS:
        config = {"ai2_arc": "ARC-Challenge", "lbpp": "python"}.get(name)
        builder = tfds.builder_cls(name)(data_dir=str(tmp_path), **({"config": config} if config else {}))
        assert repr(builder.info.features) == repr(tfds.features.FeaturesDict(features_of(name)))


def test_a_set_without_a_mapping_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    from train.data.builders import read_folder

    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="squad", version=tfds.core.Version("1.0.0"), data_dir=str(tmp_path), module_name="x"
        ),
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    )
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    pathlib.Path(info.data_dir).mkdir(parents=True, exist_ok=True)
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"text": "x"}]})
    writer.close_all()
    with pytest.raises(UserError, match=r"the set 'squad' has the features text; wanted .* math_qa"):
        read_folder(info.data_dir)


def test_options_of_math_qa():
    assert split_options("a ) 3 : 2 , b ) 1,000 , c ) none of these") == ["3 : 2", "1,000", "none of these"]
    assert split_options("['a ) 38', 'b ) 27.675', 'c ) 30']") == ["38", "27.675", "30"]
    with pytest.raises(UserError, match="in this order"):
        split_options("a ) 3 , c ) 4")
