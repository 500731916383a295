r"""Merging on disk against mergekit and against the floor: python benchmarks/merge.py [key=value …]

  layers=22            of 44 M parameters each, and 131 M in embedding and head: 1.1 B (2.2 GB in bfloat16) with 22
  methods=linear,…     of METHODS below
  repeats=3            medians of; ours and the floor in turns, for these machines are shared
  peer=PATH            mergekit's command `mergekit-yaml` (of another environment); without it, it is left out
  peer_repeats=1       it takes minutes
  work=DIR             where models are made (5 × 2.2 GB) and kept for the next time; a temporary folder without it

Four models are made, a base and three tuned ones, deltas a tenth of the weights. The floor reads every input once
through a reused buffer and writes the output once, with fsync as we do; files are in the page cache if it holds them.
Seconds are of the whole command. "first" is the first run of a method with these shapes, which compiles; later ones
find it in the compile cache. "start" is what importing takes, of either: it is taken off where times are compared with
the floor, not where ours is compared with mergekit's. Memory is the peak of RssAnon.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from jaxmerge.files.checkpoints import safetensors

HIDDEN, FFN, KEYS, VOCABULARY = 2048, 5632, 256, 32000
BF16 = np.dtype(ml_dtypes.bfloat16)
POOL = 1 << 24
PEER_FLAGS = ["--no-copy-tokenizer", "--no-write-model-card"]  # a card would ask the hub who the models are

# method → (models merged, takes a base, parameters of every model, parameters of all, goal × floor)
METHODS = {
    "linear": (3, False, "weight: 0.33", "", 2),
    "task_arithmetic": (3, True, "weight: 0.33", "", 2),
    "slerp": (2, False, "", "t: 0.4", None),
    "nuslerp": (2, False, "weight: 0.5", "", None),
    "model_stock": (3, True, "", "", None),
    "ties": (3, True, "weight: 0.33, density: 0.2", "", 4),
    "breadcrumbs": (3, True, "weight: 0.33, density: 0.6", "", 4),
    "sce": (3, True, "", "select_topk: 0.5", 4),
    "dare_ties": (3, True, "weight: 0.33, density: 0.5", "", None),
    "della": (3, True, "weight: 0.33, density: 0.5", "", None),
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }.items():  # fmt: skip
            found[f"{prefix}{name}.weight"] = shape
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_model(folder: pathlib.Path, layers: int, seed: int) -> None:
    """A base (seed 0), or a model tuned from it: the base's numbers and a normal delta, from two pools."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02)
    delta = np.random.default_rng(seed).standard_normal(POOL - 4099, np.float32) * np.float32(0.002 if seed else 0)
    wanted = shapes(layers)
    plan = safetensors.plan({name: (BF16, shape) for name, shape in wanted.items()}, 5_000_000_000)
    writer = safetensors.Writer(folder, plan)
    at = 0
    for name, shape in wanted.items():
        index = np.arange(at, at + int(np.prod(shape)))
        weights = base[index % base.size] + delta[index % delta.size]
        writer.write(name, weights.astype(BF16).view(np.uint8))
        at += index.size
    writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def recipe(method: str) -> tuple[str, list[str]]:
    count, based, each, shared, _ = METHODS[method]
    names = ["one", "two", "three"][:count]
    lines = [f"merge_method: {method}", "dtype: bfloat16", "models:"]
    lines += [f"  - {{model: {name}, parameters: {{{each}}}}}" for name in names]
    if based or method == "slerp":
        lines.append(f"base_model: {'base' if based else names[0]}")
    if shared:
        lines.append(f"parameters: {{{shared}}}")
    return "\n".join(lines) + "\n", [*names, *(["base"] if based else [])]


def floor(inputs: list[pathlib.Path], out: pathlib.Path) -> float:
    out.unlink(missing_ok=True)
    buffer = np.empty(8 << 20, np.uint8)
    start = time.perf_counter()
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer.data):
                pass
    left = inputs[0].stat().st_size
    with open(out, "wb", buffering=0) as file:
        while left:
            left -= file.write(buffer[: min(buffer.size, left)].data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds of a command and its peak of anonymous memory, in bytes, children included one at a time."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())
        except (FileNotFoundError, ProcessLookupError):
            break
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return time.perf_counter() - start, peak


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    layers, repeats = int(given.pop("layers", 22)), int(given.pop("repeats", 3))
    methods = given.pop("methods", ",".join(METHODS)).split(",")
    peer, peer_repeats = given.pop("peer", None), int(given.pop("peer_repeats", 1))
    kept = given.pop("work", None)
    if given:
        raise SystemExit(f"unknown {', '.join(given)}; see the top of {__file__}")
    ours = [sys.executable, "-m", "train.cli", "merge"]
    work = pathlib.Path(kept or tempfile.mkdtemp(prefix="jaxmerge-benchmark-"))
    source = str(pathlib.Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    work.mkdir(exist_ok=True)
    for seed, name in enumerate(["base", "one", "two", "three"]):
        make_model(work / name, layers, seed)
    os.chdir(work)
    shutil.rmtree("cache", ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work.resolve() / "cache")
    count = sum(int(np.prod(shape)) for shape in shapes(layers).values())
    starts = {
        "ours": statistics.median(
            timed([sys.executable, "-c", "import jaxmerge.files, train.verbs"])[0] for _ in range(3)
        )
    }
    if peer:
        python = str(pathlib.Path(peer).parent / "python")
        starts["mergekit"] = statistics.median(
            timed([python, "-c", "import mergekit.merge, mergekit.merge_methods"])[0] for _ in range(3)
        )
    print(
        f"{count / 1e9:.2f} B parameters in bfloat16; start of {', '.join(f'{k} {v:.1f} s' for k, v in starts.items())}"
    )
    print("method           floor s  first s   ours s  × floor (goal)    MB    mergekit s  × ours     MB  × ours")
    for method in methods:
        text, names = recipe(method)
        pathlib.Path("recipe.yaml").write_text(text)
        floors, runs, peers = [], [], []
        shutil.rmtree("out", ignore_errors=True)
        first = timed([*ours, "recipe.yaml", "out"])
        for _ in range(repeats):
            shutil.rmtree("out", ignore_errors=True)
            floors.append(floor([pathlib.Path(name, "model.safetensors") for name in names], pathlib.Path("floor")))
            runs.append(timed([*ours, "recipe.yaml", "out"]))
        for _ in range(peer_repeats if peer else 0):
            shutil.rmtree("theirs", ignore_errors=True)
            peers.append(timed([str(peer), "recipe.yaml", "theirs", "--allow-crimes", *PEER_FLAGS]))
        shutil.rmtree("theirs", ignore_errors=True)
        bottom, seconds = statistics.median(floors), statistics.median(run[0] for run in runs)
        peak, goal = max(run[1] for run in (first, *runs)), METHODS[method][-1]
        ratio = (seconds - starts["ours"]) / bottom
        line = f"{method:<16} {bottom:7.2f}  {first[0]:7.2f}  {seconds:7.2f}  {ratio:6.2f} "
        line += f"{f'(≤ {goal})' if goal else '':<8} {peak / 1e6:6.0f}"
        if peers:
            other, memory = statistics.median(run[0] for run in peers), max(run[1] for run in peers)
            line += f"    {other:8.1f}  {other / seconds:6.2f}  {memory / 1e6:6.0f}  {memory / peak:6.2f}"
        print(line, flush=True)
    shutil.rmtree("out", ignore_errors=True)
    if kept is None:
        os.chdir("/")
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
