"""The verbs that work on checkpoints on disk: merge, inspect, extract-lora. They need the library alone."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..log import UserError, format_percent, say
from ..runtime.disk import check_file, check_folder, write_durably
from ..runtime.start import start_jax
from .settings import ExtractOptions, InspectOptions, MergeOptions, PushOptions, VerifyOptions
from .words import Words, options


def merge(words: Words, assignments: Words, dry: bool) -> int:
    """Merge checkpoints on disk by a recipe, which may be a YAML file of mergekit's or mergekit-moe's.

    The merge holds a few tensors in memory at a time, whatever the size of the models. If it is killed, the same
    command continues it. With --dry-run it checks everything, prints sizes and the memory that it needs, and stops.
    With conflict=true as well, it reads all weights and prints how well the changes of the models agree.
    """
    settings = dataclasses.asdict(options(assignments, MergeOptions))
    where, private, conflict = (settings.pop(key) for key in ("push", "private", "conflict"))
    if conflict and not dry:
        raise UserError(
            f"merge.conflict is of a dry run; add --dry-run, or read `conflict` in {words[1]}/merge.json later"
        )
    kind, pre = settings.pop("type"), settings.pop("pre")
    settings["allow"] = [word for words_allowed in settings["allow"] for word in words_allowed.split(",")]
    from jaxmerge.files.disk import check_name
    from jaxmerge.files.journal import count_done

    out = Path(words[1])
    with own_errors():
        check_name(out)
    check_push(where)
    start_jax()
    from jaxmerge.files import merge as merge_files

    if settings["format"] == "gguf" and has_decoder():
        from ..models.gguf_form import gguf_form

        settings["format"] = gguf_form(out, kind or "q8_0", pre)
    if not dry and (done := count_done(out)):
        say(f"{done} tensors of an unfinished merge into {out} are there")
    with own_errors(), progress_in_bytes("merge") as advance:
        plan = merge_files(words[0], words[1], progress=advance, dry_run=dry, states=find_states(), **settings)
    for note in plan["notes"]:
        say(f"note: {note}")
    say(
        f"{plan['merge_method']}: {plan['tensors']} tensors, {plan['bytes_in'] / 1e9:.2f} GB in, "
        f"{plan['bytes_out'] / 1e9:.2f} GB out in {len(plan['files'])} file{'s' * (len(plan['files']) != 1)}"
    )
    if dry:
        say(f"buffers and the largest result take {plan['bytes_memory'] / 1e9:.2f} GB of memory")
        if conflict:
            show_conflict(words[0], settings["compat"])
    say(words[1])
    if not dry:
        push_folder(out, where, private=private)
    return 0


def has_begun(words: Words) -> bool:
    """Whether the merge of these words, which was stopped, left something that the same command goes on from."""
    try:
        from jaxmerge.files import journal
    except ModuleNotFoundError:  # stopped before the extra was found missing
        return False
    return journal.has_begun(Path(words[1]))


def show_conflict(recipe: str, compat: str | None) -> None:
    """Read all weights of a recipe and print how well the changes of its models agree, by layer."""
    from jaxmerge.files.inspect.conflict import conflict
    from jaxmerge.files.inspect.table import table

    with own_errors(), progress_in_bytes("conflict") as advance:
        found = conflict(recipe, compat=compat, progress=advance)
    say(f"{table(found)}\n{found['bytes'] / 1e9:.2f} GB read in {found['seconds']:.1f} s")


def push(words: Words, assignments: Words, dry: bool) -> int:
    """Put a folder that `merge` or `export` wrote on the Hugging Face hub, in one commit with its card.

    The token is read from HF_TOKEN, or it is that of `hf auth login`. If an attempt fails, the next one does not send
    again what has arrived.
    """
    del dry
    push_folder(Path(words[0]), words[1], private=options(assignments, PushOptions).private)
    return 0


def check_push(name: str | None) -> None:
    """Raise unless there is nothing to push, or a name and a token for it; asked before the work it is for."""
    if name is not None:
        from jaxmerge.files import publish

        with own_errors():
            publish.check(name)


def push_folder(folder: Path, name: str | None, *, private: bool) -> None:
    """Put a folder on the hub under `name`, if there is one, and say where it is."""
    if name is None:
        return
    from jaxmerge.files import publish

    try:
        say(publish.push(folder, name, private=private))
    except ValueError as error:
        print(file=sys.stderr)  # the client's bar leaves its line open
        again = f"jaxmerge push {folder} {name}{' private=true' if private else ''}"
        raise UserError(
            f"{error}. The folder is whole; to try again: {again}" if folder.is_dir() else str(error)
        ) from error


def inspect(words: Words, assignments: Words, dry: bool) -> int:
    """Show what is in a checkpoint, or what changed between checkpoints, per layer.

    With one MODEL, its parameters, dtypes and bytes are listed, as the headers of its files give them.

    With BASE and MODELS, the table shows for each model the size of its change from BASE, cosines, and the share of
    elements that changed. MODELS is one name, or several with commas between them. For several, the table also shows
    how well their changes agree. With spectrum=16 it also shows how many directions a change has, and how many of the
    leading 16 two changes share.
    """
    del dry
    settings = options(assignments, InspectOptions)
    for path in (settings.picture, settings.json):
        check_file(path)
    if len(words) == 1:
        return _show_contents(words[0], settings)
    from jaxmerge.files.checkpoints.open import open_source
    from jaxmerge.files.inspect.compare import compare
    from jaxmerge.files.inspect.picture import svg
    from jaxmerge.files.inspect.table import table

    with own_errors(), progress_in_bytes("inspect") as advance:
        sources = [open_source(name) for name in (words[0], *words[1].split(","))]
        found = compare(*sources, progress=advance)
    say(table(found))
    if settings.spectrum:
        from jaxmerge.files.inspect.spectrum import spectra, spectrum_table

        with own_errors(), progress_in_bytes("spectrum") as advance:
            found["spectrum"] = spectra(*sources, rank=settings.spectrum, progress=advance)
        say("\n" + spectrum_table(found["spectrum"]))
    write_report(settings.picture, lambda: svg(found))
    write_report(settings.json, lambda: json.dumps(found, indent=1))
    return 0


def _show_contents(name: str, settings: InspectOptions) -> int:
    for key in ("picture", "spectrum"):
        if getattr(settings, key):
            raise UserError(f"{key}= shows what changed between two checkpoints; give BASE and MODELS")
    from jaxmerge.files.checkpoints.open import open_source
    from jaxmerge.files.inspect.contents import contents, describe

    with own_errors():
        found = describe(open_source(name))
    say(contents(found))
    write_report(settings.json, lambda: json.dumps(found, indent=1))
    return 0


def verify(words: Words, assignments: Words, dry: bool) -> int:
    """Say, tensor by tensor, whether a folder is what its recipe makes of its inputs.

    OUT may also be the folder of a run of improve, one of its checkpoints, or a model that `export RUN OUT method=…`
    wrote: it is compared with what the run's merge makes of the checkpoints of that round.
    Of large tensors a sample of elements is replayed where the method works element by element.
    Exits with 0 where all is right, 1 where something is not, 2 where it cannot be told, 3 where OUT cannot be read.
    """
    del dry
    settings = options(assignments, VerifyOptions)
    check_file(settings.json)
    start_jax()
    from jaxmerge.files.verdict import UNREADABLE, UNSURE, Unsure, as_json, table
    from jaxmerge.files.verify import verify as verify_merge

    from ..improve.origin import origin_of

    try:
        origin = origin_of(words[0], settings.of)
        with progress_in_tensors("verify") as advance:
            if origin is None:
                report = verify_merge(
                    words[0], of=settings.of, everything=settings.all, progress=advance,
                    states=find_states(),
                )  # fmt: skip
            else:
                from ..improve.verify import verify as verify_run

                report = verify_run(words[0], origin, everything=settings.all, progress=advance)
    except Unsure as error:
        say(f"jaxmerge verify: cannot tell: {error}")
        return UNSURE
    except (ValueError, UserError) as error:
        say(f"jaxmerge verify: {error}")
        return UNREADABLE
    for part in report.get("models", [report]):
        say(table(part))
    for name, reason in report.get("unsure", {}).items():
        say(f"{name}: cannot tell: {reason}")
    write_report(settings.json, lambda: as_json(report))
    return report["code"]


def extract_lora(words: Words, assignments: Words, dry: bool) -> int:
    """Write the change between two checkpoints as a LoRA adapter.

    The adapter is a folder in PEFT's format; for each matrix it holds the best approximation of the given rank, or of
    the smallest rank that a threshold allows (explained=, ratio=).
    """
    del dry
    settings = options(assignments, ExtractOptions)
    check_folder(Path(words[2]))
    from jaxmerge.files.checkpoints.open import open_source
    from jaxmerge.files.inspect.lowrank import extract_lora as extract

    start_jax()
    with own_errors(), progress_in_tensors("extract") as advance:
        base, tuned = open_source(words[0]), open_source(words[1])
        report = extract(base, tuned, words[2], progress=advance, **dataclasses.asdict(settings))
    which = "rank" if settings.explained is None and settings.ratio is None else "largest rank"
    say(f"{which} {report['rank']}: {format_percent(report['explained'])} of the change (squared norm) in the matrices")
    for name, size in report["left_out"].items():
        say(f"left out: {name}, changed by {format_percent(size)}")
    say(words[2])
    return 0


def has_decoder() -> bool:
    """Whether the extra that has the decoder is installed."""
    return importlib.util.find_spec("flax") is not None


def find_states() -> Callable[..., Any] | None:
    """What runs a model for the gates of a mixture of experts; None where the extra that has the decoder is missing."""
    if not has_decoder():
        return None

    def states(*words: Any) -> Any:
        from ..models.states import read_states

        return read_states(*words)

    return states


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """The library's errors of recipes and files are the user's to mend: say them on one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(error.args[0] if isinstance(error, KeyError) else error)) from error


def write_report(path: str | None, text: Callable[[], str]) -> None:
    """Write what was found to a file, if one is wanted, and say where it is."""
    if path:
        write_durably(Path(path), text())
        say(path)


@contextlib.contextmanager
def progress_in_tensors(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callback of tensors done, tensors in all, and a tensor's name: a bar, drawn at the first call."""
    from ..log import progress

    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def advance(done: int, total: int, tensor: str) -> None:
            if not bars:
                bars.append(stack.enter_context(progress(title, total=total, unit="tensors")))
            bars[0].advance(done - bars[0].done, note=tensor)

        yield advance


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
