"""The verbs of the command: what each takes, and the one function of the stack it calls.

The docstring of each function is the prose of its help; its keys are the fields of its settings.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ..evaluate.settings import HarnessOptions, QuestionOptions, is_questions
from ..generate.settings import SampleOptions
from ..improve.settings import Improve
from ..learn.settings import Finetune
from ..log import UserError, say
from ..resolve import build, load, override, read_yaml
from ..runtime.disk import check_file, check_folder, write_durably
from ..runtime.start import start_jax
from ..search.settings import SearchRun
from ..studies.settings import AnalyseOptions
from ..studies.statistics_settings import StatisticsOptions
from ..studies.tune_settings import TuneOptions
from .files import check_push, extract_lora, has_begun, inspect, merge, push, push_folder, verify
from .flags import MERGEKIT
from .measure import statistics
from .settings import (
    DataOptions,
    Experiment,
    ExportOptions,
    ExtractOptions,
    InspectOptions,
    MergeOptions,
    Place,
    PushOptions,
    Result,
    ResultsOptions,
    VerifyOptions,
)
from .words import Verb, Words, options, split


def improve(words: Words, assignments: Words, dry: bool) -> int:
    """Run a self-improvement run, or resume the unfinished one in its folder.

    --dry-run resolves the config, prints the plan (phases, sizes, memory, minutes) and stops.
    A config with a sweep: block is an experiment: many runs, whose results are lines of sweep.rows.
    A key of a method is written methods.imm.merge.drop=0.2.
    """
    place, others = split(assignments, Place)
    values = override(read_yaml(Path(words[0])), others)
    command = shlex.join(["jaxmerge", "improve", words[0], *others])
    if "sweep" in values:
        return sweep(words[0], values, place.out, command, dry)
    config = build(Improve, values)
    if dry:
        from ..improve.dry import show_plan

        show_plan(config)
        return 0
    start_jax(config, may_stop=True)
    from ..improve.run import improve as go

    go(config, name=Path(words[0]).stem, out=Path(place.out) if place.out else None, command=command)
    return 0


def sweep(path: str, values: dict, out: str | None, command: str, dry: bool) -> int:
    """An experiment: `improve` of a config with a `sweep:` block."""
    from ..studies.sweep import Experiment, run, show_plan

    experiment = Experiment.of(Path(path).stem, values)
    if dry:
        show_plan(experiment)
        return 0
    start_jax(experiment.checked, may_stop=True)
    run(experiment, command=command, out=Path(out) if out else Path("runs") / experiment.name)
    return 0


def sft(words: Words, assignments: Words, dry: bool) -> int:
    """Fine-tune or pretrain a model on examples, or resume the unfinished run in its folder.

    Without a config, DATA is a file of JSON lines, the folder of a TFDS version or a dataset of the hub
    (hf:ORG/NAME/SUBSET), and OUT is the folder of the run. The keys of the lines tell their format: messages, prompt
    and completion, Alpaca, GSM8K, MBPP or multiple choice.
    """
    del dry
    place, others = split(assignments, Place)
    out = Path(place.out) if place.out else None
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


def data(words: Words, assignments: Words, dry: bool) -> int:
    """Show which examples a file or a dataset of the hub would give, how long they are, and what is learnt or cut.

    PATH is what `sft` and `evaluate` take: JSON lines, the folder of a TFDS version, or hf:ORG/NAME/SUBSET:SPLIT. The
    text that would be learnt stands in ⟦ ⟧. If model= is given, lengths are counted in its tokens, and conversations
    are shown in its chat template.
    """
    del dry
    settings = options(assignments, DataOptions)
    from ..learn.look import look
    from ..learn.settings import Data, Sft

    read = Data(
        path=words[0], format=settings.format, split=settings.split, ignore=settings.ignore, learn=settings.learn,
        chat_template=settings.chat_template,
    )  # fmt: skip
    limits = Sft(max_length=settings.max_length, overlong=settings.overlong)
    look(read, limits, model=settings.model, examples=settings.examples)
    return 0


def sample(words: Words, assignments: Words, dry: bool) -> int:
    """Generate texts for a file of prompts.

    Each line of PROMPTS is {"prompt": "…"} or {"messages": […]}, and may have an "id". If the last message is the
    assistant's, the model continues it. For each prompt OUT gets a line of JSON with the text, its tokens and their
    log-probabilities, or with lists of them if samples is above 1.
    """
    del dry
    settings = options(assignments, SampleOptions)
    check_file(words[2])
    start_jax(settings)
    from ..generate.run import sample_file

    count = sample_file(words[0], Path(words[1]), Path(words[2]), settings)
    say(f"{count} prompts → {words[2]}")
    return 0


def search(words: Words, assignments: Words, dry: bool) -> int:
    """Look for solutions step by step, and write trees, examples and a report.

    The search is SRA-MCTS, Tree of Thoughts, independent chains or difficulty-aware sampling. The same command resumes
    a search that was stopped. QUESTIONS is a file of JSON lines with a question each, and may have ids and answers.
    """
    del dry
    place, others = split(assignments, Place)
    out = Path(place.out) if place.out else None
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
    """Measure the accuracy of a model on the questions of a config or a file.

    CONFIG is a config of `improve`, of which the blocks tasks and evaluation are read. `improve --help` lists its keys.
    FILE is a file of JSON lines, the folder of a TFDS version, a dataset of the hub (hf:ORG/NAME/SUBSET:SPLIT), or the
    word humaneval. The keys of the lines tell their format: GSM8K, multiple choice, problem and answer, or MBPP. The
    keys below are those for a FILE.
    """
    del dry
    result, others = split(assignments, Result)
    check_file(result.out)
    if is_questions(words[1]):
        settings = options(others, QuestionOptions)
        start_jax(settings)
        from ..evaluate.run import examine

        found = examine(words[0], Path(words[1]), settings)
    else:
        config = load(Improve, words[1], others)
        start_jax(config)
        from ..evaluate.run import evaluate_model

        found = evaluate_model(
            words[0], config.tasks, config.evaluation, mesh=config.mesh, dtype=config.model.dtype, seed=config.seed
        )
    if result.out:
        from ..runtime.processes import on_first

        on_first(write_durably, Path(result.out), json.dumps(found, indent=1))
    return 0


def harness(words: Words, assignments: Words, dry: bool) -> int:
    """Evaluate a model on tasks of EleutherAI's lm-evaluation-harness, in process.

    TASKS is a list of names of tasks, with commas between them.
    """
    del dry
    from ..evaluate.harness import evaluate as go

    result, others = split(assignments, Result)
    check_file(result.out)
    settings = options(others, HarnessOptions)
    start_jax(settings)
    from ..generate.together import compose
    from ..models.open import open_model
    from ..runtime.mesh import make_mesh
    from ..runtime.processes import on_first

    found = go(
        compose(open_model(words[0], make_mesh(settings.mesh)), settings.decode),
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
    if result.out:
        kept = {key: found[key] for key in ("results", "configs", "versions", "n-shot", "n-samples")}
        on_first(write_durably, Path(result.out), json.dumps(kept, indent=1, default=str))
    return 0


def export(words: Words, assignments: Words, dry: bool) -> int:
    """Write a run's model as a Hugging Face folder, or as a GGUF file for llama.cpp.

    RUN is the folder of a run. If method= is not given, it may also be any MODEL, such as a GGUF file.

    With decay.name= it is a run of sft or of improve whose fine-tuning kept blocks of snapshots. These are merged.
    """
    del dry
    settings = options(assignments, ExportOptions)
    check_folder(Path(words[1]))
    check_push(settings.push)
    start_jax()
    from ..improve.export import export as go
    from ..runtime.processes import on_first

    gguf = (settings.type or "q8_0") if settings.format == "gguf" else None
    which = {"method": settings.method, "number": settings.round, "decay": settings.decay, "last": settings.last}
    say(str(go(words[0], words[1], **which, dtype=settings.dtype, gguf=gguf, pre=settings.pre)))
    on_first(push_folder, Path(words[1]), settings.push, private=settings.private)
    return 0


def report(words: Words, assignments: Words, dry: bool) -> int:
    """Write the report of a run, report.html, again from its metrics."""
    del assignments, dry
    from ..report.page import write_report

    if not (Path(words[0]) / "config.yaml").is_file():
        raise UserError(f"{words[0]}: not the folder of a run (no config.yaml)")
    say(str(write_report(words[0])))
    return 0


def analyse(words: Words, assignments: Words, dry: bool) -> int:
    """Measure what training did to a run's layers, weights and samples.

    The results are written to analysis.json, analysis.html and analysis/*.svg, and the run's report shows them too.
    """
    del dry
    from ..studies.analyse import analyse_run

    settings = options(assignments, AnalyseOptions)
    start_jax()
    say(str(analyse_run(Path(words[0]), settings)))
    return 0


def tune(words: Words, assignments: Words, dry: bool) -> int:
    """Search coefficients of a merge recipe on questions, with the models in memory.

    RECIPE is a recipe of `merge` in which a number is written as a range: weight: {search: [0.0, 1.0]}. QUESTIONS is
    what `evaluate` asks, or with score=likelihood what `sft` learns from. The recipe with the numbers that were found
    is OUT/recipe.yaml. The same command goes on with a search that was stopped.
    """
    del dry
    settings, others = split(assignments, TuneOptions)
    asked = options(others, QuestionOptions)
    start_jax(asked, may_stop=True)
    from ..studies.tune import tune as go

    out = Path(words[2])
    go(Path(words[0]), Path(words[1]), out, settings, asked)
    say(f"jaxmerge merge {shlex.quote(str(out / 'recipe.yaml'))} MODEL")
    return 0


def results(words: Words, assignments: Words, dry: bool) -> int:
    """Write docs/results.md and its pictures from the rows of the experiments, without running any."""
    del words, dry
    settings = options(assignments, ResultsOptions)
    from ..studies.page import write

    write(Path(settings.folder), Path(settings.configs))
    return 0


def doctor(words: Words, assignments: Words, dry: bool) -> int:
    """Show which devices, versions and extras are installed, what is missing, and how to get it."""
    del words, assignments, dry
    from .doctor import doctor as diagnose
    from .doctor import print_checks

    return print_checks(diagnose())


def configs(words: Words, assignments: Words, dry: bool) -> int:
    """List the configs that come with the code, each with the command that runs it and what it is for.

    A verb that takes a CONFIG also takes the name of one of these: jaxmerge improve quickstart
    """
    del words, assignments, dry
    from .configs import listing

    print(listing())
    return 0


def completion(words: Words, assignments: Words, dry: bool) -> int:
    """Print a script that completes verbs, keys and files in a shell.

    SHELL is bash, zsh or fish. In bash: source <(jaxmerge completion bash)
    """
    del assignments, dry
    from .completion import script

    print(script(words[0], VERBS), end="")
    return 0


CONFIG = ("CONFIG",)
TABLE = (
    Verb("improve", (CONFIG,), improve, (Place, Improve, Experiment), flags=("--dry-run",), resumes=True),
    Verb(
        "merge",
        (("RECIPE", "OUT"),),
        merge,
        (MergeOptions,),
        flags=("--dry-run",),
        others=MERGEKIT,
        extra="files",
        resumes=has_begun,
    ),
    Verb("verify", (("OUT",),), verify, (VerifyOptions,), extra="files"),
    Verb("inspect", (("MODEL",), ("BASE", "MODELS")), inspect, (InspectOptions,), extra="files"),
    Verb("extract-lora", (("BASE", "TUNED", "OUT"),), extract_lora, (ExtractOptions,), extra="files"),
    Verb("statistics", (("MODEL", "DATA", "OUT"),), statistics, (StatisticsOptions,)),
    Verb("tune", (("RECIPE", "QUESTIONS", "OUT"),), tune, (TuneOptions, QuestionOptions), resumes=True),
    Verb("sft", (CONFIG, ("MODEL", "DATA", "OUT")), sft, (Place, Finetune), resumes=True),
    Verb("data", (("PATH",),), data, (DataOptions,)),
    Verb("sample", (("MODEL", "PROMPTS", "OUT"),), sample, (SampleOptions,)),
    Verb("evaluate", (("MODEL", "CONFIG"), ("MODEL", "FILE")), evaluate, (Result, QuestionOptions), also=(Improve,)),
    Verb("harness", (("MODEL", "TASKS"),), harness, (Result, HarnessOptions)),
    Verb("export", (("RUN", "OUT"),), export, (ExportOptions,)),
    Verb("push", (("FOLDER", "NAME"),), push, (PushOptions,), extra="files"),
    Verb("report", (("RUN",),), report),
    Verb("search", (CONFIG, ("MODEL", "QUESTIONS", "OUT")), search, (Place, SearchRun), resumes=True),
    Verb("results", ((),), results, (ResultsOptions,)),
    Verb("analyse", (("RUN",),), analyse, (AnalyseOptions,)),
    Verb("configs", ((),), configs),
    Verb("doctor", ((),), doctor),
    Verb("completion", (("SHELL",),), completion),
)
VERBS = {verb.name: verb for verb in TABLE}
"""Name → verb, in the order in which `jaxmerge --help` lists them."""
