"""The verbs that work on checkpoints on disk: merge, inspect, extract-lora. They need the library alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..log import UserError, format_percent, say
from ..runtime.start import start_jax
from .words import Words, take


def merge(words: Words, assignments: Words, dry: bool) -> int:
    """merge RECIPE OUT [key=value …] [--dry-run]

    Merge checkpoints on disk by a recipe in mergekit's YAML grammar, in memory bounded by the largest tensor.
    Killed, the same command goes on where it was. --dry-run checks everything, prints sizes and memory and stops.
    Keys:
      seed=N                  in place of the recipe's
      compat=mergekit         as mergekit does it, where we differ (docs/merge.md)
      allow=missing,unused,shapes   tensors some models lack; that the base lacks; of unlike shapes: refused otherwise
      format=safetensors      or orbax
      device=null             cpu, gpu or tpu: where the arithmetic runs; null: jax's own choice
      max_shard_bytes=5000000000
    """
    mine, others = take(
        assignments, seed=None, compat=None, allow=(), format="safetensors", device=None, max_shard_bytes=5_000_000_000
    )
    if others:
        raise UserError(f"{others[0]!r}: merge knows {', '.join(f'{key}=' for key in mine)}; the rest is in the recipe")
    if isinstance(mine["allow"], str):
        mine["allow"] = mine["allow"].split(",")
    start_jax()
    from jaxmerge.files import merge as merge_files

    with own_errors(), progress_in_bytes("merge") as advance:
        plan = merge_files(words[0], words[1], progress=advance, dry_run=dry, **mine)
    for note in plan["notes"]:
        say(f"note: {note}")
    say(
        f"{plan['merge_method']}: {plan['tensors']} tensors, {plan['bytes_in'] / 1e9:.2f} GB in, "
        f"{plan['bytes_out'] / 1e9:.2f} GB out in {len(plan['files'])} file{'s' * (len(plan['files']) != 1)}"
    )
    if dry:
        say(f"buffers and the largest result take {plan['bytes_memory'] / 1e9:.2f} GB of memory")
    say(words[1])
    return 0


def inspect(words: Words, assignments: Words, dry: bool) -> int:
    """inspect BASE MODELS [picture=FILE.svg] [json=FILE]

    What changed from BASE to other checkpoints, per layer: size of the change, cosine, share of elements changed.
    MODELS is one, or several with commas between: then also how well their changes agree (cosines, conflicts of sign).
    picture= draws layers × kinds of matrix; json= writes the measures of every tensor.
    """
    del dry
    mine, others = take(assignments, picture=None, json=None)
    if others:
        raise UserError(f"{others[0]!r}: inspect knows picture= and json=")
    from jaxmerge.files.checkpoints.open import open_source
    from jaxmerge.files.inspect.compare import compare
    from jaxmerge.files.inspect.picture import svg
    from jaxmerge.files.inspect.table import table

    from ..runtime.disk import write_durably

    with own_errors(), progress_in_bytes("inspect") as advance:
        sources = [open_source(name) for name in (words[0], *words[1].split(","))]
        found = compare(*sources, progress=advance)
    say(table(found))
    for key, text in (("picture", lambda: svg(found)), ("json", lambda: json.dumps(found, indent=1))):
        if mine[key]:
            write_durably(Path(str(mine[key])), text())
            say(str(mine[key]))
    return 0


def extract_lora(words: Words, assignments: Words, dry: bool) -> int:
    """extract-lora BASE TUNED OUT rank=N [key=value …]

    Write the change from BASE to TUNED as a PEFT LoRA adapter: of each matrix the best approximation of that rank.
    Keys: alpha=N (the rank), targets=[pattern, …] (the layers' matrices), save=[pattern, …] (of what else changed, to
    be kept whole; all of it), dtype=float32
    """
    del dry
    mine, others = take(assignments, rank=None, alpha=None, targets=None, save="**", dtype="float32")
    if others or mine["rank"] is None:
        raise UserError(f"{others[0] if others else 'no rank='}: wanted rank=N, and of alpha=, targets=, save=, dtype=")
    from jaxmerge.files.checkpoints.open import open_source
    from jaxmerge.files.inspect.lowrank import extract_lora as extract

    from ..log import progress

    start_jax()
    with own_errors(), contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def advance(done: int, total: int, tensor: str) -> None:
            if not bars:
                bars.append(stack.enter_context(progress("extract", total=total, unit="tensors")))
            bars[0].advance(done - bars[0].done, note=tensor)

        base, tuned = open_source(words[0]), open_source(words[1])
        report = extract(base, tuned, words[2], progress=advance, **mine)
    say(f"rank {report['rank']}: {format_percent(report['explained'])} of the change (squared norm) in the matrices")
    for name, size in report["left_out"].items():
        say(f"left out: {name}, changed by {format_percent(size)}")
    say(words[2])
    return 0


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """The library's errors of recipes and files are the user's to mend: say them on one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(error.args[0] if isinstance(error, KeyError) else error)) from error


@contextlib.contextmanager
def progress_in_bytes(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callback of bytes done, bytes in all, and a name: a bar with GB/s and the time left."""
    from ..log import progress

    with contextlib.ExitStack() as stack:
        bars: list[Any] = []
        shown = 0

        def advance(done: int, total: int, note: str) -> None:
            nonlocal shown
            if not bars or done < shown:
                stack.close()
                bars[:] = [stack.enter_context(progress(title, total=total, unit="GB", scale=10**9))]
                shown = 0
            bars[0].advance(done - shown, note=note)
            shown = done

        yield advance
