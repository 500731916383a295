"""The recipes of CONTRIBUTING.md: each block is taken from the page, run, and does what the page says of it."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.goldens.cases import BASE
from helpers.tiny_models import config_of, logits, write_folder

import jaxmerge
import jaxmerge.files
from jaxmerge.rules import RULES
from train.improve.plan import plan
from train.improve.settings import Improve
from train.log import UserError
from train.models.families import FAMILIES
from train.models.hf import load_hf, save_hf
from train.resolve import build, read_yaml
from train.tasks import FamilySpec, build_suite
from train.tasks.local import LOCAL

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(title: str, language: str) -> str:
    """The code of a section, at most ten lines of it without imports and what is empty."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10, title
    return code


@pytest.fixture(autouse=True)
def registries():
    """What the blocks add is gone after each test."""
    before = [(registry, dict(registry)) for registry in (RULES, LOCAL, FAMILIES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def run(title: str) -> dict:
    scope: dict = {"__name__": "recipe"}
    exec(compile(block(title, "python"), "CONTRIBUTING.md", "exec"), scope)
    return scope


def test_a_rule_is_in_memory_in_recipes_and_in_the_table(tmp_path):
    run("Adding a merge rule")
    base = {"w": jnp.array([1.0, 2.0, 3.0], jnp.float32)}
    models = [{"w": base["w"] + jnp.array(d, jnp.float32)} for d in ([2, 0, -1], [5, 0.25, 1])]
    merged = jax.jit(lambda scale: RULES["sign_mean"](models, base=base, scale=scale))(0.5)
    np.testing.assert_array_equal(merged["w"], np.array([1.5, 2.25, 3.0], np.float32))
    paths = [
        str(jaxmerge.files.save(tree, tmp_path / name))
        for name, tree in zip(("base", "one", "two"), (base, *models), strict=True)
    ]
    recipe = {
        "merge_method": "sign_mean",
        "base_model": paths[0],
        "models": [{"model": path} for path in paths[1:]],
        "parameters": {"scale": 0.5},
    }
    jaxmerge.files.merge(recipe, tmp_path / "out")
    np.testing.assert_array_equal(jaxmerge.files.load(tmp_path / "out")["w"], merged["w"])
    assert repr(RULES).splitlines()[-1].split("  ")[-1].strip() == "θ_b + λ mean_i sign τ_i"
    with pytest.raises(TypeError, match=r"sign_mean\(\) has no coefficient 'scal'; did you mean 'scale'"):
        RULES["sign_mean"](models, base=base, scal=1.0)


def test_a_task_asks_and_judges(tmp_path):
    run("Adding a task")
    path = tmp_path / "questions.jsonl"
    rows = [{"problem": f"Is {n} even?", "answer": "Yes" if n % 2 == 0 else "No"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = FamilySpec("yesno", "id", {"path": str(path)}, train=2, test=2)
    suite = build_suite([spec], seed=0, style="instruct")
    question = next(q for q in suite.all if q.text == "Is 2 even?")
    assert suite.prompt(question) == [{"role": "user", "content": "Is 2 even? Answer yes or no."}]
    said = ["Yes.", "yes, not no", "No, yes", "Eyes", ""]
    assert [suite.verify(question, text) for text in said] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_family_is_read_run_and_written(tmp_path):
    run("Adding a model family")
    attributes = {**BASE, "model_type": "mymodel", "architectures": ["MyModelForCausalLM"]}
    config, params = load_hf(write_folder(tmp_path / "model", attributes))
    assert (config.family, config.qk_norm) == ("mymodel", True)
    assert "q_norm" in params["model"]["layers"]["0"]["self_attn"]
    found = logits(config, params)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0
    save_hf(tmp_path / "again", config, params)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["architectures"] == ["MyModelForCausalLM"]
    assert load_hf(tmp_path / "again")[0] == config
    with pytest.raises(UserError, match="mlp_bias"):
        config_of({**attributes, "mlp_bias": True})


def test_a_method_is_an_entry_of_the_config():
    run("Adding a merge rule")
    values = read_yaml(ROOT / "configs" / "tiny.yaml")
    config = build(Improve, {**values, **yaml.safe_load(block("Adding a method of self-improvement", "yaml"))})
    todo, outcomes = plan(config)
    assert [(o.method, o.round) for o in outcomes if o.method == "half-sign"] == [("half-sign", 2)]
    merge = todo["round-2/ties-previous/merge"]
    assert merge.inputs["anchor"] == "round-1/ties-previous/merge"
    assert merge.settings["merge"]["parameters"] == {"density": 0.3}
