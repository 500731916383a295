"""Model cards: what the hub reads of them, and what people do."""

import json
import os
import pathlib

import pytest
import yaml
from helpers.llamas import folder, tensors

from jaxmerge.files import merge, model_card
from jaxmerge.files.model_card import Card, Ingredient, common_licence, describe_rule, ingredient, licence_of, text_of
from jaxmerge.rules import RULES

LINEAR = "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for seed, name in enumerate(["deep/one", "two"]):
        folder(name, tensors(seed))
    return tmp_path


def licensed(place, text):
    (pathlib.Path(place) / "README.md").write_text(f"---\n{text}\n---\n# A model\n")


def front(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def merged(here, text, out="out", **options):
    (here / "recipe.yaml").write_text(text)
    merge("recipe.yaml", out, **options)
    return front((here / out / "README.md").read_text())


def test_a_merge_says_what_it_is(here, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    stored = here / "hub" / "models--org--tuned"
    (stored / "snapshots").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    folder(stored / "snapshots" / "abc", tensors(3))
    licensed(stored / "snapshots" / "abc", "license: mit")
    licensed("deep/one", "license: mit")
    one = str(here / "deep" / "one")
    text = f"merge_method: ties\nbase_model: {one}\nmodels: [{{model: org/tuned, parameters: {{weight: 1}}}}]\n"
    matter, body = merged(here, text)
    assert matter == {
        "library_name": "transformers", "tags": ["merge", "jaxmerge"], "license": "mit",
        "base_model": ["org/tuned"], "base_model_relation": "merge",
    }  # fmt: skip
    assert 'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")' in body
    assert "| one | mit |" in body
    assert "https://arxiv.org/abs/2306.01708" in body
    assert str(here) not in body.replace(text.strip(), "")
    assert (here / "out" / "mergekit_config.yml").read_text() == text
    record = json.loads((here / "out" / "merge.json").read_text())
    assert record["inputs"]["org/tuned"]["licences"] == ["mit"]


def test_what_was_merged_here_stands_for_what_it_was_made_of(here):
    licensed("two", "license: mit")
    text = LINEAR % ("stage", "two") + "---\nname: stage\n" + LINEAR % ("deep/one", "two")
    matter, body = merged(here, text)
    assert "base_model" not in matter
    assert "license" not in matter  # deep/one states none
    assert "| stage | not stated |" in body
    card = Card("made", "A merge.", "", [Ingredient("x", ("org/x",), ("mit",))], relation="merge")
    (here / "two" / "README.md").write_text(text_of(card))
    matter, _ = merged(here, LINEAR % ("two", "deep/one"), "next")
    assert matter["base_model"] == ["org/x"]


def test_paths_of_models_are_in_no_note(here):
    _, body = merged(here, LINEAR % (here / "deep" / "one", here / "two"))
    (notes,) = (part for part in body.split("\n## ") if part.startswith("Notes"))
    assert "one has no tokenizer.json" in notes
    assert str(here) not in notes


def test_orbax_is_loaded_otherwise(here):
    _, body = merged(here, LINEAR % ("deep/one", "two"), "saved", format="orbax")
    assert "jaxmerge export path/of/this/folder hf" in body
    assert "from_pretrained" not in body
    assert (here / "saved" / "mergekit_config.yml").exists()


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({}, ["from safetensors.torch import load_file"]),
        ({"architectures": ["GPT2LMHeadModel"]}, ['model = AutoModelForCausalLM.from_pretrained("m")']),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            [
                "from transformers import Gemma3ForConditionalGeneration",
                "model = Gemma3ForConditionalGeneration.from_pre",
            ],
        ),
        (
            {"architectures": ["OddForCausalLM"], "auto_map": {"AutoModelForCausalLM": "odd.Odd"}},
            ['model = AutoModelForCausalLM.from_pretrained("m", trust_remote_code=True)'],
        ),
    ],
)
def test_how_a_folder_is_loaded(tmp_path, config, lines):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    found = model_card.usage(tmp_path, "m")
    for line in lines:
        assert line in found
    assert "AutoTokenizer" not in found
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert ("AutoTokenizer" in model_card.usage(tmp_path, "m")) == bool(config)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_a_card_load_the_model(here):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    _, body = merged(here, LINEAR % ("deep/one", "two"))
    scope: dict = {}
    exec(body.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", "out"), scope)
    assert scope["model"].config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: llama3", "llama3"),
        ("license: [mit, bsd]", "mit, bsd"),
        ("tags: [a]", None),
        ("license: [", None),
        ("- a list", None),
    ],
)
def test_licences_are_read_from_cards(tmp_path, text, licence):
    licensed(tmp_path, text)
    assert licence_of(tmp_path) == licence
    (tmp_path / "README.md").write_bytes(b"---\n\xff\xfe")
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")  # nobody writes to it
    assert licence_of(tmp_path) is None


def test_a_result_states_a_licence_only_where_all_agree():
    mit, other, unknown = Ingredient("a", (), ("mit",)), Ingredient("b", (), ("gpl",)), Ingredient("c")
    assert common_licence([mit, mit]) == "mit"
    assert [common_licence(given) for given in ([mit, other], [mit, unknown], [unknown], [])] == [None] * 4


def test_names_of_the_cache_are_hub_names(tmp_path):
    place = tmp_path / "models--org--tuned.v2" / "snapshots" / "abc"
    place.mkdir(parents=True)
    assert ingredient(str(place)).hub == ("org/tuned.v2",)
    assert ingredient(str(tmp_path)).hub == ()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_described(name):
    text = describe_rule(RULES[name])
    assert text.partition("\n")[0].endswith(".")
    assert "$" not in text  # formulas are written as text
