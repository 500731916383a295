"""Recipes on disk: what is read, what is refused, and that every job a plan makes is the right one."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.llamas import folder, load, make, merged, names_of, read, run, tensors

import jaxmerge
from jaxmerge import leafwise, requires
from jaxmerge.files import layers, plan, recipe
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.methods import METHODS, REQUIRED
from jaxmerge.rules import RULES


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two", "three"]):
        folder(name, tensors(seed))
    return tmp_path


def tree(name):
    return {key.replace(".", "/"): jnp.asarray(array) for key, array in load(name).items()}


def mixed(weight_of, names=("one", "two")):
    """Average two models by hand, with weights by tensor and model."""
    loaded = [load(name) for name in names]
    total = {key: sum(weight_of(key, m) for m in names) for key in loaded[0]}
    return {
        key: sum(weight_of(key, m) * model[key] for m, model in zip(names, loaded, strict=True)) / total[key]
        for key in loaded[0]
    }


def close(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "task_arithmetic", "slerp", "karcher"])
def test_every_job_done_in_memory_is_the_merge_in_memory(here, method):
    text = {"merge_method": method, "base_model": "base", "models": [{"model": "one"}]}
    parameters = {name: 0.4 for name, (_, default) in METHODS[method].parameters.items() if default is REQUIRED}
    parameters |= {"density": 0.5} if "density" in METHODS[method].each else {}
    found = merged(text | {"parameters": parameters})
    keywords: dict[str, Any] = {METHODS[method].parameters[name][0]: value for name, value in parameters.items()}
    keywords |= {"rescale": "l1"} if "dare" in method or "della" in method else {}
    rule = RULES[METHODS[method].rule]
    if rule.needs.key != "none":
        keywords |= {"key": jax.random.key(0), "names": ["one"]}
    if method == "karcher":  # the base is one more model
        wanted = rule([tree("one"), tree("base")], **keywords)
    elif method == "slerp":
        wanted = rule([tree("base"), tree("one")], **keywords)
    else:
        wanted = rule([tree("one")], base=tree("base"), **keywords)
    close(found, {name.replace("/", "."): array for name, array in wanted.items()})


def test_precedence_is_source_slice_module_recipe(here):
    text = """
merge_method: linear
modules:
  default:
    slices:
      - sources:
          - {model: one, layer_range: [0, 4], parameters: {weight: [{filter: q_proj, value: 1}]}}
          - {model: two, layer_range: [0, 4]}
        parameters: {weight: [{filter: _proj, value: 2}]}
    parameters: {weight: [{filter: layers, value: [3, 6]}]}
parameters: {weight: [{filter: embed, value: 5}, {value: 7}]}
"""

    def weight(name, model):
        if "q_proj" in name and model == "one":
            return 1
        if "_proj" in name:
            return 2
        if "layers" in name:
            return 3 + int(name.split(".")[2])
        return 5 if "embed" in name else 7

    close(merged(text), mixed(weight))
    # Weights alike cancel in an average: look at the numbers themselves too.
    for job in make(text).jobs:
        assert job.coefficients["weights"] == [weight(job.name, model) for model in ("one", "two")]


def test_numbers_written_as_text_and_truth_in_all_its_spellings(here):
    for value in ("true", "yes", "on", "1", "'true'"):
        text = (
            refused(models=[{"model": "one", "parameters": {"weight": "1e-2"}}]) + f"parameters: {{normalize: {value}}}"
        )
        coefficients = make(text).jobs[0].coefficients
        assert coefficients == {"weights": [0.01], "normalize": True}
    text = "merge_method: linear\nmodels: [{model: one}]\nparameters: {weight: 1, normalize: [false, true]}"
    found = {job.name: job.coefficients["normalize"] for job in make(text).jobs}
    assert [found[f"model.layers.{l}.mlp.up_proj.weight"] for l in range(4)] == [False, False, False, True]


SLICES = """
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 3]}]
  - sources: [{model: two, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
"""


def test_slices_are_stacked_and_named_anew(here):
    found, one, two = merged(SLICES), load("one"), load("two")
    assert list(found) != sorted(found)
    assert set(found) == set(names_of(6))
    for l in range(6):
        model, at = (one, l) if l < 3 else (two, l - 2)
        for part, scale in (("mlp.up_proj", 1.0), ("self_attn.o_proj", 0.5 if l > 2 else 1.0)):
            name = "model.layers.{}." + part + ".weight"
            np.testing.assert_array_equal(found[name.format(l)], scale * model[name.format(at)])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["model.norm.weight"], two["model.norm.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], two["lm_head.weight"])


def test_the_config_follows_the_slices(here):
    kinds = ["full", "sliding", "full", "linear"]
    for name in ("one", "two"):
        config = json.loads((here / name / "config.json").read_text())
        own = kinds if name == "one" else kinds[::-1]
        (here / name / "config.json").write_text(json.dumps({**config, "layer_types": own, "other": [1, 2]}))
    made = make(SLICES + "out_dtype: bfloat16\n")
    made.companions(here)
    config = json.loads((here / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["full", "sliding", "full", "full", "sliding", "full"]
    assert (config["other"], config["torch_dtype"]) == ([1, 2], "bfloat16")
    assert {job.out_dtype for job in made.jobs} == {np.dtype(ml_dtypes.bfloat16)}


def test_two_layers_of_a_model_in_one_tensor_have_masks_of_their_own(here):
    text = """
merge_method: dare_linear
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: one, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: one, layer_range: [2, 4], parameters: {weight: 0.5}}
parameters: {density: 0.5}
"""
    (job,) = (job for job in make(text).jobs if job.name == "model.layers.1.mlp.up_proj.weight")
    assert [(i.model, i.tensor.name) for i in job.inputs] == [
        ("one", "model.layers.1.mlp.up_proj.weight"), ("one#2", "model.layers.3.mlp.up_proj.weight"),
    ]  # fmt: skip
    assert job.base is not None
    assert run(job).shape == job.shape


def test_a_slice_of_the_base_alone_is_the_base(here):
    text = """
merge_method: ties
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources: [{model: base, layer_range: [2, 4]}, {model: one, layer_range: [2, 4], parameters: {weight: 1}}]
"""
    found, base, one = merged(text), load("base"), load("one")
    for name, wanted in (("model.layers.1.mlp.up_proj.weight", base), ("model.layers.2.mlp.up_proj.weight", one)):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)


def vision(name, seed):
    """A model of two containers of layers."""
    arrays = {f"language.{key}": array for key, array in tensors(seed, layers=4).items()}
    rng = np.random.default_rng(seed)
    arrays |= {f"vision.blocks.{l}.w": rng.standard_normal((4, 4)).astype(np.float32) for l in range(2)}
    return folder(name, arrays, num_hidden_layers=None, text_config={"num_hidden_layers": 4},
                  vision_config={"depth": 2})  # fmt: skip


def test_modules_are_prefixes(here):
    vision("a", 1)
    vision("b", 2)
    stack = "slices: [{sources: [{model: a, layer_range: [0, 3]}]}, {sources: [{model: b, layer_range: [2, 4]}]}]"
    text = f"merge_method: passthrough\nmodules:\n  language: {{{stack}}}\n  default: {{models: [{{model: b}}]}}\n"
    found, a, b = merged(text), load("a"), load("b")
    assert len(found) == 5 * 9 + 3 + 2
    name = "language.model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name.format(2)], a[name.format(2)])
    np.testing.assert_array_equal(found[name.format(3)], b[name.format(2)])
    np.testing.assert_array_equal(found["vision.blocks.1.w"], b["vision.blocks.1.w"])
    make(text).companions(here)
    config = json.loads((here / "config.json").read_text())
    assert (config["text_config"], config["vision_config"]) == ({"num_hidden_layers": 5}, {"depth": 2})
    plain = f"merge_method: passthrough\n{stack}\n"
    with pytest.raises(ValueError, match=r"2 containers of layers: language.model.layers \(4\), vision.blocks \(2\)"):
        make(plain)
    with pytest.raises(ValueError, match=r"module 'text_decoder': no tensor of 'a' has a name that starts with"):
        make(text.replace("language:", "text_decoder:"))
    lone = f"merge_method: passthrough\nmodules:\n  language: {{{stack}}}\n"
    with pytest.raises(ValueError, match=r"2 tensors \(vision.blocks.*are of no module of the recipe; add a module"):
        make(lone)
    assert len(make(lone, allow=["unused"]).jobs) == 5 * 9 + 3


STAGES = """
merge_method: linear
models: [{model: second, parameters: {weight: 1}}, {model: three+adapter, parameters: {weight: 1}}]
---
name: second
merge_method: extrapolate
base_model: first
models: [{model: two}]
parameters: {alpha: 0.5}
---
name: first
merge_method: linear
models: [{model: one, parameters: {weight: 1}}]
"""


def test_stages_come_in_the_order_they_are_needed(here):
    assert [stage.name for stage in read(STAGES)] == ["first", "second", None]
    assert read(STAGES)[-1].sources == ["second", "three+adapter"]
    named = STAGES.lstrip().split("---\n")
    assert [r.name for r in read("---\n".join([named[2], named[1]]))] == ["first", "second"]
    for text, words in [
        (STAGES.replace("name: second", "name: first"), "2 documents have the name 'first'"),
        (STAGES.replace("name: second\n", ""), "2 documents have no 'name'"),
        (STAGES.replace("base_model: first", "base_model: base"), "stage 'first' is used by none"),
        (STAGES.replace("model: one", "model: second"), "in a circle: second → first → second"),
    ]:
        with pytest.raises(ValueError, match=words):
            read(text)


def refused(**changes):
    text = {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1}}]}
    return yaml.safe_dump({key: value for key, value in (text | changes).items() if value is not None})


def sliced(*sources, **changes):
    return refused(models=None, slices=[{"sources": list(sources)}], **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (refused(slices=[1]), "exactly one of 'models', 'slices' and 'modules' is wanted, found 'models' and 'slices'"),
        (refused(models=None), "found none"),
        (refused(models=None, modules={"default": {}}), "module 'default' must have either models or slices"),
        (sliced({"model": "one"}), r"layer_range of 'one' is None, wanted \[first, end\]"),
        (sliced({"model": "one", "layer_range": [3, 1]}), r"is \[3, 1\], wanted \[first, end\] with 0 ≤ first ≤ end"),
        (sliced({"model": "one", "layer_rang": [0, 1]}), "a model 'layer_rang'; did you mean 'layer_range'"),
        (
            sliced({"model": "one", "layer_range": [0, 1]}, {"model": "two", "layer_range": [0, 2]}),
            r"sources of slice 0 have layer_ranges of unlike length \[\[0, 1\], \[0, 2\]\]",
        ),
        (
            sliced({"model": "one", "layer_range": [0, 9]}, parameters={"weight": 1}),
            r"layer_range \[0, 9\] of 'one' ends after its 4 layers \(model.layers.0 to model.layers.3\)",
        ),
        (
            sliced({"model": "one", "layer_range": [0, 1]}, merge_method="ties", base_model="base"),
            "base_model 'base' is no source of slice 0; add it with its layer_range",
        ),
        (refused(models=[{"model": "one"}] * 2), "model 'one' stands twice in models"),
        (refused(parameters={"normalize": 2}), "parameter 'normalize' is 2, wanted true or false"),
        (refused(parameters={"weight": []}), "parameter 'weight' is an empty list"),
        (refused(parameters={"weight": [0, {"value": 1}]}), "parameter 'weight' mixes numbers and conditions"),
        (refused(parameters={"weight": ".nan"}), "parameter 'weight' is '.nan', wanted a number"),
        (
            refused(merge_method="slerp", base_model="one", models=[{"model": "two", "parameters": {"t": 0.5}}]),
            "slerp needs the parameter 't' for .*; parameter 't' of slerp is one for all models, found at model 'two': "
            "it has no effect there; move it to the 'parameters'",
        ),
        (refused(merge_method="slerp", models=[{"model": "one"}, {"model": "two"}]), "slerp needs a base_model"),
        (refused(tokenizer={"source": "union"}, tokenizer_source="base"), "'tokenizer' and 'tokenizer_source'"),
        (refused(tokenizer={"sauce": "union"}), "unknown key 'sauce' of 'tokenizer'"),
        (refused(chat_template="chatlm"), "unknown chat_template 'chatlm'; did you mean 'chatml'"),
        (refused(models=[{"model": {"path": ["one"]}}]), r"model is \['one'\], wanted the path of a model"),
        (refused(models=[{"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": 0}, {"value": 1}]}}]),
         r"tensor 'model.layers.0.mlp.down_proj.weight': the weights \[0.0\] of linear sum to zero, which they are di"),
        ("", "the recipe is empty"),
    ],
)  # fmt: skip
def test_what_is_refused(here, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        make(text)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text_is_named(here):
    (here / "recipe.yaml").write_bytes("merge_method: linéar".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe\.yaml is no text: byte 17 is not UTF-8"):
        recipe.read(here / "recipe.yaml")


def test_model_references_as_mappings(here):
    reference = {"model": {"path": "one", "revision": None}, "lora": {"path": "adapter"}}
    (found,) = read(refused(models=[{"model": reference, "parameters": {"weight": 1}}]))
    assert found.sources == ["one+adapter"]


def test_methods_are_rules_with_those_coefficients():
    for name, method in METHODS.items():
        assert method.rule in RULES, name
        assert not set(method.parameters) & set(method.unused)
    assert jaxmerge.rule("average") is RULES["linear"]


@requires(base="required")
def towards(models, *, base=None, key=None, names=None, stacked=(), weights=None, scale=0.25, squared=False):
    """A rule nobody wrote a method for."""
    del key, names

    def formula(x, *, weights, scale):
        change = sum(w * d for w, d in zip(weights, x.deltas, strict=True))
        return x.base + scale * (change**2 if squared else change)

    return leafwise(formula, models, base=base, stacked=stacked, each={"weights": weights}, shared={"scale": scale})


def test_a_new_rule_is_in_recipes(here, monkeypatch):
    """One function and one entry of RULES: its parameters are those of its signature, with mergekit's scopes."""
    text = {
        "merge_method": "towards",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 2.0}]}}],
        "parameters": {"squared": True},
    }
    with pytest.raises(ValueError, match="unknown merge_method 'towards'"):
        merged(text)
    monkeypatch.setitem(RULES, "towards", towards)
    found, one, base = merged(text), load("one"), load("base")
    wanted = {k: base[k] + 0.25 * ((0.5 if "mlp" in k else 2.0) * (one[k] - base[k])) ** 2 for k in base}
    close(found, wanted)
    with pytest.raises(ValueError, match="'scale' is 'much', wanted a number"):
        merged({**text, "parameters": {"scale": "much"}})


@pytest.mark.parametrize(
    ("name", "before"),
    [("transformer.wte.weight", True), ("gpt_neox.embed_in.weight", True), ("embed_out.weight", False),
     ("model.norm.weight", False), ("score.weight", False), ("shared.weight", True)],
)  # fmt: skip
def test_before_the_layers_or_after(name, before):
    assert layers.is_before(name) == before


def test_sources_must_be_open(here):
    (found,) = read(refused())
    with pytest.raises(ValueError, match="sources lack 'one'"):
        plan.make(found, {"two": open_source("two")})


def test_the_recipes_of_the_documentation_are_read(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "merge.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(blocks) == 7
    assert [len(read(block)) for block in blocks] == [1, 1, 1, 1, 2, 1, 1]
    table = text[text.index("| `merge_method`") :].split("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")][1:]
    for row in rows:
        names, _, own, shared = row.strip("|").split("|")
        for name in re.findall(r"`(\w+)`", names):
            method = METHODS[name]
            assert set(re.findall(r"`(\w+)`", own)) == set(method.each), name
            assert set(re.findall(r"`(\w+)`", shared)) >= {*method.shared, *method.options} - {"r", "alpha", "rescale"}
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == set(METHODS)
