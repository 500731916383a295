"""What the verbs do: read the words, call one function of the stack, say where the result is.

Each verb's docstring is its help: the first line names its arguments in capitals.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .log import UserError, format_percent, say
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
    start_jax(config, may_stop=True)
    from .improve import improve as go

    command = shlex.join(["jaxmerge", "improve", words[0], *others])
    go(config, name=Path(words[0]).stem, out=Path(str(mine["out"])) if mine["out"] else None, command=command)
    return 0


def sft(words: Words, assignments: Words, dry: bool) -> int:
    """sft CONFIG | MODEL DATA OUT [key=value …]

    Fine-tune or pretrain a model on examples; resumes the unfinished run in its folder; out=DIR places it.
    Without a config, DATA is JSON lines (messages, prompt and completion, Alpaca, GSM8K, MBPP, multiple choice: told
    by their keys) or the folder of a TFDS version, and OUT the folder of the run.
    Keys: sft.epochs=3 sft.batch=64 sft.learning_rate=2e-5 sft.packing=false sft.max_length=512 sft.overlong=drop
    data.learn=assistant data.format=null data.ignore=[] data.chat_template=FILE, and all others of a config.
    """
    del dry
    from .config import Finetune

    mine, others = take(assignments, out=None)
    out = Path(str(mine["out"])) if mine["out"] else None
    if len(words) == 3:
        if out is not None:
            raise UserError(f"out={out}: the third word, {words[2]}, is the folder of the run already")
        out = Path(words[2])
        config = build(Finetune, override({"model": {"path": words[0]}, "data": {"path": words[1]}}, others))
    else:
        config = load(Finetune, words[0], others)
    start_jax(config, may_stop=True)
    from .finetune import finetune

    finetune(config, name=out.name if len(words) == 3 and out else Path(words[0]).stem, out=out)
    return 0


def sample(words: Words, assignments: Words, dry: bool) -> int:
    """sample MODEL PROMPTS OUT [key=value …]

    Generate: PROMPTS has a line of JSON a prompt ({"prompt": "…"} or {"messages": […]}, optionally "id"), OUT gets a
    line a prompt with text, tokens and log-probabilities (lists of them when samples > 1).
    Keys: temperature=0 top_k=0 top_p=1 max_new_tokens=128 samples=1 stop=[] seed=0 slots=64 chat=null dtype=float32
    mesh.data=1 mesh.fsdp=1 mesh.tensor=1 mesh.cpu_devices=null distributed.auto=false (and its other keys)
    """
    del dry
    from .config import SampleOptions

    settings = options(assignments, SampleOptions)
    start_jax(settings)
    from .answer import sample_file

    count = sample_file(words[0], Path(words[1]), Path(words[2]), settings)
    say(f"{count} prompts → {words[2]}")
    return 0


def evaluate(words: Words, assignments: Words, dry: bool) -> int:
    """evaluate MODEL CONFIG [key=value …]

    Accuracy of MODEL on the questions of an improve config (its tasks and evaluation blocks); out=FILE writes JSON.
    Or of one file: CONFIG may be JSON lines (GSM8K, multiple choice, or problem and answer: told by their keys) or the
    folder of a TFDS version. Keys then: task=null limit=null prompt=chat extract=flexible split=train
    max_new_tokens=512 slots=64 dtype=float32 mesh.fsdp=1 (and the other keys of mesh and distributed)
    """
    del dry
    from .config import Improve, QuestionOptions

    mine, others = take(assignments, out=None)
    if Path(words[1]).suffix in (".jsonl", ".json") or Path(words[1]).is_dir():
        settings = options(others, QuestionOptions)
        start_jax(settings)
        from .examine import examine

        result = examine(words[0], Path(words[1]), settings)
    else:
        config = load(Improve, words[1], others)
        start_jax(config)
        from .answer import evaluate_model

        result = evaluate_model(words[0], config)
    if mine["out"]:
        from .journal import write_durably
        from .processes import on_first

        on_first(write_durably, Path(str(mine["out"])), json.dumps(result, indent=1))
    return 0


def harness(words: Words, assignments: Words, dry: bool) -> int:
    """harness MODEL TASKS [key=value …]

    Evaluate MODEL on tasks of EleutherAI's lm-evaluation-harness (several with commas between), in process.
    Keys: include=DIR (a folder with tasks as YAML files), num_fewshot=null limit=null chat=false slots=64 dtype=float32
    out=FILE (writes the results as JSON)
    """
    del dry
    mine, others = take(
        assignments, include=None, num_fewshot=None, limit=None, chat=False, slots=64, dtype="float32", out=None
    )
    if others:
        raise UserError(f"{others[0]!r}: harness knows {', '.join(f'{key}=' for key in mine)}")
    start_jax()
    from .export import open_model
    from .harness import evaluate as go

    found = go(
        open_model(words[0]),
        words[1].split(","),
        dtype=mine["dtype"],
        slots=mine["slots"],
        include_path=mine["include"],
        num_fewshot=mine["num_fewshot"],
        limit=mine["limit"],
        apply_chat_template=mine["chat"],
    )
    for task, metrics in found["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                say(f"{task}  {metric}  {value:.4f}")
    if mine["out"]:
        from .journal import write_durably

        kept = {key: found[key] for key in ("results", "configs", "versions", "n-shot", "n-samples")}
        write_durably(Path(str(mine["out"])), json.dumps(kept, indent=1, default=str))
    return 0


def merge(words: Words, assignments: Words, dry: bool) -> int:
    """merge RECIPE OUT [key=value …] [--dry-run]

    Merge checkpoints on disk by a recipe in mergekit's YAML grammar, in memory bounded by the largest tensor.
    Killed, the same command goes on where it was. --dry-run checks everything, prints sizes and memory and stops.
    Keys:
      seed=N                  in place of the recipe's
      compat=mergekit         as mergekit does it, where we differ (docs/merge.md)
      allow=missing,unused,shapes   tensors some models lack; that the base lacks; of unlike shapes: refused otherwise
      format=safetensors      or orbax
      device=cpu              or gpu, tpu: where the arithmetic runs
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
    from jaxmerge.files.compare import compare
    from jaxmerge.files.picture import svg
    from jaxmerge.files.source import open_source
    from jaxmerge.files.table import table

    from .journal import write_durably

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
    from jaxmerge.files.lowrank import extract_lora as extract
    from jaxmerge.files.source import open_source

    from .log import progress

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


def analyse(words: Words, assignments: Words, dry: bool) -> int:
    """analyse RUN [key=value …]

    What training did to a run's layers, weights and samples: analysis.json, analysis.html, analysis/*.svg, and in the
    run's report.
    Keys: method=null rounds=[] (all) texts=32 (held-out questions a domain) samples=0 (32: drawn now, for pass@k up to
    32) questions=64 (sampled a domain) limem=false (memorisation) grid=9 (of the plane) out=null (another folder)
    """
    del dry
    from .analyse import AnalyseOptions, analyse_run

    settings = options(assignments, AnalyseOptions)
    start_jax()
    say(str(analyse_run(Path(words[0]), settings)))
    return 0


def doctor(words: Words, assignments: Words, dry: bool) -> int:
    """doctor

    Devices, versions, extras, sandbox, disk: what works here, what is missing and how to get it.
    """
    del words, assignments, dry
    from .doctor import doctor as diagnose
    from .doctor import print_checks

    return print_checks(diagnose())


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
    from .log import progress

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


def start_jax(config: Any = None, *, may_stop: bool = False) -> None:
    """What must be done before jax is first used: virtual devices, other processes, where compiled programs are kept.

    Args:
      config: its `mesh` and `distributed` are looked at.
      may_stop: a signal is answered at the next safe point.
    """
    import os

    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmerge" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config is None:
        return
    if config.mesh.cpu_devices is not None:
        from .mesh import request_cpu_devices

        request_cpu_devices(config.mesh.cpu_devices)
    if config.distributed.wanted:
        from . import processes

        processes.start(config.distributed)  # jax then watches for SIGTERM
    elif may_stop:
        from . import stop

        stop.listen()


VERBS: dict[str, Callable[[Words, Words, bool], int]] = {
    "improve": improve,
    "merge": merge,
    "inspect": inspect,
    "extract-lora": extract_lora,
    "sft": sft,
    "sample": sample,
    "evaluate": evaluate,
    "harness": harness,
    "export": export,
    "report": report,
    "analyse": analyse,
    "doctor": doctor,
}
