"""The blocks of docs/api.md and docs/decoding.md run in their order, and leave what the pages say."""

from __future__ import annotations

import re

import jax
import numpy as np
from helpers import ROOT

PAGE = ROOT / "docs" / "api.md"


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 8
    scope: dict = {}
    for block in blocks:
        # In a checkout the package is `train`; installed it is `jaxmerge.train`.
        exec(compile(block.replace("jaxmerge.train", "train"), str(PAGE), "exec"), scope)
    assert scope["base"].generate("g12,8?", max_new_tokens=24) == ["12%8=4,8%4=0#4"]
    assert len(scope["samples"][0]) == 4
    assert all(len(sample.tokens) == len(sample.logprobs) for sample in scope["samples"][0])
    base, tuned, merged = (scope[name].params for name in ("base", "tuned", "merged"))
    leaves = zip(*map(jax.tree.leaves, (base, tuned, merged)), strict=True)
    for before, after, half in leaves:
        np.testing.assert_allclose(half, (before + after) / 2, atol=1e-6)
    assert scope["merged"].path == "merged"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "between").iterdir()}
    assert (tmp_path / "between-orbax" / "weights" / "_METADATA").is_file()
    assert scope["found"]["rows"][0]["n"] == 16
    run = scope["run"]
    assert {(row["method"], row["round"]) for row in run.rounds} == {("base", 0), ("plain", 1), ("imm", 1)}
    assert run.summary["finished"]
    assert "<html" in run.report.read_text()
    assert run.path.parent.name == "runs"
    assert (tmp_path / "tiny-run" / "report.html").is_file()
    assert scope["report"]["tensors"] == len(jax.tree.leaves(base))


def test_the_example_of_decoding_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "decoding.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block.replace("jaxmerge.train", "train"), "docs/decoding.md", "exec"), scope)
    large, asked = scope["large"], ["g12,8?", "g21,6?"]
    assert large.generate(asked, max_new_tokens=24) == ["12%8=4,8%4=0#4", "21%6=1,6%1=0#1"]
    assert all(text.startswith("#") for text in large.generate(asked, max_new_tokens=24, decode=scope["guide"]))
    gentle = large.generate(asked, max_new_tokens=24, decode=scope["guide"] | {"alpha": 0.3})
    assert all("%" in text for text in gentle)
