"""One run in one process: the model, the questions, the journal, and what phases share.

What a phase needs from earlier ones is in memory if this process made it, else read back from the run folder.
Weights go from phase to phase as arrays on the mesh; Orbax keeps a copy for the next start.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmerge

from . import evaluate, probes, round
from .analysis.texts import Text
from .config import Improve
from .data.versions import read_version
from .generate.rollout import Sample, Settings, batched, rollout
from .log import UserError, progress
from .models.decoder import Params, shapes
from .models.open import Model, load_source
from .plan import BASE, Outcome, Phase, Plan
from .runtime import checkpoint
from .runtime.journal import Journal
from .runtime.jsonl import read_jsonl, write_jsonl
from .runtime.mesh import make_mesh, shardings
from .runtime.processes import on_first
from .runtime.stop import check
from .tasks import STOP_STRINGS, Question, Suite, build_suite
from .tasks.task import Split

Row = dict[str, Any]


class Run:
    """One run in one process: the model, the questions, and the phases that work on them."""

    def __init__(
        self, config: Improve, journal: Journal, todo: Plan, outcomes: Sequence[Outcome], *, name="", command=""
    ):
        self.config, self.journal, self.todo, self.outcomes = config, journal, todo, outcomes
        self.name, self.command = name, command
        self.mesh = make_mesh(config.mesh)
        self.suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
        check_questions(self.suite, journal)
        self.key = jax.random.key(config.seed)
        self.loaded: Model | None = None
        self.held: dict[str, Params] = {}

    # --- models ---

    @property
    def model(self) -> Model:
        """The base model, loaded when first needed, and checked to be the one the run began with."""
        if self.loaded is None:
            self.loaded = load_source(self.config.model, self.mesh, seed=self.config.seed)
            record = self.journal.committed(f"{BASE}/load")
            found = checkpoint.digest(self.loaded.params)
            if record is not None and record["digest"] != found:
                raise UserError(
                    f"{self.config.model.path or 'model.random'}: the weights changed since this run began "
                    f"(digest {found[:12]}…, then {record['digest'][:12]}…); restore them or choose another folder "
                    "with out=DIR"
                )
            trained = [name for name, method in self.config.methods.items() if method.probe is None]
            if any(self.config.block(name, "merge").offload for name in trained):
                self.loaded = dataclasses.replace(self.loaded, params=jaxmerge.offload(self.loaded.params))
        return self.loaded

    def checkpoints(self, name: str) -> Path:
        return self.journal.root / "checkpoints" / name

    def made_by(self, phase: Phase) -> Path | None:
        """What a phase leaves on disk for later ones, beside its own folder."""
        if phase.kind in ("sft", "merge"):
            return self.checkpoints(phase.name) / "weights"
        if phase.kind == "select":
            return self.journal.root.joinpath("samples", *dataset_of(phase))
        return None

    def weights(self, name: str) -> Params:
        """The weights a phase made: held, read from its checkpoint, or (probes) made again from its inputs."""
        if name == BASE:
            return jaxmerge.onload(self.model.params)
        if name not in self.held:
            phase = self.todo[name]
            if phase.kind == "probe":
                self.held[name], _ = probes.made(self, phase)
            else:
                self.held[name] = self.read_weights(self.checkpoints(name) / "weights")
        return self.held[name]

    def read_weights(self, path: Path) -> Params:
        like = shapes(self.model.config)
        return checkpoint.load_weights(path, checkpoint.abstract(like, shardings(self.mesh, like)))

    def keep_weights(self, phase: Phase, params: Params) -> Row:
        """Put weights on disk and in memory; what the record says of them."""
        checkpoint.save_weights(self.checkpoints(phase.name) / "weights", params)
        self.held[phase.name] = params
        return {"digest": checkpoint.digest(params), "change": round.change(params, self.weights(BASE))}

    def snapshots(self, name: str) -> list[Path]:
        """The snapshots of a fine-tuning run in the order of their steps; the last one is its result."""
        home = self.checkpoints(name)
        early = sorted((home / "snapshots").glob("[0-9]*"), key=lambda p: int(p.name))
        return [*early, home / "weights"]

    # --- questions and answers ---

    def generate(
        self,
        model: str,
        questions: Sequence[Question],
        settings: Settings,
        key,
        folder: Path,
        *,
        batch: int,
        title: str,
    ) -> tuple[list[Row], int, float]:
        """Completions of every question, committed a batch at a time to `folder`.

        Returns (rows, tokens generated since this start, seconds spent on them).
        """
        prompts = round.prompts(self.suite, self.model.tokenizer, questions, self.config.tasks.few_shot)
        groups = list(batched(prompts, batch))
        paths = [folder / f"batch-{i:04d}.jsonl" for i in range(len(groups))]
        there = on_first(lambda: [path.exists() for path in paths])
        done = sum(len(group) for group, is_there in zip(groups, there, strict=True) if is_there) * settings.samples
        start, tokens = time.perf_counter(), 0
        with progress(title, total=len(prompts) * settings.samples, unit="samples", done=done) as bar:
            for group, path, is_there in zip(groups, paths, there, strict=True):
                if is_there:
                    continue
                samples = rollout(
                    self.model.config,
                    self.weights(model),
                    self.model.tokenizer,
                    group,
                    settings,
                    key,
                    on_sample=lambda tokens: bar.advance(1),
                    between=check,
                )
                on_first(write_jsonl, path, [sample_row(s) for s in samples])
                tokens += sum(len(s.tokens) for s in samples)
        return [row for path in paths for row in read_jsonl(path)], tokens, time.perf_counter() - start

    def worked(self, split: Split) -> list[Text]:
        """The questions of a split with their worked solutions, or their answers where a family has none."""
        texts = (self.text_of(question) for question in self.suite.questions(split))
        return [text for text in texts if text is not None]

    def text_of(self, question: Question) -> Text | None:
        """A question with its worked solution, or its answer; None where the model has no room for both."""
        tokenizer = self.model.tokenizer
        prompt = round.prompt_tokens(self.suite, tokenizer, question, self.config.tasks.few_shot)
        completion = [*tokenizer.encode(question.solution or question.answer), tokenizer.eos_ids[0]]
        fits = len(prompt) + len(completion) <= self.model.config.max_position_embeddings
        return Text(tuple(prompt), tuple(completion)) if fits else None

    def stops(self, own: tuple[str, ...]) -> tuple[str, ...]:
        """Stop strings of a block, and where a model shown worked examples goes on to the next question."""
        return own + (STOP_STRINGS if self.config.tasks.few_shot else ())

    def evaluated_by(self, *, samples: int = 1, temperature: float = 0.0) -> Settings:
        """How evaluations decode: greedily unless told otherwise."""
        config = self.config.evaluation
        return Settings(
            samples=samples,
            temperature=temperature,
            max_new_tokens=config.max_new_tokens,
            stop=self.stops(config.stop),
            slots=config.slots,
            dtype=self.config.model.dtype,
            gather=self.config.mesh.gather_to_decode,
        )

    def answer(self, model: str, questions: Sequence[Question], folder: Path, title: str):
        """Greedy answers, judged: ({question id: 1.0 or 0.0}, seconds); what cannot be judged counts as wrong."""
        rows, _, seconds = self.generate(
            model, questions, self.evaluated_by(), self.key, folder, batch=self.config.evaluation.batch, title=title
        )
        scored = round.verify(self.suite, {q.id: q for q in questions}, rows)
        return {row["question_id"]: float(row["score"] == 1.0) for row in scored}, seconds

    def successes(self, model: str, questions: Sequence[Question], folder: Path, title: str) -> dict[str, int]:
        """How many of `evaluation.samples` samples of each question are right."""
        config = self.config.evaluation
        settings = self.evaluated_by(samples=config.samples, temperature=config.temperature)
        on_first(folder.mkdir, exist_ok=True)
        key = jax.random.fold_in(self.key, np.uint32(evaluate.SAMPLED))
        rows, _, _ = self.generate(model, questions, settings, key, folder, batch=config.batch, title=title)
        right = dict.fromkeys((q.id for q in questions), 0)
        for row in round.verify(self.suite, {q.id: q for q in questions}, rows):
            right[row["question_id"]] += row["score"] == 1.0
        return right

    def validate(self, model: str, folder: Path, title: str) -> float:
        """Mean over the domains of the accuracy on validation questions: what searches maximise."""
        questions = self.suite.questions("validation")
        if not questions:
            raise UserError(f"{title}: a search needs validation questions; give tasks.families validation: N")
        on_first(folder.mkdir, exist_ok=True)
        scores, _ = self.answer(model, questions, folder, title)
        table = evaluate.rows(questions, scores, method="", round=0, seconds=0.0)
        pooled = [row["accuracy"] for row in table if row["family"] == "all"]
        return sum(pooled) / len(pooled)

    # --- what committed phases left ---

    def scores(self, name: str) -> dict[str, float]:
        """Right or wrong, question by question, of a committed evaluation."""
        return {r["question_id"]: r["score"] for r in read_jsonl(self.journal.committed_folder(name) / "scores.jsonl")}

    def digest(self, model: str) -> str:
        record = self.journal.committed(f"{BASE}/load" if model == BASE else model)
        assert record is not None, f"{model} is read before it is committed"
        return record["digest"]

    def read_examples(self, phase: Phase) -> list[Row]:
        return read_version(self.journal.root / "samples", *dataset_of(phase))[0]


def check_questions(suite: Suite, journal: Journal) -> None:
    """Refuse to go on with other questions than the run began with: some models would be judged by other answers.

    A run begun before these were kept passes.
    """
    record = journal.committed(f"{BASE}/load") or {}
    then, now = record.get("questions"), suite.digests()
    changed = [family for family in now if then is not None and then.get(family) != now[family]]
    if changed:
        paths = {str(s.args["path"]) for s in suite.specs if s.family in changed and "path" in s.args}
        files = f" ({', '.join(sorted(paths))})" if paths else ""
        raise UserError(
            f"{journal.root}: the questions, answers or solutions of {', '.join(changed)}{files} changed since this "
            "run began; restore them or choose another folder with out=DIR"
        )


def sample_row(sample: Sample) -> Row:
    return {
        "question_id": sample.prompt_id,
        "sample": sample.index,
        "text": sample.text,
        "tokens": list(sample.tokens),
        "reason": sample.reason,
    }


def dataset_of(phase: Phase) -> tuple[str, str]:
    """TFDS name and version of the examples a select phase writes: a dataset a method, a version a round."""
    return phase.method.replace("-", "_").lower(), f"{phase.round}.0.0"
