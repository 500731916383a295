"""What the verbs do: read the words, call one function of the stack, say where the result is.

Each verb's docstring is its help: the first line names its arguments in capitals.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .log import UserError, say
from .resolve import build, load, override

T = TypeVar("T")
Words = Sequence[str]


def take(assignments: Words, **defaults: Any) -> tuple[dict[str, Any], list[str]]:
    """Split off the assignments to the keys of `defaults`; (their values, the other assignments)."""
    mine = [a for a in assignments if a.partition("=")[0] in defaults]
    return defaults | override({}, mine), [a for a in assignments if a not in mine]


def options(assignments: Words, cls: type[T]) -> T:
    return build(cls, override({}, assignments))


def improve(words: Words, assignments: Words, dry: bool) -> int:
    """improve CONFIG [key=value …] [--dry-run]

    Run a self-improvement run, or resume the unfinished one in its folder.
    Keys are those of the config (rounds=3 merge.alpha=0.6 methods.imm.merge.drop=0.2); out=DIR places the folder.
    --dry-run resolves the config, prints the plan (phases, sizes, memory) and stops.
    """
    from .config import Improve

    mine, others = take(assignments, out=None)
    config = load(Improve, words[0], others)
    if dry:
        from .dry import show_plan

        show_plan(config)
        return 0
    start_jax(config.mesh)
    from .improve import improve as go

    command = shlex.join(["jaxmerge", "improve", words[0], *others])
    go(config, name=Path(words[0]).stem, out=Path(str(mine["out"])) if mine["out"] else None, command=command)
    return 0


def sft(words: Words, assignments: Words, dry: bool) -> int:
    """sft CONFIG [key=value …]

    Fine-tune or pretrain a model on examples; resumes the unfinished run in its folder; out=DIR places it.
    """
    del dry
    from .config import Finetune

    mine, others = take(assignments, out=None)
    config = load(Finetune, words[0], others)
    start_jax(config.mesh)
    from .finetune import finetune

    finetune(config, name=Path(words[0]).stem, out=Path(str(mine["out"])) if mine["out"] else None)
    return 0


def sample(words: Words, assignments: Words, dry: bool) -> int:
    """sample MODEL PROMPTS OUT [key=value …]

    Generate: PROMPTS has a line of JSON a prompt ({"prompt": "…"} or {"messages": […]}, optionally "id"), OUT gets a
    line a prompt with text, tokens and log-probabilities (lists of them when samples > 1).
    Keys: temperature=0 top_k=0 top_p=1 max_new_tokens=128 samples=1 stop=[] seed=0 slots=64 chat=null dtype=float32
    """
    del dry
    from .config import SampleOptions

    settings = options(assignments, SampleOptions)
    start_jax()
    from .answer import sample_file

    count = sample_file(words[0], Path(words[1]), Path(words[2]), settings)
    say(f"{count} prompts → {words[2]}")
    return 0


def evaluate(words: Words, assignments: Words, dry: bool) -> int:
    """evaluate MODEL CONFIG [key=value …]

    Accuracy of MODEL on the questions of an improve config (its tasks and evaluation blocks); out=FILE writes JSON.
    """
    del dry
    from .config import Improve

    mine, others = take(assignments, out=None)
    config = load(Improve, words[1], others)
    start_jax(config.mesh)
    from .answer import evaluate_model

    result = evaluate_model(words[0], config)
    if mine["out"]:
        from .journal import write_durably

        write_durably(Path(str(mine["out"])), json.dumps(result, indent=1))
    return 0


def merge(words: Words, assignments: Words, dry: bool) -> int:
    """merge RECIPE OUT [seed=N] [max_shard_bytes=N] [--dry-run]

    Merge checkpoints on disk, tensor by tensor, by a recipe in mergekit's YAML grammar.
    --dry-run checks the recipe and its inputs, prints the plan and stops.
    """
    mine, others = take(assignments, seed=None, max_shard_bytes=5_000_000_000)
    if others:
        raise UserError(f"{others[0]!r}: merge knows seed= and max_shard_bytes=; the rest is in the recipe")
    from jaxmerge.files import merge as merge_files

    from .log import progress

    with contextlib.ExitStack() as stack:
        bars: list[Any] = []
        done = 0

        def advance(read: int, total: int, tensor: str) -> None:
            nonlocal done
            if not bars:
                bars.append(stack.enter_context(progress("merge", total=max(1, total // 2**20), unit="MB")))
            bars[0].advance(read // 2**20 - done, note=tensor)
            done = read // 2**20

        try:
            plan = merge_files(words[0], words[1], progress=advance, dry_run=dry, **mine)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(str(error.args[0] if isinstance(error, KeyError) else error)) from error
    for note in plan["notes"]:
        say(f"note: {note}")
    say(
        f"{plan['merge_method']}: {plan['tensors']} tensors, {plan['bytes_in'] / 1e9:.2f} GB in, "
        f"{plan['bytes_out'] / 1e9:.2f} GB out"
    )
    say(words[1])
    return 0


def export(words: Words, assignments: Words, dry: bool) -> int:
    """export RUN OUT [method=NAME] [round=N] [dtype=float32]

    Write the model a method ended a round with (the last one by default) as a Hugging Face folder. Without method=,
    RUN may be any MODEL, a GGUF file say.
    """
    del dry
    mine, others = take(assignments, method=None, round=None, dtype="float32")
    if others:
        raise UserError(f"{others[0]!r}: export knows method=, round= and dtype=")
    start_jax()
    from .export import export as go

    go(words[0], words[1], **mine)
    say(words[1])
    return 0


def report(words: Words, assignments: Words, dry: bool) -> int:
    """report RUN

    Write report.html of a run again from its metrics.
    """
    del assignments, dry
    from .report import write_report

    if not (Path(words[0]) / "config.yaml").is_file():
        raise UserError(f"{words[0]}: not the folder of a run (no config.yaml)")
    say(str(write_report(words[0])))
    return 0


def doctor(words: Words, assignments: Words, dry: bool) -> int:
    """doctor

    Devices, versions, extras, sandbox, disk: what works here, what is missing and how to get it.
    """
    del words, assignments, dry
    from .doctor import doctor as diagnose
    from .doctor import print_checks

    return print_checks(diagnose())


def start_jax(mesh: Any = None) -> None:
    """What must be set before jax is first used: virtual devices, and where compiled programs are kept."""
    import os

    import jax

    if mesh is not None and mesh.cpu_devices is not None:
        from .mesh import request_cpu_devices

        request_cpu_devices(mesh.cpu_devices)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmerge" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


VERBS: dict[str, Callable[[Words, Words, bool], int]] = {
    "improve": improve,
    "merge": merge,
    "sft": sft,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "doctor": doctor,
}
