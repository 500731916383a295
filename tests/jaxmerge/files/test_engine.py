"""The engine under a merge on disk: chunks, buffers, statistics, memory; laws that hold for every rule."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT
from safetensors.numpy import load_file, save_file

import jaxmerge
from jaxmerge.files import engine, merge
from jaxmerge.files.buffers import ALIGNMENT, Buffers
from jaxmerge.files.methods import METHODS
from jaxmerge.files.plan import Input, Job

SHAPES = {"model.embed_tokens.weight": (50, 11), "model.layers.0.w": (23, 11), "model.norm.weight": (11,)}
ELEMENTWISE = {
    "linear": "parameters: {weight: 0.3}",
    "task_arithmetic": "base_model: base\nparameters: {weight: 0.3}",
    "extrapolation_merge": "base_model: base\nparameters: {alpha: 0.3}",
    "ram": "base_model: base",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two"]):
        rng = np.random.default_rng(seed)
        model(tmp_path / name, {t: rng.standard_normal(shape).astype(np.float32) for t, shape in SHAPES.items()})
    return tmp_path


def model(path, arrays):
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')


def run(method, rest, out="out", models=("one", "two"), **keywords):
    listed = "".join(f"  - {{model: {name}}}\n" for name in models)
    pathlib.Path("recipe.yaml").write_text(f"merge_method: {method}\nmodels:\n{listed}{rest}\n")
    return merge("recipe.yaml", out, **keywords)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_chunks_change_nothing(here, monkeypatch, method):
    run(method, ELEMENTWISE[method], "whole")
    monkeypatch.setattr(engine, "CHUNK", 64)
    monkeypatch.setattr(engine, "LENGTHS", (16, 64))
    run(method, ELEMENTWISE[method], "chunks")
    whole, chunks = load_file("whole/model.safetensors"), load_file("chunks/model.safetensors")
    assert all(np.array_equal(whole[name], chunks[name]) for name in SHAPES)
    record = [json.loads(pathlib.Path(out, "merge.json").read_text()) for out in ("whole", "chunks")]
    for name in SHAPES:
        for key, value in record[0]["tensors"][name].items():
            other = record[1]["tensors"][name][key]
            if key != "models":  # their names; of [[i, j, cosine], …] all numbers
                np.testing.assert_allclose(np.float64(other), np.float64(value), rtol=1e-5)


def elementwise_rules():
    return sorted(name for name, rule in jaxmerge.RULES.items() if rule.needs.elementwise)


@pytest.mark.parametrize("name", elementwise_rules())
def test_a_rule_that_says_it_is_elementwise_is(name):
    rule, rng = jaxmerge.RULES[name], np.random.default_rng(0)
    count = rule.needs.most or 3
    trees = [{"w": jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)} for _ in range(count + 1)]
    keywords: dict[str, Any] = {"base": trees[-1]} if rule.needs.base == "required" else {}
    size = {"w": jnp.asarray(rng.random((6, 8)), jnp.float32)}
    keywords |= {"fishers": [size, trees[0], size][:count]} if name == "fisher" else {}
    keywords |= {"nearswap": {"t": 0.5}, "extrapolate": {"alpha": 0.3}, "extrapolation_merge": {"alphas": 0.3}}.get(
        name, {}
    )
    whole = rule(trees[:count], **keywords)["w"]

    def part(tree):
        return {"w": tree["w"].reshape(-1)[5:21]}

    parts = [part(tree) for tree in trees]
    if "base" in keywords:
        keywords["base"] = parts[-1]
    if "fishers" in keywords:
        keywords["fishers"] = [part(tree) for tree in keywords["fishers"]]
    assert jnp.array_equal(rule(parts[:count], **keywords)["w"], whole.reshape(-1)[5:21])


def test_statistics_are_what_they_say(here):
    run("task_arithmetic", "base_model: base\nparameters: {weight: 0.3}")
    arrays = {name: load_file(f"{name}/model.safetensors") for name in ("base", "one", "two", "out")}
    record = json.loads(pathlib.Path("out/merge.json").read_text())
    assert set(record["digests"]) == {"base", "one", "two"}
    for name in SHAPES:
        found = record["tensors"][name]
        base = arrays["base"][name].astype(np.float64)
        one, two, out = (arrays[model][name] - base for model in ("one", "two", "out"))
        assert found["models"] == ["one", "two", "base"]
        assert found["delta"] == pytest.approx([np.linalg.norm(one), np.linalg.norm(two)], rel=1e-5)
        cosine = np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two)
        assert found["cosine"] == [[0, 1, pytest.approx(cosine, rel=1e-4, abs=1e-6)]]
        assert found["conflict"] == pytest.approx(np.mean(one * two < 0), rel=1e-5)
        assert found["result"] == pytest.approx(np.linalg.norm(out), rel=1e-5)
        assert found["changed"] == pytest.approx(np.mean(out != 0), rel=1e-5)


def test_values_too_large_to_square_are_no_error(here):
    large = {t: np.full(shape, 1e30, np.float32) for t, shape in SHAPES.items()}
    model(here / "large", large)
    run("linear", "parameters: {weight: 1}", models=("large", "one"))
    found = load_file("out/model.safetensors")["model.norm.weight"]
    np.testing.assert_allclose(found, 5e29, rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"of the result has \d+ NaN or infinite elements as float16, though the inputs"
    ):
        run("linear", "parameters: {weight: 1}\nout_dtype: float16", "half", models=("large", "one"))


def test_buffers_are_reused_aligned_and_bounded():
    buffers = Buffers(1000)
    first = buffers.take([300, 200])
    assert [buffer.size for buffer in first] == [300, 200]
    assert all(buffer.ctypes.data % ALIGNMENT == 0 for buffer in first)
    got = []
    waiting = threading.Thread(target=lambda: got.append(buffers.take([600])))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # 1,100 bytes are more than the limit
    addresses = {buffer.ctypes.data for buffer in first}
    buffers.give(first)
    waiting.join(10)
    assert [buffer.size for buffer in got[0]] == [600]
    assert buffers.allocated <= 1000
    buffers.give(got[0])
    again = buffers.take([600])
    assert again[0].ctypes.data == got[0][0].ctypes.data
    assert addresses
    with pytest.raises(ValueError, match="buffers of 1200 bytes asked for, the limit is 1000"):
        buffers.take([600, 600])


def test_buffers_of_any_sizes_never_wait_for_nobody():
    buffers = Buffers(1000)
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = (rng.dirichlet(np.ones(rng.integers(1, 5))) * 1000).astype(int).tolist()
        taken = buffers.take(sizes)
        assert buffers.allocated <= 1000
        buffers.give(taken)


def test_an_error_in_a_station_ends_the_run(here, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(engine, "merge_arrays", broken)
    with pytest.raises(RuntimeError, match="on fire"):
        run("linear", "parameters: {weight: 0.3}")


def one_job(method, **coefficients):
    inputs, base = (Input("one", cast(Any, None)),), Input("base", cast(Any, None))
    return Job("a.w", "a/w", METHODS[method], inputs, base, coefficients, None, np.dtype(np.float32), (11,))


def test_errors_of_a_rule_name_the_tensor():
    with pytest.raises(ValueError, match=r"tensor 'a\.w': density=2.0, wanted a share in \[0, 1\]"):
        engine.merge_arrays(one_job("ties", weights=[1.0], density=[2.0]), [np.ones(11, np.float32)] * 2, 0)


def test_masks_are_the_same_whatever_generator_jax_has_by_default():
    job = one_job("dare_linear", weights=[1.0], density=[0.5])
    arrays = [np.ones(11, np.float32), np.zeros(11, np.float32)]
    wanted = engine.merge_arrays(job, arrays, 3)
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        assert jnp.array_equal(engine.merge_arrays(job, arrays, 3), wanted)
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")


PEAK = """
import re, sys, threading, time
import numpy as np, jax, jax.numpy as jnp
jax.block_until_ready(jnp.zeros(3) + 1)
from jaxmerge.files import merge

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
merge("recipe.yaml", sys.argv[1])
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("linear", "parameters: {weight: 0.3}"),
        ("ties", "base_model: base\nparameters: {weight: 0.3, density: 0.2}"),
        ("sce", "base_model: base\nparameters: {select_topk: 0.5}"),
        ("breadcrumbs", "base_model: base\nparameters: {weight: 0.3, density: 0.5}"),
        ("model_stock", "base_model: base"),
        ("dare_ties", "base_model: base\nparameters: {weight: 0.3, density: 0.5}"),
        ("della", "base_model: base\nparameters: {weight: 0.3, density: 0.5}"),
    ],
)
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, monkeypatch, method, rest):
    """At most (inputs + 1) times the largest tensor as stored, and 300 MB; SCE's variances and DELLA's ranks beside."""
    monkeypatch.chdir(tmp_path)
    shape, layers = (8192, 8192), 6
    for seed, name in enumerate(["base", "one", "two"]):
        pool = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
        model(tmp_path / name, {f"model.layers.{l}.w": np.roll(pool, l) for l in range(layers)})
    largest = 2 * shape[0] * shape[1]
    inputs = 2 + ("base_model" in rest)
    listed = "".join(f"  - {{model: {name}}}\n" for name in ("one", "two"))
    pathlib.Path("recipe.yaml").write_text(f"merge_method: {method}\nmodels:\n{listed}{rest}\n")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, "out"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    peak = int(ran.stdout)
    print(f"{method}: {peak / 1e6:.0f} MB above the start, {time.monotonic() - start:.1f} s")
    assert peak <= (inputs + 1 + {"sce": 2, "della": 2}.get(method, 0)) * largest + 300e6
