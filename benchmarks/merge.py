r"""Merging on disk against the floor, another checkout and mergekit: python benchmarks/merge.py [key=value …]

  methods=linear,…     of METHODS below; `all`: every method of recipes
  layers=22            of 44 M parameters each, and 131 M in embedding and head: 1.1 B (2.2 GB in bfloat16) with 22
  hidden=2048, vocabulary=32000
  repeats=3            medians of; ours and the floor in turns, for these machines are shared
  warm=false           true: one process makes all merges, so that neither its start nor compiling counts
  before=DIR           another checkout, in turns with this one
  slow=2               where ours is more than so many floors, its passes are named; 0: never
  peer=PATH            mergekit's command `mergekit-yaml` (of another environment); without it, it is left out
  peer_repeats=1       it takes minutes
  work=DIR             where models are made (5 × 2.2 GB) and kept for the next time; a temporary folder without it

A minute or two: python benchmarks/merge.py methods=all layers=1 hidden=512 vocabulary=4000 warm=true slow=0

Four models are made, a base and three tuned ones, deltas a tenth of the weights. The floor reads every input once
through a reused buffer and writes the output once, with fsync as we do; files are in the page cache if it holds them.
Seconds are of the whole command, unless they are warm. "first" is the first run of a method with these shapes, which
compiles; later ones find it in the compile cache. "start" is what importing takes, of either: it is taken off where
times are compared with the floor, not where ours is compared with mergekit's. "cpu" is processor time of ours over the
floor's, which other work on the machine changes less. Memory is the peak of RssAnon.

Passes are those of benchmarks/passes.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.methods import REQUIRED
from jaxmerge.files.methods import methods as of_recipes
from jaxmerge.rules import RULES

BF16 = np.dtype(ml_dtypes.bfloat16)
POOL = 1 << 24
PEER_FLAGS = ["--no-copy-tokenizer", "--no-write-model-card"]  # a card would ask the hub who the models are
ROOT = pathlib.Path(__file__).resolve().parent.parent
START = "import jaxmerge.files, train.cli.verbs"

# method → (models merged, takes a base, parameters of every model, parameters of all, goal × floor)
METHODS = {
    "linear": (3, False, "weight: 0.33", "", 1.5),
    "task_arithmetic": (3, True, "weight: 0.33", "", 1.5),
    "slerp": (2, False, "", "t: 0.4", 1.5),
    "nuslerp": (2, False, "weight: 0.5", "", None),
    "model_stock": (3, True, "", "", 1.5),
    "ties": (3, True, "weight: 0.33, density: 0.2", "", 1.5),
    "breadcrumbs": (3, True, "weight: 0.33, density: 0.6", "", 1.5),
    "sce": (3, True, "", "select_topk: 0.5", 1.5),
    "dare_linear": (3, True, "weight: 0.33, density: 0.5", "", 1.8),
    "dare_ties": (3, True, "weight: 0.33, density: 0.5", "", 1.8),
    "della": (3, True, "weight: 0.33, density: 0.5", "", 6),
    "della_linear": (3, True, "weight: 0.33, density: 0.5", "", 6),
}
# Of other methods: what has no default, or one that leaves nothing to do.
VALUES = {"weight": 0.33, "density": 0.5, "t": 0.001, "alpha": 0.3, "drop": 0.2}


class Run(NamedTuple):
    """One merge, or the floor: seconds, processor seconds, peak memory in bytes."""

    seconds: float
    cpu: float
    memory: int = 0


def settings(method: str) -> tuple[int, bool, str, str, float | None]:
    """What METHODS says of a method, or what its parameters' defaults and VALUES make of it."""
    if method in METHODS:
        return METHODS[method]
    found = of_recipes()[method]
    needs = RULES[found.rule].needs
    parts = []
    for parameters in (found.each, found.shared):
        chosen = {name: VALUES.get(name, 1) for name, (_, default) in parameters.items() if default is REQUIRED}
        chosen |= {name: VALUES[name] for name in parameters if name in ("density", "drop")}
        parts.append(", ".join(f"{name}: {value}" for name, value in chosen.items()))
    return needs.most or 3, needs.base == "required" or found.base_first, *parts, None


def shapes(layers: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    ffn, keys = hidden * 11 // 4, hidden // 8
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            found[f"{prefix}{name}.weight"] = shape
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_model(folder: pathlib.Path, wanted: dict[str, tuple[int, ...]], seed: int) -> None:
    """A base (seed 0), or a model tuned from it: the base's numbers and a normal delta, from two pools."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02)
    delta = np.random.default_rng(seed).standard_normal(POOL - 4099, np.float32) * np.float32(0.002 if seed else 0)
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
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": wanted["model.norm.weight"][0],
        "intermediate_size": wanted["model.layers.0.mlp.up_proj.weight"][0], "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": wanted["lm_head.weight"][0],
        "num_hidden_layers": sum(name.endswith("mlp.up_proj.weight") for name in wanted),
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def recipe(method: str) -> tuple[str, list[str]]:
    count, based, each, shared, _ = settings(method)
    names = ["one", "two", "three"][:count]
    inside = of_recipes()[method].base_is_input  # its base is one of the models
    lines = [f"merge_method: {method}", "dtype: bfloat16", "models:"]
    lines += [f"  - {{model: {name}, parameters: {{{each}}}}}" for name in names]
    if based or method == "slerp":
        lines.append(f"base_model: {names[0] if inside else 'base'}")
    if shared:
        lines.append(f"parameters: {{{shared}}}")
    return "\n".join(lines) + "\n", [*names, *(["base"] if based and not inside else [])]


def floor(inputs: list[pathlib.Path], out: pathlib.Path) -> Run:
    out.unlink(missing_ok=True)
    buffer = np.empty(8 << 20, np.uint8)
    start, cpu = time.perf_counter(), time.process_time()
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer.data):
                pass
    left = inputs[0].stat().st_size
    with open(out, "wb", buffering=0) as file:
        while left:
            left -= file.write(buffer[: min(buffer.size, left)].data)
        os.fsync(file.fileno())
    found = Run(time.perf_counter() - start, time.process_time() - cpu)
    out.unlink()
    return found


def timed(command: list[str], checkout: pathlib.Path = ROOT) -> Run:
    """Run a command: with its peak of anonymous memory, children included one at a time."""
    start, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(time.perf_counter() - start, cpu, peak)


def anonymous(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


class Commands:
    """Merges of one checkout, each a command of its own."""

    def __init__(self, checkout: pathlib.Path):
        self.checkout = checkout
        starts = [timed([sys.executable, "-c", START], checkout) for _ in range(3)]
        self.start = Run(statistics.median(s.seconds for s in starts), statistics.median(s.cpu for s in starts))

    def merge(self) -> Run:
        shutil.rmtree("out", ignore_errors=True)
        found = timed([sys.executable, "-m", "train.cli", "merge", "recipe.yaml", "out"], self.checkout)
        return Run(found.seconds - self.start.seconds, found.cpu - self.start.cpu, found.memory)


class Warm:
    """Merges of one checkout by one process that stays: see `serve`."""

    start = Run(0, 0)

    def __init__(self, checkout: pathlib.Path):
        env = os.environ | {"PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve=true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def merge(self) -> Run:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        shutil.rmtree("out", ignore_errors=True)
        print("recipe.yaml", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the process that merges has died; its error is above")
        return Run(*json.loads(line))


def serve() -> None:
    """Merge the recipe of each line that comes in."""
    from jaxmerge.files import merge

    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        merge(line.strip(), "out")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps([seconds, cpu, anonymous(os.getpid())]), flush=True)


def name_passes(method: str, bottom: float, slow: float) -> None:
    """Print the passes of a method that cost more than so many floors, or else the longest."""
    here = pathlib.Path.cwd()
    with tempfile.TemporaryDirectory(dir=here) as place:
        shutil.copy("recipe.yaml", place)
        for name in ("base", "one", "two", "three"):
            pathlib.Path(place, name).symlink_to(here / name)
        command = [sys.executable, str(ROOT / "benchmarks" / "passes.py"), "recipe.yaml"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the passes of {method} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    many = [(what, seconds) for what, seconds in found if seconds > slow * bottom]
    for what, seconds in many or found[:1]:
        print(f"    {seconds / bottom:5.2f} × floor: {what}", flush=True)


def measure(method: str, ours: list[Any], repeats: int, peer: list[str], peer_repeats: int) -> float:
    """Merge in turns with the floor and print a line; return the seconds of the floor if ours takes many of it."""
    text, names = recipe(method)
    pathlib.Path("recipe.yaml").write_text(text)
    inputs, floors = [pathlib.Path(name, "model.safetensors") for name in names], []
    first, *_ = [side.merge() for side in ours]
    runs: list[list[Run]] = [[] for _ in ours]
    for _ in range(repeats):
        floors.append(floor(inputs, pathlib.Path("floor")))
        for side, done in zip(ours, runs, strict=True):
            done.append(side.merge())
    bottom, cheap = (statistics.median(getattr(run, part) for run in floors) for part in ("seconds", "cpu"))
    goal = settings(method)[-1]
    line = f"{method:<18}{bottom:8.2f} {first.seconds:8.2f}"
    ratio = 0.0
    for i, done in enumerate(runs):
        seconds, cpu = (statistics.median(getattr(run, part) for run in done) for part in ("seconds", "cpu"))
        memory = max(run.memory for run in done)
        ratio = ratio or seconds / bottom
        wanted = f"(≤ {goal})" if goal and not i else ""
        line += f" {seconds:8.2f} {seconds / bottom:7.2f} {wanted:<8} {cpu / cheap:7.2f} {memory / 1e6:7.0f}"
    if peer:
        theirs = []
        for _ in range(peer_repeats):
            shutil.rmtree("theirs", ignore_errors=True)
            theirs.append(timed([*peer, "recipe.yaml", "theirs", "--allow-crimes", *PEER_FLAGS], pathlib.Path()))
        shutil.rmtree("theirs", ignore_errors=True)
        other, mine = statistics.median(run.seconds for run in theirs), statistics.median(r.seconds for r in runs[0])
        memory = max(run.memory for run in theirs)
        line += f" {other:9.1f} {other / (mine + ours[0].start.seconds):7.2f} {memory / 1e6:7.0f}"
    print(line, flush=True)
    shutil.rmtree("out", ignore_errors=True)
    return bottom if ratio > 0 and (goal is None or ratio > goal) else 0.0


def main() -> None:
    given = {
        "methods": ",".join(METHODS), "layers": "22", "hidden": "2048", "vocabulary": "32000", "repeats": "3",
        "warm": "false", "before": "", "slow": "2", "peer": "", "peer_repeats": "1", "work": "",
    }  # fmt: skip
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := words.keys() - given.keys():
        raise SystemExit(f"unknown {', '.join(unknown)}; see the top of {__file__}")
    given |= words
    work = pathlib.Path(given["work"] or tempfile.mkdtemp(prefix="jaxmerge-benchmark-")).resolve()
    before = pathlib.Path(given["before"]).resolve() if given["before"] else None
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "cache")
    work.mkdir(exist_ok=True)
    os.chdir(work)
    shutil.rmtree("cache", ignore_errors=True)
    wanted = shapes(*(int(given[name]) for name in ("layers", "hidden", "vocabulary")))
    for seed, name in enumerate(["base", "one", "two", "three"]):
        make_model(pathlib.Path(name), wanted, seed)
    kind = Warm if given["warm"] == "true" else Commands
    ours = [kind(checkout) for checkout in (ROOT, before) if checkout is not None]
    count = sum(int(np.prod(shape)) for shape in wanted.values())
    print(f"{count / 1e9:.3f} B parameters in bfloat16; start of ours {ours[0].start.seconds:.1f} s")
    side = "        s × floor (goal)       cpu      MB"
    print(f"{'method':<18} floor s  first s{side}{side.replace('       s', 'before s') if before else ''}", end="")
    print("  mergekit s  × ours      MB" if given["peer"] else "")
    methods, slow = given["methods"].split(","), float(given["slow"])
    peer = [given["peer"]] if given["peer"] else []
    for method in list(of_recipes()) if methods == ["all"] else methods:
        bottom = measure(method, ours, int(given["repeats"]), peer, int(given["peer_repeats"]))
        if slow and bottom:
            name_passes(method, bottom, slow)
    if not given["work"]:
        os.chdir("/")
        shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve=true"]:
        serve()
    else:
        main()
