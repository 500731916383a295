"""A merge of adapters killed anywhere and started again ends with the same bytes; what changed meanwhile is said."""

import json
import os
import pathlib
import signal

import pytest
from helpers import forks
from helpers.dying_merge import merge_until
from helpers.tiny_adapters import D, F, adapter_folder, factors

from jaxmerge.files import journal as journals
from jaxmerge.files import merge

MODULES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
RECIPE = """
merge_method: {method}
adapter: core
models:
  - {{model: one, parameters: {{weight: 0.3, density: 0.5}}}}
  - {{model: two, parameters: {{weight: 0.9, density: 0.6}}}}
seed: 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["one", "two"]):
        arrays = {}
        for layer, module in enumerate(MODULES):
            arrays |= factors(module, (D, F), 3, 7 + 10 * seed + layer)
        adapter_folder(tmp_path / name, arrays, target_modules=["down_proj"], base_model_name_or_path="org/base")
    return tmp_path


def write(method="task_arithmetic"):
    pathlib.Path("recipe.yaml").write_text(RECIPE.format(method=method))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def test_killed_anywhere_it_ends_with_the_same_bytes(here):
    write("dare_ties")
    merge("recipe.yaml", "whole")
    # Events are before and after each line of the journal, the end and the last name; a life begins with what is left.
    for event in (1, 4, 2, 3, 2):
        died = forks.run(["recipe.yaml", "out"], os.environ, cwd=here, die=event, program=merge_until)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (here / "out").exists()
    assert journals.count_done(here / "out") == 3
    ended = forks.run(["recipe.yaml", "out"], os.environ, cwd=here, die=10**9, program=merge_until)
    assert ended.returncode == 0, ended.stderr
    assert snapshot("out") == {name: said.replace(b"whole", b"out") for name, said in snapshot("whole").items()}
    assert sorted(path.name for path in here.iterdir()) == ["one", "out", "recipe.yaml", "two", "whole"]


def interrupt(monkeypatch, after=2):
    """Merge until `after` modules are done, then stop as Ctrl-C does."""
    add, count = journals.Journal.add, 0

    def counting(self, record):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "add", counting)
        with pytest.raises(KeyboardInterrupt):
            merge("recipe.yaml", "out")
    assert journals.count_done(pathlib.Path("out")) == after


def test_only_what_is_missing_or_damaged_is_merged_again(here, monkeypatch):
    write()
    merge("recipe.yaml", "whole")
    interrupt(monkeypatch)
    part = here / ".out.merging" / "modules" / "0"
    part.write_bytes(bytes(part.stat().st_size))
    notes = merge("recipe.yaml", "out")["notes"]
    assert f"{MODULES[0]} had not reached the disk; merged again" in notes
    assert "1 of 3 modules were there already" in notes
    assert snapshot("out")["adapter_model.safetensors"] == snapshot("whole")["adapter_model.safetensors"]


def test_another_recipe_begins_again(here, monkeypatch):
    write()
    interrupt(monkeypatch)
    write("ties")
    report = merge("recipe.yaml", "out")
    assert any("of another recipe" in note for note in report["notes"])
    assert not any("there already" in note for note in report["notes"])
    merge("recipe.yaml", "whole")
    assert snapshot("out")["adapter_model.safetensors"] == snapshot("whole")["adapter_model.safetensors"]


def test_an_adapter_that_changed_is_named_and_what_is_done_is_kept(here, monkeypatch):
    write()
    interrupt(monkeypatch)
    config = here / "two" / "adapter_config.json"
    said = config.read_text()
    config.write_text(json.dumps(json.loads(said) | {"lora_alpha": 7}))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"module 'model\.layers\.0.*' of an adapter has changed .*put it back"):
            merge("recipe.yaml", "out")
    config.write_text(said)  # another time, the same bytes
    assert "2 of 3 modules were there already" in merge("recipe.yaml", "out")["notes"]
