"""The verb `search`: a tree for every question, the best solutions as a TFDS version, a page to read them on.

config.yaml · metrics.jsonl · summary.json · report.html
questions.jsonl · prompts.json              what is asked, and how: a search goes on with no other
trees.jsonl                                 a question a line: every node, its scores, visits, reflection
phases/search[.partial]/replies.jsonl       every reply: what a killed search goes on from
samples/search/1.0.0/                       the examples, ready for `jaxmerge sft`
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from ..data.hub import pin
from ..data.versions import write_version
from ..log import UserError, is_first_process, progress, say
from ..models.open import Model, load_source, with_date
from ..models.settings import Source
from ..report.page import write_report
from ..resolve import to_dict
from ..runtime import checkpoint
from ..runtime.disk import write_durably
from ..runtime.folder import check_same_config, content, fingerprint, provenance, write_config
from ..runtime.journal import Journal
from ..runtime.jsonl import append_jsonl, read_jsonl, write_jsonl
from ..runtime.mesh import make_mesh
from ..runtime.processes import on_first, several
from ..runtime.stop import check
from ..tasks.code import CodeProblem
from .ask import ROLES, Ask
from .driver import Driver
from .examples import distribution, select, whole
from .found import Found
from .kinds import KINDS
from .prompts import Prompts, load_prompts
from .questions import Item, read_questions
from .read import SCALE
from .replies import Replies
from .settings import SearchRun
from .subject import Subject
from .testing import Examiner
from .voice import Voice

PHASES = ("load", "search", "examples")
DATASET = ("search", "1.0.0")
TENTHS = tuple(i / 10 for i in range(11))


def search(config: SearchRun, *, name: str, out: Path | None = None, command: str = "") -> Path:
    """Search, or go on with the unfinished search in its folder; returns the folder.

    Raises:
      UserError: the folder holds a search of another config or other weights, or a prompt, a question or a model
        cannot be read.
    """
    folder = out or Path("runs") / f"{name}-{fingerprint(content(config))}"
    config = pin(config, folder, on_first)
    on_first(check_same_config, folder, config)
    items = read_questions(config.questions)
    prompts = load_prompts(config.questions.domain, config.prompts, reflects=config.search.reflects)
    with Journal(folder) as journal:
        on_first(write_config, folder, config)
        journal.reconcile(PHASES)
        if journal.committed("examples") is None:
            on_first(refuse_others, folder, items, prompts)
            voices = load_voices(config, prompts, journal)
            if journal.committed("search") is None:
                grow(config, items, prompts, voices, journal)
            make_examples(config, items, prompts, voices["policy"].model, journal)
        records = {phase: journal.committed(phase) or {} for phase in PHASES}
        on_first(write_summary, folder, name=name, command=command, records=records)
    tell(records, folder)
    return folder


def load_voices(config: SearchRun, prompts: Prompts, journal: Journal) -> dict[str, Voice]:
    """Who plays each role; one voice for all roles of one model. The weights are those the search began with."""
    mesh, start = make_mesh(config.mesh), time.perf_counter()
    sources: dict[str, Source] = {}
    for role in ROLES:
        given = config.roles.get(role)
        sources[role] = config.model if given is None or given.model is None else given.model
    voices: dict[str, Voice] = {}
    digests: dict[str, str] = {}
    for role, source in sources.items():
        twin = next((other for other in voices if sources[other] == source), None)
        if twin is not None:
            voices[role] = voices[twin]
            continue
        model = with_date(load_source(source, mesh, seed=config.seed), journal.root)
        digests[role] = checkpoint.digest(model.params)
        temperatures = {
            r: given.temperature
            for r, given in config.roles.items()
            if given.temperature is not None and sources[r] == source
        }
        voices[role] = Voice(
            model, prompts, config.sampling, seed=config.seed, dtype=source.dtype, temperatures=temperatures,
            gather=config.mesh.gather_to_decode,
        )  # fmt: skip
    record = journal.committed("load")
    if record is None:
        journal.folder("load")
        journal.commit("load", {"kind": "load", "seconds": time.perf_counter() - start, "digests": digests})
    elif record["digests"] != digests:
        other = next(role for role in digests if record["digests"].get(role) != digests[role])
        raise UserError(
            f"{sources[other].path or 'model.random'}: the weights changed since this search began; restore them or "
            "choose another folder with out=DIR"
        )
    return voices


def refuse_others(folder: Path, items: list[Item], prompts: Prompts) -> None:
    """Keep what is asked and by what it is judged with the search: a file that changed would mix two searches.

    What a search begun before it was kept does not hold is not compared.
    """
    path, rows = folder / "questions.jsonl", [known(item) for item in items]
    if not path.exists():
        write_jsonl(path, rows)
    else:
        then = read_jsonl(path)
        fits = len(then) == len(rows) and all(old.items() <= new.items() for old, new in zip(then, rows, strict=True))
        if not fits:
            changed = [row["id"] for row in rows if not any(old.items() <= row.items() for old in then)]
            which = f" ({', '.join(changed[:3])}{', …' if len(changed) > 3 else ''})" if changed else ""
            raise UserError(
                f"{path}: the questions, answers or tests{which} changed since this search began; restore them or "
                "choose another folder with out=DIR"
            )
    path, ours = folder / "prompts.json", to_dict(prompts)
    if not path.exists():
        write_durably(path, json.dumps(ours, indent=1, ensure_ascii=False))
        return
    theirs = json.loads(path.read_text())
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]  # some came later
    if changed:
        raise UserError(
            f"{path}: the prompts {', '.join(changed)} changed since this search began; restore them or choose another "
            "folder with out=DIR"
        )


def judged(item: Item, text: str) -> float | None:
    """The verdict on a text; None, and a line that says so, where it could not be judged."""
    assert item.verify is not None, "asked only of what can be judged"
    try:
        return item.verify(text)
    except Exception as error:  # said, never hidden: one answer may not stop a search
        say(f"{item.id}: {text[-60:]!r} could not be judged ({type(error).__name__}: {error})")
        return None


def known(item: Item) -> dict[str, Any]:
    """A line of questions.jsonl."""
    row = {"id": item.id, "text": item.text, "answer": item.answer}
    # The name of a problem may be its line's number.
    tests = None if item.tests is None else {k: v for k, v in to_dict(item.tests).items() if k != "id"}
    return row if tests is None else {**row, "tests": tests}


def grow(config: SearchRun, items: list[Item], prompts: Prompts, voices: dict[str, Voice], journal: Journal) -> None:
    """Search every question and commit the trees."""
    partial, start = journal.folder("search"), time.perf_counter()
    by_id = {item.id: item for item in items}
    subjects = {
        item.id: Subject(
            item.id, item.text, config.search, seed=config.seed, judged=item.judged,
            complete=prompts.complete,
        )
        for item in items
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    # Trees appear here as they end, for whoever watches; a search that goes on finds them again from its replies.
    live = partial / "trees.jsonl"
    on_first(live.unlink, missing_ok=True)

    def verify(id: str, ask: Ask) -> float | Future | None:
        item, text = by_id[id], whole(prompts, ask.values)
        if item.tests is None:
            return None if item.verify is None else judged(item, text)
        problem = item.tests
        if several():  # they go on in step only if all hear of a verdict at the same point
            return on_first(lambda: examined(examiner, problem, text).result())
        return examined(examiner, problem, text)

    def on_end(id: str, found: Found) -> None:
        rows[id] = tree_row(by_id[id], config, found, subjects[id])
        if is_first_process():
            append_jsonl(live, rows[id])
        bar.advance(1)

    def between() -> None:
        check()
        nodes = sum(subject.nodes for subject in subjects.values())
        speed = driver.counts["tokens"] / max(time.perf_counter() - start, 1e-9)
        bar.advance(0, note=f"{driver.open} open · {nodes:,} nodes · {speed:,.0f} tokens/s")

    needed = any(item.tests is not None for item in items) and is_first_process()
    with contextlib.ExitStack() as stack:
        examiner = stack.enter_context(Examiner()) if needed else None
        log = stack.enter_context(Replies(partial / "replies.jsonl"))
        if log.known:
            say(f"{len(log.known):,} replies are there; going on")
        bar = stack.enter_context(progress("search", total=len(items), unit="questions"))
        driver: Driver[Found] = Driver(voices, verify, log, on_end=on_end)
        driver.run(((id, KINDS[config.search.kind](c)) for id, c in subjects.items()), between=between)
    ordered = [rows[item.id] for item in items]
    on_first(write_jsonl, journal.root / "trees.jsonl", ordered)
    seconds = time.perf_counter() - start
    journal.commit("search", {"kind": "search", "seconds": seconds, **summarise_search(ordered, driver, seconds)})
    on_first((journal.committed_folder("search") / "trees.jsonl").unlink, missing_ok=True)


def examined(examiner: Examiner | None, problem: CodeProblem, text: str) -> Future:
    assert examiner is not None, "the first process opens a sandbox where a question has tests"
    return examiner.submit(problem, text)


def tree_row(item: Item, config: SearchRun, found: Found, subject: Subject) -> dict[str, Any]:
    """A line of trees.jsonl: the same for the same replies."""
    about = {"id": item.id, "family": item.family, "question": item.text, "answer": item.answer}
    return {**about, "kind": config.search.kind, **found.row(), "counts": dict(sorted(subject.counts.items()))}


def summarise_search(rows: list[dict[str, Any]], driver: Driver, seconds: float) -> dict[str, Any]:
    """What the search came to: plan lengths, scores, why searches ended, what was dropped, how fast."""
    nodes = [node for row in rows for node in row["nodes"][1:]]
    chosen = [row["nodes"][row["chosen"]] for row in rows if row["chosen"] is not None]
    plans = [s["steps"] for row in rows for s in row["solutions"] if s["steps"]]
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["counts"])
    steps = Counter(len(plan) for plan in plans)
    given = Counter(round(SCALE * node["score"]) for node in nodes if node["score"] is not None)
    judged = [s["verdict"] for row in rows for s in row["solutions"] if s["verdict"] is not None]
    speed = driver.speed()
    return {
        "questions": len(rows),
        "nodes": len(nodes),
        "depths": dict(sorted(Counter(str(node["depth"]) for node in nodes).items())),
        "plan_steps": {str(n): steps[n] for n in sorted(steps)},
        "plan_words": sorted(sum(len(step.split()) for step in plan) for plan in plans),
        "scores": {str(n): given[n] for n in range(SCALE + 1)},
        "values": distribution([n["value"] for n in chosen if n["score"] is not None], TENTHS),
        "ends": dict(sorted(Counter(row["end"] for row in rows).items())),
        "judged": len(judged),
        "right": sum(v == 1.0 for v in judged),
        "counts": dict(sorted(counts.items())),
        **speed,
        "tokens_per_second": speed["tokens"] / seconds,
        # Of a search that was gone on with, some questions were answered before.
        "questions_per_second": None if speed["replayed"] else len(rows) / seconds,
    }


def make_examples(config: SearchRun, items: list[Item], prompts: Prompts, model: Model, journal: Journal) -> None:
    """Filter what was found and write it as a TFDS version."""
    start = time.perf_counter()
    journal.folder("examples")
    rows = {row["id"]: row for row in on_first(read_jsonl, journal.root / "trees.jsonl")}
    filters = config.filters
    examples, counts = select(
        items,
        rows,
        model.tokenizer,
        prompts,
        code=config.questions.domain == "code",
        words=config.words,
        value=filters.value,
        tests=filters.tests,
        per_question=filters.per_question,
    )
    provenance = {
        "method": f"search/{config.search.kind}",
        "model": (journal.committed("load") or {})["digests"]["policy"],
        "seed": config.seed,
        "search": to_dict(config.search),
        "sampling": to_dict(config.sampling),
        "filters": to_dict(filters),
        "counts": counts,
    }
    if examples:
        on_first(write_version, journal.root / "samples", *DATASET, examples, provenance)
    dataset = "/".join(DATASET) if examples else None
    seconds = time.perf_counter() - start
    journal.commit("examples", {"kind": "examples", "seconds": seconds, **counts, "dataset": dataset})


def write_summary(folder: Path, *, name: str, command: str, records: dict[str, dict[str, Any]]) -> None:
    """summary.json and the report."""
    summary = {
        "name": name,
        "finished": True,
        "rows": [],
        "paired": [],
        "seconds": sum(record["seconds"] for record in records.values()),
        "phase_seconds": {phase: record["seconds"] for phase, record in records.items()},
        **provenance(command, jax.device_count()),
    }
    write_durably(folder / "summary.json", json.dumps(summary, indent=1))
    write_report(folder)


def tell(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """What came of it, for the person watching."""
    found, made = records["search"], records["examples"]
    steps = ", ".join(f"{n} × {count}" for n, count in found["plan_steps"].items())
    ends = ", ".join(f"{count} {end}" for end, count in found["ends"].items())
    removed = ", ".join(f"{count} {why}" for why, count in made["removed"].items() if count)
    say(
        f"{found['questions']} questions, {found['nodes']:,} nodes in {found['seconds']:.0f} s"
        f" ({found['tokens_per_second']:,.0f} tokens/s; ends: {ends})"
    )
    if found["plan_steps"]:
        say(f"steps of the plans × how many: {steps}")
    if found["judged"]:
        say(f"{found['right']} of {found['judged']} judged solutions are right")
    say(f"{made['kept']} of {made['solutions']} solutions kept{f'; removed: {removed}' if removed else ''}")
    if made["dataset"]:
        say(f"examples: {folder / 'samples' / made['dataset']}")
    say(f"report: {folder / 'report.html'}")
    say(str(folder))
