"""The map of methods: every row's keys are keys of its verb, its tests exist, rules merge, and the page is current."""

import ast
import functools
import importlib.util
import itertools
import re

import numpy as np
import pytest
import yaml
from helpers import ROOT
from safetensors.numpy import load_file, save_file

from jaxmerge.files import merge, statistics
from jaxmerge.files.methods import METHODS, methods
from train.cli.settings import InspectOptions
from train.cli.words import options
from train.evaluate.settings import QuestionOptions
from train.generate.settings import SampleOptions
from train.improve.settings import Improve
from train.learn.registry import OBJECTIVES
from train.learn.settings import Finetune
from train.resolve import build, override
from train.studies.settings import AnalyseOptions
from train.studies.tune_settings import TuneOptions

SPEC = importlib.util.spec_from_file_location("write_methods", ROOT / "docs/write_methods.py")
assert SPEC is not None
assert SPEC.loader is not None
write_methods = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(write_methods)
ROWS = [(kind, row) for kind in write_methods.KINDS for row in write_methods.rows_of(kind)]
NAMES = [f"{kind}: {row['name']}" for kind, row in ROWS]
IMPROVE = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
SFT = {"model": {"path": "MODEL"}}


def of(**fields):
    return [row for _, row in ROWS if all(row[name] == value for name, value in fields.items())]


def test_the_page_is_what_the_rows_say():
    found = (ROOT / "docs/methods.md").read_text()
    assert found == write_methods.page(), "write it again: python docs/write_methods.py"
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.yaml")} == set(write_methods.KINDS)


def test_no_method_has_two_rows():
    assert len(set(NAMES)) == len(NAMES)


def test_every_rule_and_every_objective_has_a_row():
    recipes = {key.removeprefix("merge_method: ") for row in of(verb="merge") for key in row["keys"]}
    keys = " ".join(key for _, row in ROWS for key in row["keys"])
    assert set(methods()) - recipes - {"imm"} == set()  # imm is what runs do; its recipe is `interpolate`
    assert {name for name in OBJECTIVES if not re.search(rf"name: {name}\b", keys)} == set()


@functools.cache
def functions_of(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("kind", "row"), ROWS, ids=NAMES)
def test_a_row_is_whole_and_what_it_names_exists(kind, row):
    assert tuple(row) == write_methods.FIELDS
    assert (ROOT / row["file"]).is_file()
    assert row["formula"]
    assert row["law"]
    assert row["test"]
    assert row["url"] == "" or row["url"].startswith("https://")
    for name in filter(None, (row["law"], row["oracle"], row["test"])):
        file, _, function = name.partition("::")
        assert function.partition("[")[0] in functions_of(file), name


def resolve(verb, keys):
    """Build the settings that a verb's command with these keys would."""
    if verb == "improve":
        values = override(dict(IMPROVE), keys)
        values.pop("sweep", None)
        build(Improve, values)
    elif verb == "sft":
        data = [] if any(key.startswith("data.") for key in keys) else ["data.path=EXAMPLES"]
        build(Finetune, override(dict(SFT), [*data, *keys]))
    else:
        kind = {"sample": SampleOptions, "evaluate": QuestionOptions, "analyse": AnalyseOptions,
                "inspect": InspectOptions, "tune": TuneOptions}[verb]  # fmt: skip
        options([key for key in keys if "=" in key], kind)


@pytest.mark.parametrize("row", [row for _, row in ROWS if row["verb"] not in ("merge", "python")],
                         ids=lambda row: row["name"])  # fmt: skip
def test_the_keys_of_a_row_are_keys_of_its_verb(row):
    resolve(row["verb"], row["keys"])


# --- recipes ---

NEEDS = {
    "slerp": ("one", {"t": 0.4}), "interpolate": ("one", {"t": 0.4}), "nearswap": ("one", {"t": 0.001}),
    "passthrough": (None, {}), "arcee_fusion": ("one", {}), "extrapolate": ("base", {"alpha": 0.3}),
    "extrapolation_merge": ("base", {"alpha": 0.3, "weight": 0.5}), "linear": (None, {"weight": 0.5}),
    "fisher": (None, {}), "regmean": (None, {}),
    "karcher": (None, {}), "multislerp": (None, {"weight": 0.5}), "nuslerp": (None, {"weight": 0.5}),
}  # fmt: skip
MODELS = {"passthrough": 1, "extrapolate": 1, "slerp": 2, "interpolate": 2, "nearswap": 2, "arcee_fusion": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("rules")
    for seed, name in enumerate(("base", "one", "two")):
        rng = np.random.default_rng(seed)
        (place / name).mkdir()
        (place / name / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
        weights = {f"model.layers.0.{k}.weight": rng.standard_normal((4, 6), np.float32) for k in ("mlp", "attn")}
        save_file(weights, place / name / "model.safetensors")
    return place


def write_statistics(place, model, kind):
    folder, rng = place / f"statistics-{len(list(place.iterdir()))}", np.random.default_rng(3)
    shapes = {name: statistics.KINDS[kind].shape(array.shape) for name, array in weights_of(model).items()}
    arrays = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    statistics.write(folder, kind, arrays, {"model": model})
    return folder


def weights_of(model):
    return load_file(f"{model}/model.safetensors")


@pytest.mark.parametrize("method", sorted({key.removeprefix("merge_method: ") for row in of(verb="merge")
                                          for key in row["keys"] if key.startswith("merge_method")}))  # fmt: skip
def test_a_recipe_merges(models, tmp_path, method):
    base, parameters = NEEDS.get(method, ("base", {"weight": 0.5} if "weight" in METHODS[method].each else {}))
    names = ["one", "two"][: MODELS.get(method, 2)]
    recipe = {"merge_method": method, "models": [{"model": str(models / name)} for name in names]}
    recipe |= {"parameters": parameters} if parameters else {}
    recipe |= {"base_model": str(models / base)} if base else {}
    if (reads := METHODS[method].reads) is not None:
        for model in recipe["models"]:
            model["statistics"] = str(write_statistics(tmp_path, model["model"], reads.kind))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "out")
    made = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    found = dict(itertools.chain.from_iterable(part.items() for part in made))
    before = load_file(models / "one" / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(np.isfinite(value).all() for value in found.values())
    if method != "passthrough":
        assert any((found[name] != before[name]).any() for name in before)
