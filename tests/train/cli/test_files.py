"""The verbs that work on checkpoints: merge, inspect, extract-lora."""

import json
import pathlib

import numpy as np
import pytest
from helpers import ROOT
from safetensors.numpy import load_file, save_file

from train.cli.__main__ import main

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.{l}.mlp.{kind}_proj.weight": (8, 8) for l in range(2) for kind in ("up", "down")},
    "model.norm.weight": (8,),
}
RECIPE = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}]\nparameters: {weight: 0.5}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {t: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for t, shape in SHAPES.items()}
    for seed, name in enumerate(["base", "one", "two"]):
        rng = np.random.default_rng(seed)
        change = {t: 0.1 * rng.standard_normal(a.shape).astype(np.float32) * bool(seed) for t, a in base.items()}
        model(tmp_path / name, {t: a + change[t] for t, a in base.items()})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def model(path, arrays):
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')


def test_merge_says_what_it_will_do_and_does_it(here, capsys):
    assert main(["merge", "recipe.yaml", "out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "task_arithmetic: 6 tensors, 0.00 GB in, 0.00 GB out in 1 file" in said
    assert "of memory" in said
    assert not (here / "out").exists()
    assert main(["merge", "recipe.yaml", "out", "device=cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out"
    base, one, out = (load_file(f"{name}/model.safetensors") for name in ("base", "one", "out"))
    for name in SHAPES:
        np.testing.assert_allclose(out[name], (base[name] + one[name]) / 2, rtol=1e-5, atol=1e-6)
    assert main(["merge", "recipe.yaml", "out"]) == 0
    assert "out is there already" in capsys.readouterr().out


def test_merge_passes_on_what_a_recipe_does_not_say(here, capsys):
    arrays = load_file("one/model.safetensors")
    del arrays["model.norm.weight"]
    model(here / "short", arrays | {"more": np.ones(2, np.float32)})
    (here / "recipe.yaml").write_text(RECIPE.replace("one", "short"))
    assert main(["merge", "recipe.yaml", "out"]) == 2
    assert "allow=missing" in capsys.readouterr().err
    assert main(["merge", "recipe.yaml", "out", "allow=missing,unused"]) == 0
    assert set(load_file("out/model.safetensors")) == set(SHAPES)
    for words, said in [
        (["compat=paper"], "compat is 'paper'; it must be one of mergekit"),
        (["allow=all"], "allow='all', wanted some of missing, unused, shapes"),
        (["format=zip"], "format is 'zip'; it must be one of safetensors, orbax, fp8, gguf"),
        (["device=abacus"], "device='abacus' is not here; there are cpu"),
        (["seed=abc"], "seed is 'abc'; int is wanted"),
        (["--seed", "1.5"], "seed is 1.5; int is wanted"),
        (["max_shard_bytes=0"], "merge.max_shard_bytes is 0; it must be at least 1"),
        (["max_shard_byte=3"], "max_shard_byte: no such key; did you mean max_shard_bytes?"),
        (["zzz=3"], "zzz: no such key; known: seed, compat, allow, format, type, pre, device"),
    ]:
        assert main(["merge", "recipe.yaml", "other", *words]) == 2
        assert said in capsys.readouterr().err


def test_merge_writes_orbax_that_merges_again(here, capsys):
    assert main(["merge", "recipe.yaml", "plain"]) == 0
    assert main(["merge", "recipe.yaml", "saved", "format=orbax"]) == 0
    (here / "back.yaml").write_text("merge_method: passthrough\nmodels: [{model: saved}]\n")
    assert main(["merge", "back.yaml", "back"]) == 0, capsys.readouterr().err
    plain, back = load_file("plain/model.safetensors"), load_file("back/model.safetensors")
    assert set(plain) == set(back)
    assert all(np.array_equal(plain[name], back[name]) for name in plain)
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_inspect_prints_draws_and_writes(here, capsys):
    assert main(["inspect", "base", "one,two", "picture=change.svg", "json=change.json"]) == 0
    said = capsys.readouterr().out
    assert "model/layers/1" in said
    assert "A · B" in said
    found = json.loads(pathlib.Path("change.json").read_text())
    base, one = load_file("base/model.safetensors"), load_file("one/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = float(np.linalg.norm(one[name] - base[name]))
    assert found["tensors"][name]["models"][0]["norm"] == pytest.approx(wanted, rel=1e-5)
    assert pathlib.Path("change.svg").read_text().startswith("<svg")
    assert main(["inspect", "base", "one", "--json=2026"]) == 0
    assert json.loads(pathlib.Path("2026").read_text())["tensors"]
    assert main(["inspect", "base", "one", "jsn=2026"]) == 2
    assert "jsn: no such key; did you mean json?" in capsys.readouterr().err
    assert main(["inspect", "base", "nowhere"]) == 2
    assert "model 'nowhere' is no folder or file here" in capsys.readouterr().err


def test_extract_lora_and_back(here, capsys):
    assert main(["extract-lora", "base", "one", "adapter", "rank=8"]) == 0
    assert "rank 8: 100.0 % of the change" in capsys.readouterr().out
    (here / "back.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+adapter}]\n")
    assert main(["merge", "back.yaml", "back"]) == 0, capsys.readouterr().err
    one, back = load_file("one/model.safetensors"), load_file("back/model.safetensors")
    for name in SHAPES:
        np.testing.assert_allclose(back[name], one[name], atol=2e-6)
    assert main(["extract-lora", "base", "one", "again"]) == 2
    assert "extract-lora: no rank; give rank=16, or explained=0.9" in capsys.readouterr().err
    for words, said in [
        (["rank=abc"], "rank is 'abc'; int is wanted"),
        (["rank=0"], "extract-lora.rank is 0; it must be at least 1"),
        (["explained=2"], "explained is 2.0, wanted a share in (0, 1]"),
        (["rank=2", "alpha=much"], "alpha is 'much'; float is wanted"),
        (["rank=2", "dtype=int8"], "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
        (["rank=2", "targets=3"], "targets is 3; a list is wanted"),
        (["rank=2", "target=[a]"], "target: no such key; did you mean targets?"),
    ]:
        assert main(["extract-lora", "base", "one", "again", *words]) == 2
        assert said in capsys.readouterr().err
    assert not pathlib.Path("again").exists()
    assert main(["extract-lora", "base", "one", "again", "--rank", "2", "targets=layers/1/**", "--save=norm"]) == 0


def test_adapters_merge_into_an_adapter(here, capsys):
    for name in ("one", "two"):
        assert main(["extract-lora", "base", name, f"of-{name}", "explained=0.9", "save=[]", "exclude=up_proj"]) == 0
        assert "largest rank" in capsys.readouterr().out
    recipe = (
        "merge_method: linear\nadapter: core\nmodels: [{model: of-one}, {model: of-two}]\nparameters: {weight: 1}\n"
    )
    (here / "recipe.yaml").write_text(recipe)
    assert main(["merge", "recipe.yaml", "out", "--dry-run"]) == 0
    assert "linear: 2 tensors" in capsys.readouterr().out
    assert main(["merge", "recipe.yaml", "out"]) == 0
    assert "note: 100.00 % of the merged change (squared norm) is in the adapter" in capsys.readouterr().out
    whole = recipe.replace("adapter: core\n", "").replace("of-", "base+of-")
    (here / "whole.yaml").write_text(whole)
    assert main(["merge", "whole.yaml", "whole"]) == 0
    (here / "back.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+out}]\n")
    assert main(["merge", "back.yaml", "back"]) == 0
    back, wanted = load_file("back/model.safetensors"), load_file("whole/model.safetensors")
    for name in SHAPES:
        np.testing.assert_allclose(back[name], wanted[name], atol=2e-6)
    assert main(["verify", "out"]) == 0
    assert "out: 2 right" in capsys.readouterr().out
    (here / "recipe.yaml").write_text(recipe.replace("core", "knot"))
    assert main(["merge", "recipe.yaml", "again"]) == 2
    assert "unknown space of 'adapter' 'knot'; did you mean 'knots'" in capsys.readouterr().err


def test_the_recipe_of_slerp_over_depth_is_the_schedule_of_its_paper(tmp_path, monkeypatch):
    """Attention goes from the first model to the second, the MLPs back: the ends exactly, the rest by the formula."""
    monkeypatch.chdir(ROOT)
    assert main(["merge", "configs/recipes/slerp-layers.yaml", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (load_file(ROOT / "configs" / name / "model.safetensors") for name in ("miniature", "miniature-b"))

    def slerp(a, b, t):
        a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        cos = np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
        if abs(cos) > 0.9995:
            return (1 - t) * a + t * b
        angle = np.arccos(cos)
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)

    points = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0]}
    assert merged.keys() == first.keys()
    for name, found in merged.items():
        part = name.split(".")
        at = int(part[2]) / 3 if part[1] == "layers" else 0.0
        kind = next((k for k in points if k in part), None)
        t = 0.5 if kind is None else float(np.interp(at, np.linspace(0, 1, 5), points[kind]))
        np.testing.assert_allclose(found.ravel(), slerp(first[name], second[name], t), atol=3e-6, err_msg=name)
        if t in (0.0, 1.0):
            np.testing.assert_array_equal(found, (first, second)[int(t)][name], err_msg=name)


def test_a_dry_run_prints_the_conflict_of_its_sources(here, capsys):
    pair = RECIPE.replace("[{model: one}]", "[{model: base}, {model: one}, {model: two}]")
    (here / "recipe.yaml").write_text(pair)
    assert main(["merge", "recipe.yaml", "out", "--dry-run", "conflict=true"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.startswith("model/")}
    base, one, two = (load_file(f"{name}/model.safetensors") for name in ("base", "one", "two"))
    for layer in range(2):
        names = [name for name in SHAPES if f"layers.{layer}." in name]
        a, b = (np.concatenate([(m[n] - base[n]).ravel() for n in names]).astype(np.float64) for m in (one, two))
        *_, cosine, conflict, _ = rows[f"model/layers/{layer}"]  # the last is the sign of percent
        assert float(cosine) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=2e-3)
        assert float(conflict) == pytest.approx(100 * np.mean(a * b < 0), abs=0.1)
    assert "GB read in" in said
    assert not (here / "out").exists()
    slices = "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [0, 1]}]}]\n"
    for recipe, words, wanted in [
        (pair, [], "merge.conflict is of a dry run; add --dry-run"),
        (RECIPE, ["--dry-run"], "found base_model 'base' and 1 model beside it; wanted a base_model and two models"),
        (slices, ["--dry-run"], "the recipe merges slices; wanted"),
    ]:
        (here / "recipe.yaml").write_text(recipe)
        assert main(["merge", "recipe.yaml", "out", "conflict=true", *words]) == 2
        assert wanted in capsys.readouterr().err
