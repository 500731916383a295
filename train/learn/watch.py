"""What is watched while fine-tuning: held-out examples, spikes of the loss, updates skipped, a profiler trace."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ..log import UserError, say
from .settings import Step, Watch

T = TypeVar("T")
WINDOW = 32  # accepted losses whose median a spike is measured by
FEWEST = 8  # and as many there must be


def hold_out(
    sources: Sequence[Sequence[T]], count: int, *, seed: int, question: Callable[[T], Any] = lambda example: None
) -> tuple[list[list[T]], list[T]]:
    """Split the examples of one or more sources into those learnt, source by source, and `count` held out of all.

    Args:
      question: of an example, what it answers; None where it stands alone. Questions are held out whole, so that
        nothing is learnt from another answer to one, and with the last of them there may be more than `count`.

    Example:
      >>> (learnt, more), held = hold_out([["a", "b", "c"], ["d", "e"]], 2, seed=0)
      >>> len(learnt) + len(more), len(held)
      (3, 2)
    """
    total = sum(map(len, sources))
    if count >= total > 0:
        raise UserError(f"sft.watch.held_out is {count}, but there are only {total} examples; lower it")
    together: dict[Any, list[int]] = {}
    for i, example in enumerate(itertools.chain.from_iterable(sources)):
        asked = question(example)
        together.setdefault((i,) if asked is None else asked, []).append(i)
    members, drawn = list(together.values()), set[int]()
    for i in np.random.Generator(np.random.Philox(key=[seed, 0x4E1D])).permutation(len(members)).tolist():
        if len(drawn) >= count:
            break
        drawn.update(members[i])
    if count and len(drawn) == total:
        raise UserError(
            f"sft.watch.held_out is {count}, and the {total} examples are of {len(members)} questions, held out whole: "
            "none would be left; lower it"
        )
    numbered = enumerate(itertools.chain.from_iterable(sources))
    held: list[T] = []
    learnt: list[list[T]] = []
    for source in sources:
        learnt.append([])
        for i, example in itertools.islice(numbered, len(source)):
            (held if i in drawn else learnt[-1]).append(example)
    return learnt, held


def spike_limit(spike: float, log: Sequence[Mapping[str, float]]) -> float:
    """Largest mean loss an update may have: `spike` × the median of the last ones made."""
    if not spike or len(log) < FEWEST:
        return math.inf
    return spike * statistics.median(metrics["loss"] for metrics in log[-WINDOW:])


def skipped(
    in_a_row: int, *, loss: float, norm: float, limit: float, rate: float, step: int, total: int, config: Step
) -> None:
    """Say that an update was skipped, or stop the run: too many in a row, or nothing finite to end with."""
    finite = math.isfinite(loss) and math.isfinite(norm)
    spike = f", above {config.spike:g} × the median of those before ({limit:.4g})" if finite else ""
    what = f"the loss is {loss:.6g} and the gradient's norm {norm:.4g} at step {step} of {total}{spike}"
    if in_a_row < config.max_skipped and (finite or step < total):
        say(f"sft: {what} (learning rate {rate:.3g}): this update is skipped")
        return
    raise UserError(
        f"sft: {what} (learning rate {rate:.3g}), {in_a_row} skipped in a row; lower sft.learning_rate"
        + (", or raise sft.step.spike" if finite else "")
    )


def speed_of(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For the record of a run: medians of tokens_per_second and mfu, updates skipped, the last held-out loss."""
    found = {"skipped": log[-1]["skipped"]}
    for name in ("tokens_per_second", "mfu"):
        if all(name in metrics for metrics in log):
            found[name] = statistics.median(metrics[name] for metrics in log)
    held_out = [metrics["held_out_loss"] for metrics in log if "held_out_loss" in metrics]
    return found | ({"held_out_loss": held_out[-1]} if held_out else {})


@contextlib.contextmanager
def tracing(watch: Watch, folder: pathlib.Path | None) -> Iterator[Any]:
    """Yield a function to call with the number of each step before it runs.

    Steps trace_from, …, trace_from + trace_steps − 1 are recorded with jax's profiler into `folder`; TensorBoard and
    Perfetto read it.
    """
    running = False

    def before(step: int) -> None:
        nonlocal running
        if running and step == watch.trace_from + watch.trace_steps:
            jax.profiler.stop_trace()
            running = False
        elif folder is not None and watch.trace_from and step == watch.trace_from:
            jax.profiler.start_trace(folder)
            running = True

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()
