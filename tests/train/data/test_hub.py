"""Datasets of the hub: names, what is in which file, the cache, the commit of a run, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.line_cases import CHOICES, GSM8K, MBPP, write
from helpers.played_hub import as_lines, as_parquet, forget, played_hub

from train.data import hub
from train.data.builders import read_folder, read_records
from train.data.layout import lay_out
from train.improve.settings import Improve
from train.learn.settings import Data, Part
from train.learn.sources import open_part
from train.log import UserError
from train.resolve import build, to_dict
from train.runtime.folder import write_config
from train.search.questions import read_questions
from train.search.settings import Questions
from train.tasks import FamilySpec, build_suite

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# Words
"""


def questions(split: str, n: int) -> list[dict]:
    return [{**GSM8K, "question": f"{split} {i}? {GSM8K['question']}"} for i in range(n)]


def gsm8k(served, n: int = 6) -> str:
    return served.add(
        "datasets/openai/gsm8k",
        {
            "README.md": CARD,
            "main/train-00000-of-00001.parquet": as_parquet(questions("train", n)),
            "main/test-00000-of-00001.parquet": as_parquet(questions("test", n)),
            "socratic/train-00000-of-00001.parquet": as_parquet(questions("socratic", n)),
        },
    )


@pytest.fixture
def served(tmp_path):
    with played_hub(tmp_path / "cache") as playing:
        yield playing


def said(path: str, split: str = "train") -> list[str]:
    return [row["question"].split("?")[0] for _, row in hub.read(path, split)]


# --- names ---


def test_names_are_taken_apart_and_put_together():
    for text, parts in {
        "hf:openai/gsm8k": ("openai/gsm8k", "", "", ""),
        "hf:openai/gsm8k/main:test": ("openai/gsm8k", "main", "", "test"),
        "hf:org/name@refs/convert/parquet": ("org/name", "", "refs/convert/parquet", ""),
        "hf:org/a.b-c/sub/set@v1.0:train_sft": ("org/a.b-c", "sub/set", "v1.0", "train_sft"),
    }.items():
        name = hub.parse(text)
        assert (name.repo, name.subset, name.revision, name.split) == parts
        assert str(name) == text
    for text in ("hf:gsm8k", "hf:openai/", "hf:openai/gsm8k:", "hf://datasets/openai/gsm8k", "hf:a/b@", "hf:a/b:x y"):
        with pytest.raises(UserError, match="no name of a dataset; write hf:ORG/NAME"):
            hub.parse(text)
    assert not hub.is_hub("openai/gsm8k")


# --- which files are what ---


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            [*(f"data/train-0000{i}-of-00002.parquet" for i in range(2)), "data/test-00000-of-00001.parquet"],
            {"default": {"train": 2, "test": 1}},
        ),
        (["main/train-00000-of-00001-ab12.parquet", "x/train_sft-00000-of-00001.parquet"],
         {"main": {"train": 1}, "x": {"train_sft": 1}}),
        (["arc/train/0000.parquet", "arc/validation/0000.parquet"], {"arc": {"train": 1, "validation": 1}}),
        (["train.jsonl", "dev.jsonl", "gsm8k-test.jsonl"], {"default": {"train": 1, "validation": 1, "test": 1}}),
        (["data/test/part-1.jsonl", "data/test/part-2.jsonl"], {"default": {"test": 2}}),
        # Parquet before its copies; a list of names of files is no data.
        (["train.parquet", "train.jsonl", "dataset_infos.json"], {"default": {"train": 1}}),
        (["examples.jsonl"], {"default": {"train": 1}}),
        (["load.py", "dataset_infos.json"], {}),
    ],
)  # fmt: skip
def test_files_are_told_by_their_names(files, wanted):
    found = lay_out(files, "", "it").subsets
    assert {
        subset: {split: len(names) for split, names in splits.items()} for subset, splits in found.items()
    } == wanted


def test_a_card_says_which_files_are_what():
    files = ["en/a.jsonl", "en/b.jsonl", "de/a.jsonl", "more/x.parquet", "en/deep/c.jsonl"]
    card = """---
configs:
- config_name: en
  default: true
  data_files: {train: en/a.jsonl, held: ["en/b.jsonl", "en/**/c.jsonl"]}
- config_name: de
  data_dir: de
- config_name: all
  data_files: "*/a.jsonl"
- config_name: documented_only
---"""
    found = lay_out(files, card, "it")
    assert found.default == "en"
    assert found.subsets == {
        "en": {"train": ["en/a.jsonl"], "held": ["en/b.jsonl", "en/deep/c.jsonl"]},
        "de": {"train": ["de/a.jsonl"]},
        "all": {"train": ["de/a.jsonl", "en/a.jsonl"]},
    }
    with pytest.raises(UserError, match=r"it: the head of README.md is no YAML"):
        lay_out(files, "---\nconfigs: [\n---\n", "it")
    assert lay_out(["a.jsonl"], "no head", "it").default == "default"


def test_a_split_that_was_cut_off_is_refused():
    with pytest.raises(UserError, match=r"it: default, train: 1 of the 3 files train-…-of-00003 are here"):
        lay_out(["data/train-00001-of-00003.parquet", "data/test-00000-of-00001.parquet"], "", "it")


# --- reading ---


def test_splits_and_subsets_are_read_once_and_then_without_a_network(served):
    commit = gsm8k(served, 3)
    assert said("hf:openai/gsm8k/main", "test") == ["test 0", "test 1", "test 2"]
    assert said("hf:openai/gsm8k/main:train") == ["train 0", "train 1", "train 2"]
    assert said("hf:openai/gsm8k/socratic")[0] == "socratic 0"
    files = [a for a in served.asked if "/resolve/" in a and a.startswith("GET") and "parquet" in a]
    assert len(files) == len(set(files)) == 3
    served.offline()
    before = len(served.asked)
    assert said("hf:openai/gsm8k/main", "test") == ["test 0", "test 1", "test 2"]
    assert said(f"hf:openai/gsm8k/main@{commit}")[0] == "train 0"
    assert len(served.asked) == before


def test_rows_are_those_of_json_lines(served, tmp_path):
    """Parquet has every column in every row; a null is a key that is not there."""
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "input": "e"}]
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": None}]}]
    served.add("datasets/org/alpaca", {"data/train-00000-of-00001.parquet": as_parquet(rows), "README.md": "x"})
    served.add("datasets/org/chat", {"train.parquet": as_parquet(chat)})
    served.add("datasets/org/lines", {"train.jsonl": as_lines(rows)})
    here = read_records(write(tmp_path / "a.jsonl", rows))
    assert read_records("hf:org/alpaca") == read_records("hf:org/lines") == here
    assert read_records("hf:org/chat")[0].solution == "b"


def test_sft_reads_a_dataset_as_it_reads_a_file(served, tmp_path):
    commit = gsm8k(served)
    part = Part("hf:openai/gsm8k/main", split="test")
    records, folder = open_part(part, tmp_path / "home", 0)
    assert isinstance(records, list)
    assert [r.answer for r in records] == ["72"] * 6
    assert json.loads((folder / "metadata.json").read_text())["dataset"] == f"hf:openai/gsm8k/main@{commit}:test"
    served.offline()
    assert open_part(part, tmp_path / "home", 0)[1] == folder
    assert read_folder(folder) == records
    with pytest.raises(UserError, match="names the split test, and split is validation; give one of them"):
        open_part(Part("hf:openai/gsm8k/main:test", split="validation"), tmp_path / "home", 0)


def test_a_family_takes_train_and_test_from_their_own_splits(served):
    gsm8k(served)
    spec = {"family": "gsm8k", "domain": "id", "train": 4, "validation": 2, "test": 3}
    suite = build_suite(
        [build(FamilySpec, {**spec, "args": {"path": "hf:openai/gsm8k/main"}})], seed=0, style="instruct"
    )
    told = {split: [q.text.split()[0] for q in suite.questions(split)] for split in ("train", "validation", "test")}
    assert told == {"train": ["train"] * 4, "validation": ["train"] * 2, "test": ["test"] * 3}
    assert not {q.text for q in suite.questions("train")} & {q.text for q in suite.questions("validation")}
    # One split for all, by the name or by the key; and a map of names.
    for args, splits in (
        ({"path": "hf:openai/gsm8k/main:test"}, ("test", "test")),
        ({"path": "hf:openai/gsm8k/main", "split": "train"}, ("train", "train")),
        ({"path": "hf:openai/gsm8k/main", "split": {"train": "test", "test": "train"}}, ("test", "train")),
    ):
        suite = build_suite([FamilySpec("gsm8k", "id", args, train=2, test=2)], seed=0, style="instruct")
        assert tuple(suite.questions(s)[0].text.split()[0] for s in ("train", "test")) == splits


def test_choices_and_programs_come_from_the_hub_too(served):
    arc = [{**CHOICES, "choices": {"text": CHOICES["choices"], "label": ["A", "B", "C"]}, "id": "x"}]
    served.add("datasets/allenai/ai2_arc", {"ARC-Easy/test-00000-of-00001.parquet": as_parquet(arc)})
    served.add("datasets/google/mbpp", {"full/train-00000-of-00001.parquet": as_parquet([MBPP])})
    specs = [
        FamilySpec("choice", "ood", {"path": "hf:allenai/ai2_arc"}, test=1),
        FamilySpec("mbpp", "id", {"path": "hf:google/mbpp/full"}, train=1),
    ]
    suite = build_suite(specs, seed=0, style="instruct")
    (choice,), (program,) = suite.questions("test"), suite.questions("train")
    assert suite.verify(choice, "Answer: B") == 1.0
    assert suite.verify(program, str(program.solution)) == 1.0
    items = read_questions(Questions(path="hf:google/mbpp/full:train"))
    assert (items[0].family, items[0].id) == ("mbpp_full", "11")


def test_the_hubs_own_conversion_is_read_where_a_dataset_is_a_program(served):
    served.add("datasets/org/old", {"old.py": "load()", "README.md": "---\nlicense: mit\n---\n"})
    with pytest.raises(UserError, match=r"hf:org/old: it holds no parquet and no JSON lines, and the hub has no conv"):
        said("hf:org/old")
    commit = served.add(
        "datasets/org/old", {"main/test/0000.parquet": as_parquet(questions("test", 2))}, "refs/convert/parquet"
    )
    forget()
    assert said("hf:org/old", "test") == ["test 0", "test 1"]
    assert hub.dataset_of("org/old", "").commit == commit
    served.offline()
    assert said("hf:org/old:test", "test") == ["test 0", "test 1"]


# --- the commit of a run ---


CONFIG = {
    "model": {"random": {"hidden_size": 8}},
    "tasks": {"families": [{"family": "gsm8k", "domain": "id", "train": 2, "args": {"path": "hf:openai/gsm8k/main"}}]},
    "methods": {"imm": {}},
}


def call(function, *args):
    return function(*args)


def test_a_run_goes_on_with_the_commit_it_began_with(served, tmp_path):
    first = gsm8k(served, 3)
    given = build(Improve, CONFIG)
    config = hub.pin(given, tmp_path, call)
    (family,) = config.tasks.families
    assert family.args["path"] == f"hf:openai/gsm8k/main@{first}"
    write_config(tmp_path, config)
    assert first in (tmp_path / "config.yaml").read_text()
    second = gsm8k(served, 4)
    forget()
    assert hub.pin(given, tmp_path / "other", call).tasks.families[0].args["path"].endswith(second)
    assert hub.pin(given, tmp_path, call) == config
    assert len(said(config.tasks.families[0].args["path"])) == 3
    served.offline()
    assert hub.pin(given, tmp_path, call) == config
    assert hub.pin(config, tmp_path / "other", call) is config


def test_every_place_that_names_a_dataset_is_pinned(served, tmp_path):
    commit = gsm8k(served)
    parts = (Part("hf:openai/gsm8k/main:test"), Part("lines.jsonl"), Part("hf:openai/gsm8k/socratic"))
    assert [part.path for part in hub.pin(Data(parts=parts), tmp_path, call).parts] == [
        f"hf:openai/gsm8k/main@{commit}:test", "lines.jsonl", f"hf:openai/gsm8k/socratic@{commit}",
    ]  # fmt: skip
    assert hub.pin(Questions(path="hf:openai/gsm8k/main"), tmp_path, call).path.endswith(commit)
    # A model's path is none of a dataset.
    assert list(hub.paths_in({"model": {"path": "hf:a/b"}, "roles": {"critic": {"model": {"path": "hf:a/b"}}}})) == []
    plain = build(Improve, {**CONFIG, "tasks": {"families": [{"family": "gcd", "domain": "id", "train": 2}]}})
    assert hub.pin(plain, tmp_path, call) is plain
    assert yaml.safe_load(yaml.safe_dump(to_dict(plain))) == to_dict(plain)


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("hf:openai/gsm8k", r"the dataset has the subsets main, socratic; name one: hf:openai/gsm8k/SUBSET"),
        ("hf:openai/gsm8k/mian", r"hf:openai/gsm8k/mian: no subset 'mian'; there are: main, socratic$"),
        ("hf:openai/gsm8k/socratic:test", r"/socratic:test: no split 'test'; there are: train$"),
        ("hf:openai/gsm8k/main@v9", r"hf:openai/gsm8k@v9: the dataset has no such revision$"),
        ("hf:openai/none", r"hf:openai/none: the hub has no such dataset, or it is private; .* hf auth login$"),
        ("hf:org/gated", r"hf:org/gated: its owner grants access one by one; .* hf auth login$"),
        ("hf:org/private", r"hf:org/private: the hub has no such dataset, or it is private"),
        ("hf:org/broken", r"hf:org/broken:train, train\.parquet: could not be read: "),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(served, path, match):
    gsm8k(served)
    for name in ("gated", "private"):
        served.add(f"datasets/org/{name}", {"train.jsonl": as_lines(questions("x", 1))})
        served.closed[f"datasets/org/{name}"] = name
    served.add("datasets/org/broken", {"train.parquet": b"PAR1 no more"})
    with pytest.raises(UserError, match=match) as caught:
        list(hub.read(path, hub.one_split(path, None)))
    assert "\n" not in str(caught.value)


def test_what_is_not_in_the_cache_is_said_where_there_is_no_network(served):
    gsm8k(served)
    assert said("hf:openai/gsm8k/main", "test")
    served.offline()
    with pytest.raises(
        UserError, match=r"hf:org/other: it is not in the cache, and the hub cannot be reached .*: jaxm"
    ):
        said("hf:org/other")
    with pytest.raises(
        UserError, match=r"main:train: no split 'train'; there are: test in the cache; the hub could not"
    ):
        said("hf:openai/gsm8k/main", "train")


def test_a_server_that_is_gone_is_no_network(served, monkeypatch):
    from huggingface_hub import constants

    gsm8k(served)
    assert said("hf:openai/gsm8k/main", "test")
    forget()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert said("hf:openai/gsm8k/main", "test") == [f"test {i}" for i in range(6)]
    with pytest.raises(UserError, match=r"hf:org/other: it is not in the cache, and the hub cannot be reached"):
        said("hf:org/other")


def test_a_wrong_row_is_named(served):
    served.add("datasets/org/name", {"train.parquet": as_parquet([GSM8K, {**GSM8K, "answer": "no number"}])})
    with pytest.raises(UserError, match=r"^hf:org/name:train, row 2: answer ends in 'no number'; GSM8K's end in"):
        read_records("hf:org/name", "gsm8k")
    spec = FamilySpec("gsm8k", "id", {"path": "hf:org/name", "split": {"trian": "train"}}, train=1)
    with pytest.raises(UserError, match=r"split is {'trian': 'train'}; wanted a name for each of train, validation, t"):
        build_suite([spec], seed=0, style="instruct")
    assert Path("hf:org/name").suffix == ""


def test_patterns_of_a_card_are_matched_in_linear_time():
    """To a backtracking matcher each star is one more power of the length of a file's name."""
    stars = "*a" * 24 + "*b.jsonl"
    card = f"---\nconfigs: [{{data_files: '{stars}'}}]\n---\n"
    names = [f"{'a' * 120}.jsonl", f"{'a' * 30}b.jsonl"]
    assert lay_out(names, card, "hf:org/name").subsets == {"default": {"train": names[1:]}}
    with pytest.raises(UserError, match=r"hf:org/name: data_files: pattern .*\[z-a\].* is no regular expression"):
        lay_out(["a.jsonl"], "---\nconfigs: [{data_files: '[z-a].jsonl'}]\n---\n", "hf:org/name")
