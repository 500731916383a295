r"""A mixture of experts against a dense MLP of the same active operations: python benchmarks/experts.py [key=value …]

  tokens=2048      R
  sizes=576x768    D x F of one expert
  experts=8        E
  per_token=2      k; the dense MLP has k·F columns
  dtypes=float32,bfloat16
  repeats=7        in turns, after one that compiles; medians are printed
  clock=wall       cpu: processor time of all threads, where other processes run beside it
  ragged=false     also through `jax.lax.ragged_dot`, which has no kernel on CPUs: slow

Seconds of the whole layer, router included, forward and with all gradients, and how many times the dense MLP's that
is. The routing is that of a random router, so experts have unequal numbers of tokens.
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEFAULTS = {
    "tokens": "2048", "sizes": "576x768", "experts": "8", "per_token": "2", "dtypes": "float32,bfloat16",
    "repeats": "7", "clock": "wall", "ragged": "false",
}  # fmt: skip


def layers(tokens: int, wide: int, inner: int, experts: int, k: int, dtype: str, *, ragged: bool):
    """Name → (function of its arguments that returns a sum and what is differentiated, arguments)."""
    import jax
    import jax.numpy as jnp

    from train.models import experts as moe
    from train.models.matmul import matmul_t

    keys = iter(jax.random.split(jax.random.key(0), 9))
    x = jax.random.normal(next(keys), (1, tokens, wide))

    def weight(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-1] ** -0.5

    def dense(x, gate, up, down):
        return matmul_t(jax.nn.silu(matmul_t(x, gate, dtype)) * matmul_t(x, up, dtype), down, dtype)

    def mixture(x, router, *stacks):
        chosen, shares = moe.route(moe.narrow(x, router), k, normalize=True)
        return moe.mix(jax.nn.silu, jnp.dtype(dtype), x, chosen, shares, *stacks)

    def by_ragged_dot(x, router, *stacks):
        chosen, shares = moe.route(moe.narrow(x, router), k, normalize=True)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(experts), axis=0, dtype=jnp.int32)
        rows = x[0][order // k].astype(dtype)
        made = moe.ragged_forward(jax.nn.silu, rows, *(w.astype(dtype) for w in stacks), sizes)[0]
        return jnp.sum(made[jnp.argsort(order)].reshape(tokens, k, wide) * shares[0][..., None], axis=1)[None]

    columns = k * inner
    ours = (x, weight(experts, wide), weight(experts, inner, wide), weight(experts, inner, wide))
    ours = (*ours, weight(experts, wide, inner))
    found = {
        "dense": (dense, (x, weight(columns, wide), weight(columns, wide), weight(wide, columns))),
        "experts": (mixture, ours),
    }
    return found | ({"ragged_dot": (by_ragged_dot, ours)} if ragged else {})


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(calls, repeats: int, clock) -> dict[str, float]:
    """Median seconds of each call, in turns."""
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(all) for name, all in seconds.items()}


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words)
    if unknown := given.keys() - DEFAULTS.keys():
        print(f"experts: {', '.join(sorted(unknown))} not known; known: {', '.join(DEFAULTS)}", file=sys.stderr)
        return 2
    keys = DEFAULTS | given
    tokens, count, k, repeats = (int(keys[name]) for name in ("tokens", "experts", "per_token", "repeats"))
    wide, inner = map(int, keys["sizes"].split("x"))
    import jax
    import jax.numpy as jnp

    print(
        f"R={tokens} D={wide} F={inner} E={count} k={k}, {jax.devices()[0].device_kind}, "
        f"load {os.getloadavg()[0]:.1f}, {keys['clock']} clock"
    )
    for dtype in keys["dtypes"].split(","):
        parts = layers(tokens, wide, inner, count, k, dtype, ragged=keys["ragged"] == "true")
        forward, both = {}, {}
        for name, (layer, arguments) in parts.items():
            run = jax.jit(layer)
            pull = jax.jit(
                jax.grad(lambda *a, layer=layer: jnp.sum(layer(*a) ** 2), argnums=tuple(range(len(arguments))))
            )
            forward[name], both[name] = functools.partial(run, *arguments), functools.partial(pull, *arguments)
        for what, calls in (("forward", forward), ("forward and backward", both)):
            seconds = timed(calls, repeats, CLOCKS[keys["clock"]])
            told = ", ".join(f"{name} {1e3 * s:.1f} ms ({s / seconds['dense']:.2f} ×)" for name, s in seconds.items())
            print(f"{dtype:9} {what:21} {told}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
