"""Recipes whose rules read statistics of data: the numbers, the folder they are in, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge.files import engine, merge, statistics
from jaxmerge.files.journal import Changed, Kept
from jaxmerge.files.verify import verify

SHAPES = {
    "model.embed_tokens.weight": (10, 6),
    **{f"model.layers.{l}.mlp.up_proj.weight": (8, 6) for l in range(2)},
    "model.norm.weight": (6,),
}
MODELS = ("one", "two")


def weights(name):
    return {tensor: array.astype(np.float64) for tensor, array in load_file(f"{name}/model.safetensors").items()}


def write_statistics(name, kind, seed, drop=(), **extra):
    rng = np.random.default_rng(seed)
    if kind == "fisher":
        found = {tensor: rng.random(shape) ** 4 for tensor, shape in SHAPES.items()}
    else:
        inputs = {tensor: rng.standard_normal((20, 6)) for tensor in SHAPES if "proj" in tensor}
        found = {tensor: x.T @ x / 20 for tensor, x in inputs.items()}
    found = {tensor: array.astype(np.float32) for tensor, array in {**found, **extra}.items() if tensor not in drop}
    folder = pathlib.Path(f"{kind}-{name}")
    for file in folder.glob("*"):
        file.unlink()
    statistics.write(folder, kind, found, {"model": name, "data": "data.jsonl", "examples": 20, "tokens": 20})
    return {tensor: array.astype(np.float64) for tensor, array in found.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(MODELS):
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        made = {tensor: rng.standard_normal(shape).astype(np.float32) for tensor, shape in SHAPES.items()}
        save_file(made, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def recipe(method, **more):
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    return {
        "merge_method": method,
        "models": [{"model": name, "statistics": f"{kind}-{name}"} for name in MODELS],
        **more,
    }


def solved(one, two, grams, damping=0.1):
    """RegMean in float64, with the ridge of the rule."""
    kept = [(1 - damping) * g + damping * np.diag(np.diag(g)) for g in grams]
    total = sum(kept) + np.eye(len(kept[0])) * 1e-6 * np.trace(sum(kept)) / len(kept[0])
    mean = (one + two) / 2
    return mean + sum((w - mean) @ g for w, g in zip((one, two), kept, strict=True)) @ np.linalg.inv(total)


def test_fisher_is_the_formula_in_any_pieces(here, monkeypatch):
    information = [write_statistics(name, "fisher", seed) for seed, name in enumerate(MODELS, start=5)]
    given = recipe("fisher", parameters={"floor": 1e-3})
    given["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 2.0}, {"value": 1.0}]}
    merge(given, "whole")
    monkeypatch.setattr(engine, "CHUNK", 16)
    monkeypatch.setattr(engine, "LENGTHS", (16,))
    merge(given, "pieces")
    found, one, two = (weights(name) for name in ("whole", *MODELS))
    assert all(np.array_equal(found[name], array) for name, array in weights("pieces").items())
    for name, array in found.items():
        a, b = ((2.0 if "mlp" in name else 1.0) * (information[0][name] + 1e-3), information[1][name] + 1e-3)
        np.testing.assert_allclose(array, (a * one[name] + b * two[name]) / (a + b), rtol=2e-5, atol=2e-6)
    record = json.loads(pathlib.Path("whole/merge.json").read_text())
    assert record["statistics"]["fisher-one"]["data"] == "data.jsonl"
    assert record["tensors"]["model.norm.weight"]["models"] == ["one", "two"]
    assert set(record["digests"]) == {"one", "two", "fisher-one", "fisher-two"}


def test_regmean_solves_linear_layers_and_averages_the_rest(here):
    grams = [write_statistics(name, "gram", seed) for seed, name in enumerate(MODELS)]
    report = merge(recipe("regmean"), "out", dry_run=True)
    said = "regmean averages what has no Gram matrix: 2 tensors (model.embed_tokens.weight, model.norm.weight)"
    assert said in report["notes"]
    assert report["bytes_in"] == 2 * 4 * (60 + 2 * 48 + 6 + 2 * 36)
    merge(recipe("regmean", dtype="bfloat16", out_dtype="float32"), "out")
    found = weights("out")
    one, two = ({k: as_bfloat16(v) for k, v in weights(name).items()} for name in MODELS)
    for name, array in found.items():
        if "proj" in name:  # the Gram matrices are not cast to the recipe's dtype
            wanted = solved(one[name], two[name], [gram[name] for gram in grams])
            np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(array, (one[name] + two[name]) / 2, rtol=1e-6, atol=1e-7)


def as_bfloat16(array):
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_slices_take_the_statistics_of_their_layers(here):
    grams = [write_statistics(name, "gram", seed) for seed, name in enumerate(MODELS)]
    sources = [
        {"model": name, "layer_range": [of, of + 1], "statistics": f"gram-{name}"} for of, name in enumerate(MODELS)
    ]
    merge({"merge_method": "regmean", "slices": [{"sources": sources}]}, "out")
    one, two = (weights(name)[f"model.layers.{l}.mlp.up_proj.weight"] for l, name in enumerate(MODELS))
    own = [gram[f"model.layers.{l}.mlp.up_proj.weight"] for l, gram in enumerate(grams)]
    found = weights("out")["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_allclose(found, solved(one, two, own), rtol=1e-4, atol=1e-5)


def test_an_interrupted_merge_goes_on_and_sees_that_statistics_changed(here):
    for seed, name in enumerate(MODELS):
        write_statistics(name, "gram", seed)
    merge(recipe("regmean"), "whole")

    def stop(done, total, tensor):
        if "layers.1" in tensor:
            raise Kept("stopped")

    with pytest.raises(Kept, match="stopped"):
        merge(recipe("regmean"), "out", progress=stop)
    kept = {path: path.read_bytes() for path in pathlib.Path("gram-two").iterdir()}
    other = {path: path.read_bytes() for path in pathlib.Path("gram-one").iterdir()}
    (array,) = (path for path in kept if path.suffix == ".safetensors")
    array.write_bytes(other[pathlib.Path("gram-one", array.name)])
    with pytest.raises(Changed, match=r"of gram-two/statistics\.safetensors has changed since"):
        merge(recipe("regmean"), "out")
    array.write_bytes(kept[array])
    report = merge(recipe("regmean"), "out")
    assert "tensors were there already" in report["notes"][-1]
    assert pathlib.Path("out/model.safetensors").read_bytes() == pathlib.Path("whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_verify_replays_it(here, method):
    kind = recipe(method)["models"][0]["statistics"].partition("-")[0]
    for seed, name in enumerate(MODELS):
        write_statistics(name, kind, seed)
    merge(recipe(method), "out")
    assert verify("out")["code"] == 0
    write_statistics("two", kind, 7)
    report = verify("out")
    assert report["code"] == 1
    solvable = {name for name in SHAPES if method == "fisher" or "proj" in name}
    assert {verdict.tensor for verdict in report["wrong"]} == solvable


def test_what_is_refused(here):
    for seed, name in enumerate(MODELS):
        write_statistics(name, "gram", seed)
        write_statistics(name, "fisher", seed)
    plain = {"merge_method": "regmean", "models": [{"model": name} for name in MODELS]}
    refused(
        plain,
        r"regmean needs the statistics of model 'one' in models: .* jaxmerge statistics one DATA FOLDER kind=gram",
    )
    models = [{"model": name, "statistics": "nowhere"} for name in MODELS]
    refused({**plain, "models": models}, r"nowhere is no folder of statistics, for it has no statistics\.json")
    models = [{"model": name, "statistics": f"fisher-{name}"} for name in MODELS]
    refused({**plain, "models": models}, "fisher-one holds statistics of kind 'fisher', wanted 'gram'")
    models = [{"model": name, "statistics": 3} for name in MODELS]
    refused({**plain, "models": models}, "statistics of model 'one' is 3, wanted the path of a folder")
    refused(recipe("regmean", adapter="core"), "regmean reads statistics of whole models")
    refused(recipe("fisher", base_model="base"), "fisher needs the statistics of model 'base'")

    write_statistics("two", "fisher", 1, drop=["model.norm.weight"])
    refused(recipe("fisher"), "tensor 'model.norm.weight': fisher-two has no Fisher information of 'model.norm.weight'")
    write_statistics("two", "fisher", 1, **{"model.layers.7.w": np.zeros(3)})
    refused(
        recipe("fisher"), r"statistics in fisher-two name model\.layers\.7\.w, which 'two' lacks: .* of another model"
    )
    up = "model.layers.1.mlp.up_proj.weight"
    write_statistics("two", "gram", 1, drop=[up])
    refused(recipe("regmean"), f"tensor '{up}': gram-two has no Gram matrix of .*, or allow it: allow=missing")
    report = merge(recipe("regmean"), "out", dry_run=True, allow=["missing"])
    assert f"3 tensors (model.embed_tokens.weight, {up}" in " ".join(report["notes"])
    write_statistics("two", "gram", 1, **{up: np.eye(5)})
    refused(recipe("regmean"), rf"the Gram matrix of tensor '{up}' in gram-two has shape \[5, 5\], wanted \[6, 6\]")
    write_statistics("two", "gram", 1, **{up: np.full((6, 6), np.nan)})
    with pytest.raises(ValueError, match=f"tensor '{up}' of gram-two/statistics.safetensors has 36 NaN or infinite"):
        merge(recipe("regmean"), "out")


def refused(given, words):
    with pytest.raises(ValueError, match=words):
        merge(given, "out", dry_run=True)


def test_statistics_of_another_model_are_noted(here):
    for seed, name in enumerate(MODELS):
        write_statistics(name, "fisher", seed)
    given = recipe("fisher")
    given["models"][1]["statistics"] = "fisher-one"
    notes = merge(given, "out", dry_run=True)["notes"]
    assert "the statistics in fisher-one were made of one, and stand at two" in notes
    given = {**given, "merge_method": "linear", "parameters": {"weight": 1}}
    notes = merge(given, "out", dry_run=True)["notes"]
    assert notes[0] == "'statistics' has no effect in linear, which reads none; found at model 'one'"
