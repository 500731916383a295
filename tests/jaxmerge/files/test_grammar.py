"""Words of recipes that have no effect where they stand: noted, and the merge is the one without them."""

import pytest
import yaml
from helpers.llamas import folder, make, read, tensors

from jaxmerge.files.methods import METHODS
from jaxmerge.files.tokens import Row
from jaxmerge.files.tokens import parse as parse_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two"]):
        folder(name, tensors(seed))
    return tmp_path


SLERP = {
    "merge_method": "slerp",
    "base_model": "one",
    "models": [{"model": "one"}, {"model": "two", "parameters": {}}],
    "parameters": {"t": 0.3},
}


def changed(place, key, value):
    """The recipe with a key more: at the top, at the second model, or among the parameters of one of these."""
    recipe = yaml.safe_load(yaml.safe_dump(SLERP))
    at = recipe if place.startswith("recipe") else recipe["models"][1]
    at = at["parameters"] if place.endswith("parameters") else at
    at[key] = value
    return recipe


@pytest.mark.parametrize(
    ("place", "key", "value", "words"),
    [
        ("model.parameters", "weight", 0.5, "parameter 'weight' has no effect in slerp: it is of other methods"),
        ("recipe.parameters", "select_topk", 0.5, "parameter 'select_topk' has no effect in slerp"),
        (
            "recipe.parameters",
            "dtype",
            "float16",
            "'dtype' has no effect as a parameter of slerp: it is a key of the r",
        ),
        ("model.parameters", "t", 0.9, "one for all models, found at model 'two': it has no effect there; move it to"),
        (
            "model",
            "revision",
            "main",
            "'revision' beside a model has no effect, as in mergekit; write the model as org",
        ),
        ("model", "layer_range", [0, 4], "'layer_range' has no effect as a key of a model: it is a key of a slice"),
        ("model", "weight", 0.5, "'weight' has no effect as a key of a model; move it to the 'parameters' there"),
        ("recipe", "int8_mask", True, "'int8_mask' has no effect as a key; move it to the 'parameters' there"),
        ("recipe", "x-author", {"any": ["thing"]}, "key 'x-author' is an extension and has no effect"),
        ("model.parameters", "x-why", "because", "'x-why' is an extension and has no effect"),
        ("recipe", "random_seed", 3, "'random_seed' has no effect as a key: it is an option of mergekit's command"),
    ],
)
def test_words_without_effect_are_noted(here, place, key, value, words):
    plain, made = make(SLERP), make(changed(place, key, value))
    assert any(words in note for note in made.notes), made.notes
    assert not any("no effect" in note for note in plain.notes)
    assert made.jobs == plain.jobs


@pytest.mark.parametrize("place", ["recipe", "recipe.parameters", "model", "model.parameters"])
@pytest.mark.parametrize("key", ["wieght", "merge_method_", "models_", "densty"])
def test_words_of_no_recipe_are_errors(here, place, key):
    with pytest.raises(ValueError, match=f"unknown .*{key!r}"):
        make(changed(place, key, 1))


def test_a_key_that_a_recipe_rests_on_is_an_error_in_the_wrong_place(here):
    with pytest.raises(ValueError, match="unknown key of a model 'models'"):
        make(changed("model", "models", []))


def test_parameters_of_every_method_are_words(here):
    """Whatever of the table stands in a recipe of another method of the table, the recipe is read."""
    names = {name for method in METHODS.values() for name in (*method.parameters, *method.unused)} - {"t"}
    recipe = changed("model", "parameters", {**dict.fromkeys(sorted(names), 0.5)})
    (found,) = read(recipe)
    assert len(found.notes) == len(names)


def test_edges_of_a_layer_range_may_be_text(here):
    text = "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: ['1', 3.0]}]}]\n"
    assert {job.name.split(".")[2] for job in make(text).jobs if ".layers." in job.name} == {"0", "1"}
    for wrong in ("['1', x]", "[0.5, 3]", "[true, 2]", "'1, 3'"):
        with pytest.raises(ValueError, match="wanted \\[first, end\\] with 0 ≤ first ≤ end"):
            make(text.replace("['1', 3.0]", wrong))


@pytest.mark.parametrize("form", ["one", {"model": {"path": "one"}}, {"path": "one"}])
def test_a_tokenizer_may_be_named_as_a_model_is(form):
    assert parse_tokenizer(form).source == parse_tokenizer({"source": form}).source == "one"
    tokens = parse_tokenizer({"tokens": {"<s>": {"source": form, "force": True}}}).tokens
    assert tokens["<s>"].source == Row("one")


def test_texts_that_are_empty_say_nothing(here):
    assert make({**SLERP, "dtype": "", "out_dtype": "", "chat_template": ""}).jobs == make(SLERP).jobs
    conditions = [{"filter": "mlp", "value": 0.2, "x-why": "less"}, {"value": 1}]
    plain = [{"filter": "mlp", "value": 0.2}, {"value": 1}]
    found = [make({**SLERP, "parameters": {"t": given}}).jobs for given in (conditions, plain)]
    assert found[0] == found[1]
