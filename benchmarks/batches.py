r"""Programs that the engine compiles for batches of all sizes: python benchmarks/batches.py [key=value …]

  sizes=1,2,3,5,8,12,17,24,31,40,48,63   requests in a batch, one batch after another, with one engine
  slots=64                               sequences decoded side by side, at most
  layers=24 width=256                    of the model, whose weights are random
  max_new_tokens=8
  begin=halves                           as the engine does it: a batch begins with as few halves of the slots as hold
                                         it; `exact`: with as many slots as requests, which it once did

Prints the programs that were compiled, the processor seconds of all threads and the growth of the largest resident
memory, by size and in all. It starts without a compile cache; run each `begin` in a process of its own.
"""

from __future__ import annotations

import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from train.generate.engine import Decoding, Engine, Request, bucket
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

OPTIONS = {
    "sizes": "1,2,3,5,8,12,17,24,31,40,48,63",
    "slots": "64",
    "layers": "24",
    "width": "256",
    "max_new_tokens": "8",
    "begin": "halves",
}
PROMPT = tuple(range(4, 16))


def batch(engine: Engine, count: int, length: int, exact: bool) -> int:
    """Sample `count` requests; the number of completions."""
    requests = [Request(i, PROMPT, np.array([0, i], np.uint32), length) for i in range(count)]
    if not exact:
        return sum(1 for _ in engine.run(requests))
    feed = iter([requests])
    return sum(map(len, engine.serve(lambda: next(feed, None), width=bucket(len(PROMPT), 16), count=count)))


def main(words: list[str]) -> None:
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    slots, layers, width, length = (int(options[name]) for name in ("slots", "layers", "width", "max_new_tokens"))
    sizes = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 512,
    }  # fmt: skip
    model = random_model(sizes, make_mesh(Mesh()), seed=0)
    engine = Engine(model.config, model.params, slots=slots, how=Decoding(greedy=False), eos=())
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )

    def now() -> tuple[int, float, float]:
        return len(compiled), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    first = now()
    for count in map(int, options["sizes"].split(",")):
        before = now()
        done = batch(engine, count, length, options["begin"] == "exact")
        programs, seconds, memory = (b - a for a, b in zip(before, now(), strict=True))
        print(f"{done:4} requests: {programs:3} programs, {seconds:6.1f} s, {memory:+7.0f} MB", flush=True)
    programs, seconds, memory = (b - a for a, b in zip(first, now(), strict=True))
    print(f"in all ({options['begin']}): {programs} programs, {seconds:.1f} s, {memory:+.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
