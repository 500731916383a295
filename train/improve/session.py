"""One start of a run in one process: the configuration, the weights, the questions, the journal.

Phases are given a `Session` and ask it for what they share. What a phase needs from earlier ones is in memory if
this process made it, and is read back from the run's folder if an earlier one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ..data.versions import read_version
from ..evaluate import accuracy
from ..evaluate.answer import Answers, ask, is_right, join_completion
from ..evaluate.diversity import Answered
from ..evaluate.rerank import drawn
from ..evaluate.texts import Text
from ..generate.settings import Settings
from ..learn.distill import Distill
from ..learn.teacher import open_teacher
from ..log import UserError
from ..models.open import Model
from ..models.settings import Source
from ..runtime.journal import Journal
from ..runtime.jsonl import Row, read_jsonl
from ..runtime.mesh import make_mesh
from ..runtime.processes import on_first
from ..tasks import STOP_STRINGS, Question, Suite, build_suite
from ..tasks.task import Split
from .plan import BASE, Outcome, Phase, Plan
from .settings import Improve
from .weights import Weights


class Session:
    """What the phases of a run share, in one process, from its start to its end."""

    def __init__(
        self, config: Improve, journal: Journal, todo: Plan, outcomes: Sequence[Outcome], *, name="", command=""
    ):
        self.config, self.journal, self.todo, self.outcomes = config, journal, todo, outcomes
        self.name, self.command = name, command
        self.mesh = make_mesh(config.mesh)
        self.weights = Weights(config, journal, todo, self.mesh)
        self.suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
        check_questions(self.suite, journal)
        self.key = jax.random.key(config.seed)
        self._teacher: tuple[Source, Model] | None = None

    @property
    def model(self) -> Model:
        """The base model."""
        return self.weights.model

    def output_of(self, phase: Phase) -> Path | None:
        """What a phase leaves on disk for later ones, beside its own folder."""
        if phase.keeps_weights:
            return self.weights.folder(phase.name) / "weights"
        if phase.kind in ("select", "part"):
            return self.journal.root.joinpath("samples", *dataset_of(phase))
        return None

    def teacher_of(self, distill: Distill | None) -> Model | None:
        """The model that distillation names, read once in this process; None where the student's average teaches."""
        source = distill and distill.teacher
        if source is None:
            return None
        if self._teacher is None or self._teacher[0] != source:
            found = open_teacher(distill, self.model, self.mesh, seed=self.config.seed)
            assert found is not None
            self._teacher = source, found
        return self._teacher[1]

    # --- questions ---

    def worked(self, split: Split) -> list[Text]:
        """The questions of a split with their worked solutions, or their answers where a family has none."""
        texts = (self.text_of(question) for question in self.suite.questions(split))
        return [text for text in texts if text is not None]

    def text_of(self, question: Question) -> Text | None:
        """A question with its worked solution, or its answer; None where the model has no room for both."""
        tokenizer = self.model.tokenizer
        said, shots = question.solution or question.answer, self.config.tasks.few_shot
        prompt, completion = join_completion(self.suite, tokenizer, question, said, shots)
        completion = tokenizer.close(completion)
        fits = len(prompt) + len(completion) <= self.model.config.max_position_embeddings
        return Text(tuple(prompt), tuple(completion)) if fits else None

    def stops(self, own: tuple[str, ...]) -> tuple[str, ...]:
        """Stop strings of a block, and where a model shown worked examples goes on to the next question."""
        return own + (STOP_STRINGS if self.config.tasks.few_shot else ())

    # --- answers ---

    @property
    def greedily(self) -> Settings:
        """How evaluations decode."""
        block, mesh = self.config.evaluation, self.config.mesh
        return block.settings(dtype=self.config.model.dtype, gather=mesh.gather_to_decode, stop=self.stops(block.stop))

    def answer(
        self, model: Model, questions: Sequence[Question], folder: Path, title: str, *, demonstrate: bool = False
    ) -> Answers:
        """Answer greedily, and judge: one row a question; demonstrate: each shown its own worked solution."""
        return ask(
            model, self.suite, questions, self.greedily, self.key,
            shots=self.config.tasks.few_shot, batch=self.config.evaluation.batch, folder=folder, title=title,
            demonstrate=demonstrate,
        )  # fmt: skip

    def drawn(self, model: Model, questions: Sequence[Question], folder: Path, title: str) -> dict[str, Answered]:
        """`evaluation.samples` samples of each question, judged."""
        block = self.config.evaluation
        on_first(folder.mkdir, exist_ok=True)
        key = jax.random.fold_in(self.key, np.uint32(accuracy.SAMPLED))
        answers = ask(
            model, self.suite, questions, block.sampling(self.greedily), key,
            shots=self.config.tasks.few_shot, batch=block.batch, folder=folder, title=title,
        )  # fmt: skip
        return drawn(self.suite, questions, answers.rows)

    def validate(self, model: Model, folder: Path, title: str) -> float:
        """Mean over the domains of the accuracy on validation questions: what searches maximise."""
        questions = self.suite.questions("validation")
        if not questions:
            raise UserError(f"{title}: a search needs validation questions; give tasks.families validation: N")
        on_first(folder.mkdir, exist_ok=True)
        scores = is_right(self.answer(model, questions, folder, title).rows)
        table = accuracy.rows(questions, scores, method="", number=0, seconds=0.0)
        pooled = [row["accuracy"] for row in table if row["family"] == "all"]
        return sum(pooled) / len(pooled)

    # --- what committed phases left ---

    def scores(self, name: str) -> dict[str, float]:
        """Right or wrong, question by question, of a committed evaluation."""
        return {r["question_id"]: r["score"] for r in read_jsonl(self.journal.committed_folder(name) / "scores.jsonl")}

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


def dataset_of(phase: Phase) -> tuple[str, str]:
    """TFDS name and version of the examples a phase writes: a dataset a method, a version a round or a part of it."""
    part = phase.settings["part"] if phase.kind == "part" else 0
    return phase.method.replace("-", "_").lower(), f"{phase.round}.0.{part}"
