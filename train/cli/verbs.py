"""What the verbs do: read the words, call one function of the stack, say where the result is.

Each verb's docstring is its help: the first line names its arguments in capitals.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from ..log import UserError, say
from ..resolve import build, load, override, read_yaml
from ..runtime.start import start_jax
from .files import extract_lora, inspect, merge
from .words import Words, options, take


def improve(words: Words, assignments: Words, dry: bool) -> int:
    """improve CONFIG [key=value …] [--dry-run]

    Run a self-improvement run, or resume the unfinished one in its folder.
    Keys are those of the config (rounds=3 merge.alpha=0.6 methods.imm.merge.drop=0.2); out=DIR places the folder.
    --dry-run resolves the config, prints the plan (phases, sizes, memory) and stops.
    A config with a sweep: block is an experiment: many runs, whose results are lines of sweep.rows.
    """
    from ..improve.settings import Improve

    mine, others = take(assignments, out=None)
    values = override(read_yaml(Path(words[0])), others)
    command = shlex.join(["jaxmerge", "improve", words[0], *others])
    if "sweep" in values:
        return sweep(words[0], values, mine["out"], command, dry)
    config = build(Improve, values)
    if dry:
        from ..improve.dry import show_plan

        show_plan(config)
        return 0
    start_jax(config, may_stop=True)
    from ..improve.run import improve as go

    go(config, name=Path(words[0]).stem, out=Path(str(mine["out"])) if mine["out"] else None, command=command)
    return 0


def sweep(path: str, values: dict, out: object, command: str, dry: bool) -> int:
    """An experiment: `improve` of a config with a `sweep:` block."""
    from ..studies.sweep import Experiment, run, show_plan

    experiment = Experiment.of(Path(path).stem, values)
    if dry:
        show_plan(experiment)
        return 0
    start_jax(experiment.checked, may_stop=True)
    run(experiment, command=command, out=Path(str(out)) if out else Path("runs") / experiment.name)
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
    from ..learn.settings import Finetune

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
    from ..learn.run import finetune

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
    from ..generate.settings import SampleOptions

    settings = options(assignments, SampleOptions)
    start_jax(settings)
    from ..generate.run import sample_file

    count = sample_file(words[0], Path(words[1]), Path(words[2]), settings)
    say(f"{count} prompts → {words[2]}")
    return 0


def search(words: Words, assignments: Words, dry: bool) -> int:
    """search CONFIG | MODEL QUESTIONS OUT [key=value …]

    Look for solutions step by step: SRA-MCTS, Tree of Thoughts, chains or difficulty-aware sampling; goes on with the
    unfinished search in its folder; out=DIR places it. QUESTIONS is JSON lines with question, optionally id and answer.
    Keys: search.kind=mcts (tot, cot, dart) search.iterations=16 search.children=3 search.depth=8 search.leaves=1
    search.gate=0.88 search.samples=1 questions.domain=mathematics (code) questions.limit=null sampling.temperature=0.7
    sampling.step=96 sampling.slots=64 filters.words=null prompts=FILE seed=0, and all others of a config.
    """
    del dry
    from ..search.settings import SearchRun

    mine, others = take(assignments, out=None)
    out = Path(str(mine["out"])) if mine["out"] else None
    if len(words) == 3:
        if out is not None:
            raise UserError(f"out={out}: the third word, {words[2]}, is the folder of the search already")
        out = Path(words[2])
        config = build(SearchRun, override({"model": {"path": words[0]}, "questions": {"path": words[1]}}, others))
    else:
        config = load(SearchRun, words[0], others)
    start_jax(config, may_stop=True)
    from ..search.run import search as go

    name = out.name if len(words) == 3 and out else Path(words[0]).stem
    go(config, name=name, out=out, command=shlex.join(["jaxmerge", "search", *words, *others]))
    return 0


def evaluate(words: Words, assignments: Words, dry: bool) -> int:
    """evaluate MODEL CONFIG [key=value …]

    Accuracy of MODEL on the questions of an improve config (its tasks and evaluation blocks); out=FILE writes JSON.
    Or of one file: CONFIG may be JSON lines (GSM8K, multiple choice, problem and answer, MBPP: told by their keys), the
    folder of a TFDS version, or the word humaneval. Keys then: task=null limit=null prompt=chat extract=flexible
    split=train samples=0 (of each question, for pass@k) temperature=0.8 seed=0 max_new_tokens=512 slots=64
    dtype=float32 mesh.fsdp=1 (and the other keys of mesh and distributed)
    """
    del dry
    from ..evaluate.settings import QuestionOptions
    from ..improve.settings import Improve

    mine, others = take(assignments, out=None)
    if words[1] == "humaneval" or Path(words[1]).suffix in (".jsonl", ".json") or Path(words[1]).is_dir():
        settings = options(others, QuestionOptions)
        start_jax(settings)
        from ..evaluate.run import examine

        result = examine(words[0], Path(words[1]), settings)
    else:
        config = load(Improve, words[1], others)
        start_jax(config)
        from ..evaluate.run import evaluate_model

        result = evaluate_model(
            words[0], config.tasks, config.evaluation, mesh=config.mesh, dtype=config.model.dtype, seed=config.seed
        )
    if mine["out"]:
        from ..runtime.disk import write_durably
        from ..runtime.processes import on_first

        on_first(write_durably, Path(str(mine["out"])), json.dumps(result, indent=1))
    return 0


def harness(words: Words, assignments: Words, dry: bool) -> int:
    """harness MODEL TASKS [key=value …]

    Evaluate MODEL on tasks of EleutherAI's lm-evaluation-harness (several with commas between), in process.
    Keys: include=DIR (a folder with tasks as YAML files), num_fewshot=null limit=null chat=false slots=64 dtype=float32
    out=FILE (writes the results as JSON) mesh.fsdp=1 (and the other keys of mesh and distributed)
    """
    del dry
    from ..evaluate.harness import evaluate as go
    from ..evaluate.settings import HarnessOptions

    mine, others = take(assignments, out=None)
    settings = options(others, HarnessOptions)
    start_jax(settings)
    from ..models.open import open_model
    from ..runtime.mesh import make_mesh
    from ..runtime.processes import on_first

    found = go(
        open_model(words[0], make_mesh(settings.mesh)),
        words[1].split(","),
        dtype=settings.dtype,
        slots=settings.slots,
        gather=settings.mesh.gather_to_decode,
        include_path=settings.include,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.chat,
    )
    for task, metrics in found["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                say(f"{task}  {metric}  {value:.4f}")
    if mine["out"]:
        from ..runtime.disk import write_durably

        kept = {key: found[key] for key in ("results", "configs", "versions", "n-shot", "n-samples")}
        on_first(write_durably, Path(str(mine["out"])), json.dumps(kept, indent=1, default=str))
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
    from ..improve.export import export as go

    go(words[0], words[1], method=mine["method"], number=mine["round"], dtype=mine["dtype"])
    say(words[1])
    return 0


def report(words: Words, assignments: Words, dry: bool) -> int:
    """report RUN

    Write report.html of a run again from its metrics.
    """
    del assignments, dry
    from ..report.page import write_report

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
    from ..studies.analyse import analyse_run
    from ..studies.settings import AnalyseOptions

    settings = options(assignments, AnalyseOptions)
    start_jax()
    say(str(analyse_run(Path(words[0]), settings)))
    return 0


def results(words: Words, assignments: Words, dry: bool) -> int:
    """results [key=value …]

    Write docs/results.md and its pictures from the rows of the experiments: nothing is run.
    Keys: configs=configs/experiments folder=docs/results
    """
    del words, dry
    mine, others = take(assignments, configs="configs/experiments", folder="docs/results")
    if others:
        raise UserError(f"{others[0]}: no such key; known: configs, folder")
    from ..studies.page import write

    write(Path(str(mine["folder"])), Path(str(mine["configs"])))
    return 0


def doctor(words: Words, assignments: Words, dry: bool) -> int:
    """doctor

    Devices, versions, extras, sandbox, disk: what works here, what is missing and how to get it.
    """
    del words, assignments, dry
    from .doctor import doctor as diagnose
    from .doctor import print_checks

    return print_checks(diagnose())


VERBS: dict[str, Callable[[Words, Words, bool], int]] = {
    "improve": improve,
    "merge": merge,
    "inspect": inspect,
    "extract-lora": extract_lora,
    "sft": sft,
    "sample": sample,
    "search": search,
    "evaluate": evaluate,
    "harness": harness,
    "export": export,
    "report": report,
    "analyse": analyse,
    "results": results,
    "doctor": doctor,
}
