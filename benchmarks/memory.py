"""Speed and memory of the rules in memory: one matrix, three models and their base, against a copy.

    python benchmarks/memory.py [rows=2816] [columns=4096] [dtype=bfloat16] [rules=all] [repeats=5] [devices=1]
                                [donate=false]

For each rule, jitted and with its coefficients as arguments: nanoseconds a parameter, the ratio to `average`
(linear) of three, the share of the bandwidth of a copy (inputs read plus output written, over the time), the
temporaries that XLA allocates in units of one stored input, and the compile time. Everything runs in one process
and every rule is timed in turn, so that a busy machine slows all alike; the figures are medians over the turns.
With donate=true a rule is not jitted but called with `donate=True`, and its result is its first model the next time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxmerge

OPTIONS = {
    "rows": "2816", "columns": "4096", "dtype": "bfloat16", "rules": "all", "repeats": "5", "devices": "1",
    "donate": "false",
}  # fmt: skip
COEFFICIENTS: dict[str, dict[str, Any]] = {
    "average": {},
    "interpolate": {"t": 0.3},
    "task_arithmetic": {"scale": 0.7},
    "extrapolate": {"alpha": 0.4},
    "imm": {"alpha": 0.5},
    "slerp": {"t": 0.3},
    "dare": {"density": 0.5},
    "ties": {"density": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "sce": {"select_topk": 0.2},
    "della": {"density": 0.5},
}


class Case(NamedTuple):
    """One compiled rule: how to run it, the bytes it has to move, its temporaries, its compile time."""

    run: Callable[[], Any]
    moved: int
    temporary: int
    compiled_in: float


def inputs(shape: tuple[int, int], dtype: str) -> tuple[list[jax.Array], jax.Array]:
    """Return three models and their base: weights of scale 0.02, moved by about a tenth of that."""
    base, *moves = jax.random.normal(jax.random.key(0), (4, *shape)) * 0.02
    return [(base + 0.1 * move).astype(dtype) for move in moves], base.astype(dtype)


def prepare(name: str, models: list[Any], base: Any, **more: Any) -> Case:
    """Compile a rule for these trees; `more` is given to it, as `stacked=…` is.

    As many models are taken as the rule takes; two without a base for rules of two.
    """
    rule = jaxmerge.rule(name)
    trees = models[: rule.needs.most]
    keywords: dict[str, Any] = COEFFICIENTS[name] | more
    if rule.needs.key == "required":
        keywords |= {"key": jax.random.key(1), "names": ["a", "b", "c"][: len(trees)]}
    arguments = (trees, base) if rule.needs.base == "required" else (trees,)

    def call(trees: list[Any], base: Any = None) -> Any:
        return rule(trees, base=base, **keywords)

    start = time.perf_counter()
    compiled = jax.jit(call).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((arguments, base)))
    return Case(lambda: compiled(*arguments), moved, analysis.temp_size_in_bytes if analysis else 0, seconds)


def prepare_over(name: str, models: list[Any], base: Any) -> Case:
    """As `prepare`, the rule called with `donate=True` on what it made the time before."""
    rule = jaxmerge.rule(name)
    own, *rest = jax.tree.map(jnp.copy, models[: rule.needs.most])
    keywords: dict[str, Any] = COEFFICIENTS[name] | {"base": base if rule.needs.base == "required" else None}
    if rule.needs.key == "required":
        keywords |= {"key": jax.random.key(1), "names": ["a", "b", "c"][: 1 + len(rest)]}

    def run() -> Any:
        nonlocal own
        own = rule([own, *rest], donate=True, **keywords)
        return own

    start = time.perf_counter()
    jax.block_until_ready(run())
    read = [own, *rest, *([base] if keywords["base"] is not None else [])]
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((read, own)))
    return Case(run, moved, 0, time.perf_counter() - start)


def copies(arrays: list[jax.Array]) -> Case:
    """Copies of whole inputs into one buffer that is given back every time: no page is asked for anew."""
    word = jnp.uint16 if arrays[0].dtype.itemsize == 2 else jnp.uint32

    def copy(x: jax.Array, into: jax.Array) -> jax.Array:
        del into
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, word) ^ word(1), x.dtype)

    buffer = jnp.zeros_like(arrays[0])
    compiled = jax.jit(copy, donate_argnums=1, keep_unused=True).lower(arrays[0], buffer).compile()

    def run() -> None:
        nonlocal buffer
        for array in arrays:
            buffer = jax.block_until_ready(compiled(array, buffer))

    return Case(run, 2 * sum(array.nbytes for array in arrays), 0, 0.0)


def measure(cases: dict[str, Case], repeats: int) -> dict[str, float]:
    """Return the median seconds of each case, every turn running all of them once."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(case.run())
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := given.keys() - OPTIONS.keys():
        sys.exit(f"unknown {', '.join(unknown)}; options with their defaults: {OPTIONS}")
    options = OPTIONS | given
    names = list(COEFFICIENTS) if options["rules"] == "all" else ["average", *options["rules"].split(",")]
    jax.config.update("jax_num_cpu_devices", int(options["devices"]))
    models, base = inputs((int(options["rows"]), int(options["columns"])), options["dtype"])
    if base.size % int(options["devices"]) == 0 and int(options["devices"]) > 1:
        mesh = jax.make_mesh((int(options["devices"]),), ("x",))
        place = jax.NamedSharding(mesh, jax.P("x"))
        *models, base = jax.device_put([*models, base], place)
    trees = [{"w": model} for model in models]
    made = prepare_over if options["donate"] == "true" else prepare
    cases = {name: made(name, trees, {"w": base}) for name in dict.fromkeys(names)}
    cases["copy"] = copies([*models, base])
    seconds = measure(cases, int(options["repeats"]))
    bandwidth = cases["copy"].moved / seconds["copy"]
    print(f"{base.dtype} {base.shape}, {base.size / 1e6:.1f} M parameters, one copy moves {bandwidth / 1e9:.1f} GB/s")
    print(f"{'rule':<16} {'ns/param':>9} {'× linear':>9} {'of copy':>8} {'temporaries':>12} {'compile':>8}")
    for name, case in cases.items():
        share = case.moved / seconds[name] / bandwidth
        print(
            f"{name:<16} {seconds[name] / base.size * 1e9:9.2f} {seconds[name] / seconds['average']:9.1f} "
            f"{share:8.1%} {case.temporary / base.nbytes:10.2f} × {case.compiled_in:6.1f} s"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
