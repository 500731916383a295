"""The programs from Python: they are the command's, they refuse by name, and nothing heavy is imported early."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import ROOT

import jaxmerge
import train
from train.api import Model, evaluate, finetune, improve
from train.api import programs as api
from train.improve.settings import Improve
from train.learn.settings import Finetune
from train.log import UserError
from train.models.open import load_model
from train.resolve import build, load
from train.runtime import stop

MINIATURE = ROOT / "configs" / "miniature"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(MINIATURE)


@pytest.fixture
def stub(monkeypatch):
    """The two programs that make runs, replaced by what they are called with."""
    calls = []

    def program(config, *, name, out=None, **rest):
        calls.append((config, name, out))
        return MINIATURE.parent

    monkeypatch.setattr(api, "run_rounds", program)
    monkeypatch.setattr(api, "train", program)
    monkeypatch.setattr(api.Model, "load", lambda path: path)
    return calls


def test_keyword_arguments_are_the_keys_of_a_config(stub, tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    improve(**values)
    improve(values, out=tmp_path / "run")
    improve(ROOT / "configs" / "tiny.yaml", rounds=3, **dict[str, Any]({"sft.epochs": 2}))
    improve("tiny")
    by_keys, by_dict, changed, by_name = stub
    whole = load(Improve, ROOT / "configs" / "tiny.yaml")
    assert (by_keys, by_dict) == ((whole, "improve", None), (whole, "improve", tmp_path / "run"))
    assert changed == (load(Improve, ROOT / "configs" / "tiny.yaml", ["rounds=3", "sft.epochs=2"]), "tiny", None)
    assert by_name == (whole, "tiny", None)
    assert values == yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text()), "the caller's own is left alone"


def test_models_tasks_and_examples_have_short_forms(stub, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    families = [{"family": "gcd", "domain": "id", "train": 4, "test": 4}]
    improve(model=model, tasks=families, methods={"plain": {}})
    improve({"model": {"path": str(MINIATURE)}, "tasks": {"families": families}, "methods": {"plain": {}}})
    assert stub[0] == stub[1]
    examples = [{"prompt": "1+1?", "completion": "é"}, {"messages": [{"role": "user", "content": "a"}]}]
    finetune(MINIATURE, examples, sft={"epochs": 2})
    finetune(model, examples, sft={"epochs": 2}, out=tmp_path / "there" / "run")
    (first, name, out), (second, other, there) = stub[2:]
    assert first.sft.epochs == 2
    assert first.model.path == second.model.path == str(MINIATURE)
    assert (name, out, other, there) == ("finetune", None, "run", tmp_path / "there" / "run")
    for config, place in ((first, tmp_path / "runs"), (second, tmp_path / "there")):
        path = tmp_path / config.data.path
        assert path.parent == place
        assert [json.loads(line) for line in path.read_text().splitlines()] == examples
    finetune(MINIATURE, {"path": "x.jsonl", "learn": "last"})
    wanted = {"model": {"path": str(MINIATURE)}, "data": {"path": "x.jsonl", "learn": "last"}}
    assert stub[4][0] == build(Finetune, wanted)


def test_what_is_wrong_is_refused_by_name(stub, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    changed = model.replace(params=jax.tree.map(lambda leaf: leaf * 2, model.params))
    families = [{"family": "gcd", "domain": "id", "train": 1}]
    for call, words in [
        (lambda: improve(model="m", methods={}), "tasks is missing; it has no default"),
        (lambda: improve("tiny", tasks=[]), "at least one family with domain: id and train"),
        (lambda: improve("tiny", round=3), "config.round: no such key; did you mean rounds"),
        (lambda: improve("tiny", rounds="3"), "rounds is '3'; int is wanted"),
        (lambda: improve("tini"), "tini: no such config; did you mean tiny"),
        (lambda: improve("tiny", sweep={}), "sweep: an experiment is many runs; begin it with `jaxmerge improve"),
        (lambda: improve("tiny", **dict[str, Any]({"rounds.x": 1})), "rounds.x: rounds holds 2, not a map of keys"),
        (lambda: finetune(changed, "x.jsonl"), r"the model is in memory alone; write it with model\.save\(FOLDER\)"),
        (lambda: finetune("m", []), "data is an empty list"),
        (lambda: finetune("m", "x.jsonl", epochs=2), "config.epochs: no such key"),
        (lambda: evaluate("m", "x.jsonl", limits=3), "evaluate.limits: no such key; did you mean limit"),
        (lambda: evaluate("m", families, limit=3), "evaluation.limit: no such key"),
        (lambda: model.generate("g1,2?", max_tokens=3), "generate.max_tokens: no such key; did you mean max_new"),
        (lambda: model.generate(["g1,2?"], samples=3), "samples is 3 at temperature 0"),
        (lambda: model.generate(["g1,2?", {"text": "a"}]), r"prompts\[1\]: found the keys \['text'\]"),
        (lambda: model.generate([{"role": "user", "content": "a"}]), r"prompts\[0\] has messages, but this model has"),
        (lambda: model.replace(params={"w": jnp.ones(1)}), "params: the parameters do not fit the config: "),
        (lambda: model.save(tmp_path / "out", dtype="int8"), "dtype='int8'; choose"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            call()
    assert list(tmp_path.iterdir()) == []


def test_generate_gives_texts_or_samples(model):
    prompts = ["g12,8?", "g7,21?"]
    texts = model.generate(prompts, max_new_tokens=24)
    assert texts[0] == "12%8=4,8%4=0#4"
    assert model.generate(prompts[1], max_new_tokens=24) == texts[1:]
    assert model.generate([{"prompt": "g12,8?"}], max_new_tokens=24, stop="#") == ["12%8=4,8%4=0"]
    many = model.generate(prompts, temperature=1.0, samples=3, seed=4, max_new_tokens=24, logprobs=True)
    assert [len(samples) for samples in many] == [3, 3]
    again = model.generate(prompts, temperature=1.0, samples=3, seed=4, max_new_tokens=24)
    assert again == [[sample.text for sample in samples] for samples in many]
    assert all(len(s.tokens) == len(s.logprobs) and max(s.logprobs) <= 0 for samples in many for s in samples)


def test_a_model_over_devices_gives_the_same_texts(model):
    spread = Model.load(MINIATURE, mesh={"fsdp": 2})
    assert len(spread.params["model"]["embed_tokens"]["weight"].sharding.device_set) == 2
    prompts = ["g12,8?", "g7,21?", "3+4+5?"]
    assert spread.generate(prompts, max_new_tokens=24) == model.generate(prompts, max_new_tokens=24)
    with pytest.raises(UserError, match=r"mesh.fspd: no such key; did you mean fsdp"):
        Model.load(MINIATURE, mesh={"fspd": 2})


def test_a_merged_model_is_saved_and_read_again(model, tmp_path):
    tripled = jax.tree.map(lambda leaf: leaf * 3, model.params)
    merged = model.replace(params=jaxmerge.imm([tripled], base=model.params, alpha=0.5))
    assert (model.path, merged.path) == (str(MINIATURE), None)
    saved = merged.save(tmp_path / "out")
    assert saved.path == str(tmp_path / "out")
    again = load_model(tmp_path / "out")
    for leaf, wanted in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_allclose(leaf, 2 * wanted, rtol=1e-6)
    assert again.tokenizer.encode("g12,8?") == model.tokenizer.encode("g12,8?")
    assert repr(saved) == f"Model({tmp_path / 'out'}: llama, 0.8081 M parameters)"


def test_a_model_in_memory_is_evaluated_as_one_on_disk(model, capsys):
    tasks = {"style": "compact", "families": [{"family": "gcd", "domain": "ood", "test": 8}]}  # nothing to learn from
    in_memory = evaluate(model, tasks, max_new_tokens=24, quiet=True)
    on_disk = evaluate(MINIATURE, tasks, max_new_tokens=24, quiet=True)
    zero = evaluate(model.replace(params=jax.tree.map(jnp.zeros_like, model.params)), tasks, quiet=True)
    assert [row["accuracy"] for row in in_memory["rows"]] == [row["accuracy"] for row in on_disk["rows"]]
    assert zero["rows"][0]["accuracy"] == 0.0
    assert capsys.readouterr().out == ""


def test_an_interruption_says_that_the_call_goes_on(stub, monkeypatch):
    def interrupted(*words, **keys):
        os.kill(os.getpid(), 2)  # as the stop button of a notebook does
        stop.check()

    monkeypatch.setattr(api, "run_rounds", interrupted)
    handler = stop.signal.getsignal(2)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on from here"):
        improve("tiny")
    assert stop.signal.getsignal(2) is handler
    monkeypatch.setattr(api, "run_rounds", lambda *words, **keys: stop.check() or MINIATURE)
    assert improve("tiny").path == MINIATURE, "an interruption that was answered stops no later run"


def test_the_package_imports_nothing_before_it_is_asked():
    code = (
        "import json, sys, train, train.improve.settings; early = sorted({'flax', 'orbax'} & set(sys.modules));"
        "import train.improve.run, train.evaluate.run as run;"
        "print(json.dumps([early, callable(train.improve), callable(train.evaluate), run.__name__, "
        "train.improve.run.__name__, sorted(train.__all__)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == [
        [], True, True, "train.evaluate.run", "train.improve.run", ["Model", "Run", "evaluate", "finetune", "improve"],
    ]  # fmt: skip


def test_the_package_gives_its_programs():
    for name in train.__all__:
        assert getattr(train, name) is getattr(sys.modules["train.api"], name)
        assert name in dir(train)
    assert list(inspect.signature(train.improve).parameters) == ["config", "out", "quiet", "keys"]
    with pytest.raises(AttributeError, match="module 'train' has no attribute 'improv'"):
        _ = train.improv  # pyright: ignore
