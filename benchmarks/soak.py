r"""Merges and runs killed at random moments and gone on with, over and over: python benchmarks/soak.py [key=value …]

  minutes=10   no cycle begins later; what is compared with is made before
  seed=0       of the moments
  kills=2      at most, in a cycle, before it is let go on to its end
  size=2000    rows and columns of each of a model's eight matrices, float32

A cycle of `merge` merges two models and their base by a recipe (linear and dare_ties in turns) in a process that is
killed (SIGKILL) at a random moment of the time that an undisturbed one takes, and ends the merge in this process. A
cycle of `improve` is a run of configs/tiny.yaml, killed and begun again in processes of its own. A cycle of the other
verbs is one of sft, search, sample, evaluate, export and extract-lora, in turns, killed and given again
in the same way. After each, the result is held to the undisturbed one: a merge byte by byte, a run by its metrics, in
which the digests of all weights are, other results by their files apart from what a clock says, and all by the names of
their files. Files that are left over (beside the result, in the run, in the folder of temporary files),
open files and the memory of this process, which does all merges, must not grow. The exit code is 1 if any of that
fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPTIONS = {"minutes": 10.0, "seed": 0, "kills": 2, "size": 2000}
RECIPE = """merge_method: {method}
base_model: base
models: [{{model: one}}, {{model: two}}]
parameters: {{weight: 0.4{more}}}
seed: 7
"""
METHODS = {"linear": "", "dare_ties": ", density: 0.5"}
CLOCKS = ("mfu", "command", "resumed")  # and whatever ends with seconds or _per_second
WARM = 15  # merges, after which this process has compiled and allocated what it needs
GROWN = 1.15  # times the memory: the median of the later half of the merges after these to that of the earlier half


@dataclasses.dataclass
class Tally:
    """What happened to the cycles of a kind. begun: kills that left work to go on with."""

    cycles: int = 0
    kills: int = 0
    begun: int = 0
    different: int = 0
    left: set[str] = dataclasses.field(default_factory=set)


def command(place: pathlib.Path, *words: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start `jaxmerge`, its temporary files in a folder of their own."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp"),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
    }  # fmt: skip
    program = [sys.executable, "-m", "train.cli", *words]
    return subprocess.Popen(program, env=environment, cwd=place, stdout=subprocess.DEVNULL, stderr=stderr)


def whole(place: pathlib.Path, *words: str) -> float:
    """Run `jaxmerge` to its end; seconds."""
    begin = time.perf_counter()
    process = command(place, *words, stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"jaxmerge {' '.join(words)} ended with {process.returncode}\n{told.decode()[-2000:]}")
    return time.perf_counter() - begin


def killed(place: pathlib.Path, share: float, seconds: dict[str, float], *words: str) -> bool:
    """Start `jaxmerge` and kill it after a share of the seconds its command takes; whether it was still at it.

    If it was not, and had it all to do, it takes less now than when it was measured, for other work on the machine has
    ended.
    """
    fresh = not any(place.glob(".out.*")) and not any((place / name).exists() for name in ("out", "run"))
    begin = time.perf_counter()
    process = command(place, *words)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(share * seconds[words[1]])
    process.send_signal(signal.SIGKILL)
    if process.wait(60) == -signal.SIGKILL:
        return True
    if fresh:
        seconds[words[1]] = time.perf_counter() - begin
    return False


# --- merges ---


def make_models(place: pathlib.Path, size: int) -> None:
    import numpy as np

    from jaxmerge.files.checkpoints.safetensors import write_file

    for seed, name in enumerate(("base", "one", "two")):
        rng = np.random.default_rng(seed)
        (place / name).mkdir()
        arrays = {f"model.layers.{i}.w.weight": rng.standard_normal((size, size)).astype(np.float32) for i in range(8)}
        write_file(place / name / "model.safetensors", arrays)
        (place / name / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 8}')


def digest_of(folder: pathlib.Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


def merge_cycles(place: pathlib.Path, rng: random.Random, kills: int, tally: Tally) -> Iterator[None]:
    """The first step makes what is compared with; each after it is one merge, killed, gone on with here, compared."""
    from jaxmerge.files import merge
    from jaxmerge.files.journal import count_done

    wanted, seconds = {}, {}
    for method, more in METHODS.items():
        (place / f"{method}.yaml").write_text(RECIPE.format(method=method, more=more))
        seconds[f"{method}.yaml"] = whole(place, "merge", f"{method}.yaml", f"whole-{method}")
        wanted[method] = digest_of(place / f"whole-{method}")
    os.chdir(place)  # where the recipe's names of models are meant, in this process too
    before = {path.name for path in place.iterdir()}
    yield
    for method in itertools.cycle(METHODS):
        for _ in range(rng.randint(1, kills)):
            if killed(place, rng.uniform(0.5, 1), seconds, "merge", f"{method}.yaml", "out"):
                tally.kills += 1
                tally.begun += count_done(place / "out") > 0
        merge(place / f"{method}.yaml", place / "out")
        tally.different += digest_of(place / "out") != wanted[method]
        tally.left |= {path.name for path in place.iterdir()} - before - {"out"} | set(os.listdir(place / "tmp"))
        shutil.rmtree(place / "out")
        tally.cycles += 1
        yield


# --- runs ---


WORK = ("tokens", "replies", "replayed", "prompt_tokens", "prompt_tokens_computed", "slot_steps", "occupancy")
"""What a search tells of this process's work: replies that an earlier one kept are not asked for again."""


def is_of_clock(key: str) -> bool:
    return key in CLOCKS or key.endswith(("seconds", "_per_second"))


def timeless(value: Any) -> Any:
    """Metrics without what a clock says."""
    if isinstance(value, dict):
        work = WORK if value.get("kind") == "search" else ()
        return {key: timeless(item) for key, item in value.items() if not is_of_clock(key) and key not in work}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def metrics_of(run: pathlib.Path) -> list[Any]:
    return [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files_of(run: pathlib.Path) -> set[str]:
    """Names of a run's files, but for those in the folders `d` of checkpoints, which Orbax draws anew each time."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.parent.name != "d"}


def run_cycles(place: pathlib.Path, rng: random.Random, kills: int, tally: Tally) -> Iterator[None]:
    """The first step makes what is compared with; each after it is one run, killed, gone on with, compared."""
    words = ("improve", str(ROOT / "configs/tiny.yaml"))
    whole(place, *words, "out=compile")  # so that what is timed finds its programs compiled
    seconds = {words[1]: whole(place, *words, "out=whole")}
    wanted, names = metrics_of(place / "whole"), files_of(place / "whole")
    yield
    while True:
        for _ in range(rng.randint(1, kills)):
            if killed(place, rng.uniform(0.2, 1), seconds, *words, "out=run"):
                tally.kills += 1
                tally.begun += any((place / "run").glob("phases/*/*"))
        whole(place, *words, "out=run")
        tally.different += metrics_of(place / "run") != wanted
        tally.left |= files_of(place / "run") ^ names | set(os.listdir(place / "tmp"))
        shutil.rmtree(place / "run")
        tally.cycles += 1
        yield


# --- the other verbs ---

SEARCH = """model: {path: model}
questions:
  domain: mathematics
  families: [{family: chain_sum, domain: id, args: {min_terms: 2, max_terms: 2}, train: 6}]
search: {kind: tot, children: 2, depth: 2, beam: 2}
sampling: {step: 8, hint: 8, score: 4, write: 8, slots: 8}
"""
TUNE = """model: {path: model}
data: {path: lines.jsonl}
sft: {epochs: 6, batch: 4, learning_rate: 1.0e-3, checkpoint_every: 2}
"""
VERBS = {
    "sft": ("sft", "tune.yaml", "out=OUT"),
    "search": ("search", "search.yaml", "out=OUT"),
    "sample": ("sample", "model", "lines.jsonl", "OUT", "max_new_tokens=12"),
    "evaluate": ("evaluate", "model", str(ROOT / "configs/tiny.yaml"), "out=OUT"),
    "export": ("export", "model", "OUT", "dtype=bfloat16"),
    "extract-lora": ("extract-lora", "model", "tuned", "OUT", "rank=2"),
}
# A TFDS version is a protocol buffer of maps, whose order is another in every process.
OF_CLOCKS = (
    "metrics.jsonl", "steps.jsonl", "report.html", "config.yaml", "README.md", ".log", ".lock", "checksums.json",
    "array_record-00000-of-00001",
)  # fmt: skip


def contents_of(out: pathlib.Path) -> dict[str, str]:
    """Digest of each file of a result, but of those that tell times or the folder's name."""
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    return {
        str(path.relative_to(out)): "" if path.name.endswith(OF_CLOCKS) else digest_of_file(path)
        for path in files
        if path.parent.name != "d"
    }


def digest_of_file(path: pathlib.Path) -> str:
    data = path.read_bytes()
    if data[:1] in (b"{", b"["):  # JSON, or lines of it
        try:
            values = [json.loads(data)]
        except ValueError:
            values = [json.loads(line) for line in data.splitlines()]
        said = [json.dumps(timeless(value)) for value in values]
        data = "\n".join(sorted(said) if path.name == "replies.jsonl" else said).encode()  # as they came in
    return hashlib.sha256(data).hexdigest()


def verb_cycles(place: pathlib.Path, rng: random.Random, kills: int, tally: Tally) -> Iterator[None]:
    """The first step makes what is compared with; each after it is one command, killed, given again, compared."""
    (place / "search.yaml").write_text(SEARCH)
    (place / "tune.yaml").write_text(TUNE)
    lines = [{"prompt": f"{n} + {n + 1} =", "completion": f" {2 * n + 1}"} for n in range(24)]
    (place / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ("improve", str(ROOT / "configs/tiny.yaml"), "rounds=1", "out=run")
    whole(place, *run)
    for name, method in (("model", "plain"), ("tuned", "imm")):
        whole(place, "export", "run", name, f"method={method}")
    shutil.rmtree(place / "run")
    wanted, seconds = {}, {}
    for name, words in VERBS.items():
        for _ in range(2):  # the second finds its programs compiled
            remove(place / "out")
            seconds[name] = whole(place, *(word.replace("OUT", "out") for word in words))
        wanted[name] = contents_of(place / "out")
        remove(place / "out")
    before = {path.name for path in place.iterdir()}
    yield
    for name, words in itertools.cycle(VERBS.items()):
        given = [word.replace("OUT", "out") for word in words]
        for _ in range(rng.randint(1, kills)):
            took = {given[1]: seconds[name]}
            if killed(place, rng.uniform(0.2, 1), took, *given):
                tally.kills += 1
                tally.begun += (place / "out").exists()
            seconds[name] = took[given[1]]
            if name not in ("sft", "search"):
                remove(place / "out")  # it was finished, and a finished result is not written over
        whole(place, *given)
        found = contents_of(place / "out")
        if found != wanted[name]:
            tally.different += 1
            print(f"{name}: {sorted(found.items() ^ wanted[name].items())[:6]}", file=sys.stderr)
        remove(place / "out")
        tally.left |= {path.name for path in place.iterdir()} - before | set(os.listdir(place / "tmp"))
        tally.cycles += 1
        yield


def remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- all ---


def held() -> tuple[int, int]:
    """Open files and bytes of memory of this process, what the allocator keeps for later given back first."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, other C libraries do not
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


def soak(place: pathlib.Path, minutes: float, seed: int, kills: int, size: int) -> int:
    """Alternate so that every kind gets the same time; print a table."""
    makers: dict[str, Callable[..., Iterator[None]]] = {
        "merge": merge_cycles, "improve": run_cycles, "other verbs": verb_cycles,
    }  # fmt: skip
    tallies = {kind: Tally() for kind in makers}
    spent = dict.fromkeys(makers, 0.0)
    cycles = {}
    for kind, make in makers.items():
        (place / kind / "tmp").mkdir(parents=True)
        if kind == "merge":
            make_models(place / kind, size)
        cycles[kind] = make(place / kind, random.Random(f"{seed} {kind}"), kills, tallies[kind])
        next(cycles[kind])
    end = time.monotonic() + 60 * minutes
    seen: list[tuple[int, int]] = []
    while time.monotonic() < end:
        kind = min(makers, key=lambda name: spent[name])
        begin = time.monotonic()
        next(cycles[kind])
        spent[kind] += time.monotonic() - begin
        if kind == "merge":
            seen.append(held())
    print("| | cycles | kills | kills that left work | other results | files left over |\n|---|---|---|---|---|---|")
    for kind, tally in tallies.items():
        print(f"| {kind} | {tally.cycles} | {tally.kills} | {tally.begun} | {tally.different} | {len(tally.left)} |")
        for name in sorted(tally.left)[:20]:
            print(f"left over by {kind}: {name}", file=sys.stderr)
    seen = seen[WARM:] if len(seen) > WARM + 1 else seen
    halves = seen[: len(seen) // 2] or seen, seen[len(seen) // 2 :]
    files = [max(count for count, _ in half) for half in halves]
    memory = [statistics.median(size for _, size in half) for half in halves]
    print(f"\nopen files {files[0]} → {files[1]}, memory {memory[0] / 1e6:.0f} MB → {memory[1] / 1e6:.0f} MB")
    grown = files[1] > files[0] or memory[1] > GROWN * memory[0]
    return int(grown or any(tally.different or tally.left for tally in tallies.values()))


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if unknown := [word for word in words if word.split("=")[0] not in OPTIONS or "=" not in word]:
        print(f"unknown: {', '.join(unknown)}; give {', '.join(f'{name}=' for name in OPTIONS)}")
        return 2
    options = {name: type(default)(given.get(name, default)) for name, default in OPTIONS.items()}
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        return soak(pathlib.Path(place), **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
