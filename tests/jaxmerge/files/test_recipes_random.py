"""Recipes at random against mergekit 0.1.5: methods, slices, scopes, filters and gradients in all combinations.

Run by hand or in CI on Python 3.11 with the extra `oracle`:
`pytest -m oracle tests/jaxmerge/files/test_recipes_random.py`.
"""

import pathlib
import random
import shutil

import pytest
import yaml
from helpers.llamas import equal, folder, merged, tensors

from jaxmerge.files.checkpoints import shards, source
from jaxmerge.files.methods import METHODS

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
LAYERS = 5
NAMES = ["one", "two", "three"]
FILTERS = ["mlp", "self_attn", "q_proj", "layers.1", "layers.4", "embed", "norm", "lm_head", "*", None, "weight"]
# Without those that draw at random, and karcher: where it stops depends on the last bit.
COUNTS = {
    "linear": (1, 3), "slerp": (1, 1), "nuslerp": (2, 2), "multislerp": (1, 3), "task_arithmetic": (1, 3),
    "ties": (1, 3), "breadcrumbs": (1, 3), "breadcrumbs_ties": (1, 3), "sce": (1, 3), "model_stock": (2, 3),
    "nearswap": (1, 1), "ramplus_tl": (1, 3), "passthrough": (1, 1),
}  # fmt: skip
BASELESS, EITHER = ("linear", "passthrough"), ("nuslerp", "multislerp")
RANGES = {"gamma": (0.01, 0.1), "epsilon": (0.02, 0.1), "eps": (1e-8, 1e-7)}


class Draw:
    """Recipes drawn from one generator."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def chance(self, share):
        return self.random.random() < share

    def setting(self, parameter, default):
        if isinstance(default, bool):
            return self.random.choice(
                [True, False, [True, False], [{"filter": "mlp", "value": False}, {"value": True}]]
            )
        low, high = RANGES.get(parameter, (0.1, 1.0))
        number = lambda: round(self.random.uniform(low, high), 9)  # noqa: E731
        gradient = lambda: [number() for _ in range(self.random.choice([1, 2, 3, 5]))]  # noqa: E731
        kind = self.random.randrange(3)
        if kind < 2:
            return gradient() if kind else number()
        conditions = []
        for _ in range(self.random.choice([1, 2, 3])):
            pattern, value = self.random.choice(FILTERS), self.random.choice([number(), gradient()])
            conditions.append({"value": value} if pattern is None else {"filter": pattern, "value": value})
        return conditions

    def parameters(self, scope, share):
        found = {name: self.setting(name, default) for name, (_, default) in scope.items() if self.chance(share)}
        return {"parameters": found} if found else {}

    def slice(self, method, models):
        length = self.random.choice([0, 1, 2, 3, LAYERS])
        sources = []
        for model in models:
            start = self.random.randrange(LAYERS + 1 - length)
            sources.append({"model": model, "layer_range": [start, start + length]})
            if model != "base":
                sources[-1] |= self.parameters(method.each, 0.5)
        self.random.shuffle(sources)
        return {"sources": sources} | self.parameters(method.parameters, 0.3)

    def recipe(self):
        name = self.random.choice(list(COUNTS))
        method = METHODS[name]
        based = name not in BASELESS and (name not in EITHER or self.chance(0.5))
        models = self.random.sample(NAMES, self.random.randint(*COUNTS[name]))
        # Every parameter has a value in the end, so that none is missing.
        last = {p: True if isinstance(default, bool) else 0.5 for p, (_, default) in method.parameters.items()}
        last = {p: value for p, value in last.items() if p not in RANGES}
        document = {"merge_method": name, "parameters": last, "dtype": "float32"} | (
            {"base_model": "base"} if based else {}
        )
        kind = self.random.choice(["models", "slices", "modules"])
        if kind == "models":
            entries = [{"model": model} | self.parameters(method.each, 0.6) for model in models]
            if based and self.chance(0.5):
                entries.insert(self.random.randrange(len(entries) + 1), {"model": "base"})
            return document | {"models": entries}
        parts = [self.slice(method, [*models, *["base"] * based]) for _ in range(self.random.choice([1, 2, 3]))]
        if kind == "slices":
            return document | {"slices": parts}
        return document | {"modules": {"default": {"slices": parts} | self.parameters(method.parameters, 0.4)}}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", *NAMES]):
        folder(path / name, tensors(seed, layers=LAYERS), layers=LAYERS)
    return path


@pytest.mark.parametrize("seed", range(40))
def test_a_recipe_drawn_at_random(here, monkeypatch, seed):
    pytest.importorskip("torch")
    config, merge = pytest.importorskip("mergekit.config"), pytest.importorskip("mergekit.merge")
    options, tasks = pytest.importorskip("mergekit.options"), pytest.importorskip("mergekit.io.tasks")
    monkeypatch.chdir(here)
    text = yaml.safe_dump(Draw(seed).recipe(), sort_keys=False)
    tasks.LoaderCache().loaders.clear()
    shutil.rmtree("out", ignore_errors=True)
    wanted = options.MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    merge.run_merge(config.MergeConfiguration.model_validate(yaml.safe_load(text)), "out", options=wanted)
    its = {name: source.read(tensor) for name, tensor in shards.open_folder(pathlib.Path("out"))[0].items()}
    equal(merged(text, compat="mergekit"), its, rtol=2e-5)
