r"""What merging beside the trainer costs a step of fine-tuning: python benchmarks/beside.py [key=value …]

  model=miniature           miniature: configs/miniature, 0.8 M parameters; 11m: a random Llama of 11.4 M
  batch=32 length=96        rows of a step and tokens a row, every token learnt
  every=10                  updates between snapshots
  turns=5                   medians of; a turn without snapshots, then a turn with them, and again
  steps=20                  of a turn
  clock=process             process: seconds of the CPUs, which other programs on the machine do not lengthen; wall

Two figures: the step with snapshots over the step without, from whole turns; and what one snapshot takes over `every`
steps, which is steadier, because it is no difference of two large numbers. The second has to be at most 2 %.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks.sft import SMALL, batch_of
from train.learn.beside import Stream
from train.learn.decay import Beside, Linear
from train.learn.settings import Sft
from train.learn.step import compute_of, init_state, make_step
from train.models.decoder import init
from train.models.open import load_model
from train.runtime.mesh import batch_sharding, make_mesh
from train.runtime.settings import Mesh

GOAL = 0.02
MOST = 4096  # snapshots of the run that is played
CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


class Run:
    """A run of fine-tuning, with snapshots or without."""

    def __init__(self, model: str, batch: int, length: int, every: int):
        if model not in ("miniature", "11m"):
            raise SystemExit(f"model={model}: known are miniature, 11m")
        found = load_model("configs/miniature") if model == "miniature" else None
        config, params = (SMALL, init(SMALL, jax.random.key(0))) if found is None else (found.config, found.params)
        beside = Beside(every=every, decay=Linear()) if every else Beside()
        mesh, sft = make_mesh(Mesh()), Sft(batch=batch, beside=beside)
        self.size = sum(x.size for x in jax.tree.leaves(params))
        self.state = init_state(sft, params, mesh)
        self.stream = Stream(beside, MOST * every) if every else None
        self.function = make_step(config, sft, compute_of(sft, config, params, mesh, "float32"))
        self.batch = jax.device_put(batch_of(config, batch, length), batch_sharding(mesh, batch))
        self.number = 0

    def step(self) -> None:
        self.number += 1
        self.state, sums = self.function(self.state, self.batch, np.float32(1e-5))
        jax.device_get(sums)
        if self.stream is not None:
            self.take(self.number)

    def take(self, number: int) -> None:
        assert self.stream is not None
        assert self.state.beside is not None
        mean, _ = self.stream.taken(self.state.beside, self.state.params, number)
        self.state = self.state._replace(beside=mean)

    def finish(self) -> None:
        jax.block_until_ready(self.state)


def spelt(seconds: list[float]) -> str:
    middle, *ends = (1e3 * x for x in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle:.3f} ms ({ends[0]:.3f} to {ends[1]:.3f})"


def main(words: list[str]) -> None:
    given = {"model": "miniature", "clock": "process"}
    numbers = {"batch": 32, "length": 96, "every": 10, "turns": 5, "steps": 20}
    for word in words:
        key, _, value = word.partition("=")
        if key in given:
            given[key] = value
        elif key in numbers and value.isdecimal() and int(value):
            numbers[key] = int(value)
        else:
            raise SystemExit(f"{word}: known are {', '.join([*given, *numbers])}")
    clock = CLOCKS[given["clock"]]
    every, steps = numbers["every"], numbers["steps"]
    runs = [Run(given["model"], numbers["batch"], numbers["length"], n) for n in (0, every)]
    taking = runs[1]
    for run in runs:  # compiled before it is measured
        run.step()
    taking.take(every)
    taking.finish()
    seconds: list[list[float]] = [[], [], []]
    for _ in range(numbers["turns"]):
        for run, found in zip(runs, seconds, strict=False):
            start = clock()
            for _ in range(steps):
                run.step()
            run.finish()
            found.append((clock() - start) / steps)
        start = clock()
        for i in range(steps):
            taking.take(every * (i + 2))
        taking.finish()
        seconds[2].append((clock() - start) / steps)
    plain, with_them, one = map(statistics.median, seconds)
    share = one / (every * plain)
    about = f"{taking.size / 1e6:.1f} M parameters, {numbers['batch']} x {numbers['length']} tokens"
    print(f"{about}, a snapshot every {every} steps, {given['clock']} seconds, medians of {numbers['turns']} turns")
    print(f"a step                 {spelt(seconds[0])}")
    print(f"a step with snapshots  {spelt(seconds[1])}, {with_them / plain:.3f} of one without")
    print(f"a snapshot             {spelt(seconds[2])}")
    verdict = "reached" if share <= GOAL else "NOT reached"
    print(f"share of a step        {100 * share:.2f} %, {verdict}: at most {100 * GOAL:.0f} %")
    raise SystemExit(share > GOAL)


if __name__ == "__main__":
    main(sys.argv[1:])
