"""One method of one run, opened for looking at: its rounds, their weights, held-out text, and its model's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from ..evaluate.answer import ask, go_on, is_right
from ..evaluate.faithful import Answer, Begun, GoOn, put, read
from ..evaluate.importance import loss_of
from ..evaluate.texts import Text
from ..generate.settings import Settings
from ..improve.plan import BASE, Phase, plan
from ..improve.session import Session
from ..improve.settings import Improve
from ..log import UserError
from ..models.decoder import Params
from ..resolve import build, nearest, read_yaml
from ..runtime.journal import Journal
from ..runtime.jsonl import Row
from ..runtime.settings import Mesh
from ..tasks import Question
from ..tasks.task import DOMAINS
from .settings import AnalyseOptions

ANSWER_TOKENS = 32
"""An answer that is asked for right after a chain of thought has at most this many tokens."""


@dataclasses.dataclass(frozen=True)
class Round:
    """The models of one round by the names of their phases: what it began with, fine-tuned, ended with."""

    number: int
    start: str
    tuned: str
    end: str
    sample: Phase | None
    """The phase that drew its samples; None where they were drawn afresh at every step of learning."""

    @property
    def merged(self) -> bool:
        return self.end != self.tuned


class Study:
    """What the measures are given.

    `loss` computes as the run does, in its dtype. `notes` collects what a reader must know: fall-backs, what is
    missing and why.
    """

    def __init__(self, session: Session, method: str, rounds: Sequence[Round], options: AnalyseOptions):
        self.session, self.method, self.rounds, self.options = session, method, list(rounds), options
        self.notes: list[str] = []
        self.seed = session.config.seed
        self.config = session.model.config
        self.dtype = session.config.model.dtype
        self.loss = loss_of(self.config, self.dtype)
        self.texts = self._texts()

    def about(self) -> Row:
        """Say what is measured, and on what."""
        return {
            "run": self.session.journal.root.resolve().name,
            "method": self.method,
            "rounds": [r.number for r in self.rounds],
            "layers": self.config.num_hidden_layers,
            "texts": {
                domain: {"questions": len(texts), "tokens": sum(len(t.completion) for t in texts)}
                for domain, texts in self.texts.items()
            },
        }

    # --- weights ---

    @property
    def base(self) -> Params:
        return self.session.weights.get(BASE)

    def weights(self, name: str) -> Params:
        """The weights of a phase, read from disk each time: a study of many rounds holds few of them at once."""
        if name == BASE:
            return self.base
        return self.session.weights.read(self.session.weights.folder(name) / "weights")

    def with_start(self) -> list[Round]:
        """The rounds whose first weights are still there: what a round alone has added is told from these."""
        gone = [r.number for r in self.rounds if not self.has(r.start)]
        note = f"What round {', '.join(map(str, gone))} began with was deleted (keep): its own change is not measured."
        if gone and note not in self.notes:
            self.notes.append(note)
        return [r for r in self.rounds if r.number not in gone]

    def has(self, name: str) -> bool:
        return name == BASE or (self.session.weights.folder(name) / "weights").is_dir()

    def snapshot(self, one: Round) -> Params | None:
        """A checkpoint from the middle of a round's fine-tuning, if it kept one."""
        early = self.session.weights.snapshots(one.tuned)[:-1]
        return self.session.weights.read(early[0]) if early else None

    def ends(self) -> list[tuple[int, str, str]]:
        """(round, name, phase) of the base and of what each round ended with."""
        return [(0, "base", BASE), *((r.number, f"round {r.number}", r.end) for r in self.rounds)]

    # --- questions ---

    def held_out(self, domain: str, count: int) -> list[Question]:
        """Validation questions of a domain, spread evenly over its families; test questions in a run without."""
        suite = self.session.suite
        split = "validation" if suite.questions("validation") else "test"
        pools = [
            [q for q in suite.questions(split) if (q.domain, q.family) == (domain, family)]
            for family in suite.families(domain)  # type: ignore[arg-type]  # a Domain: it came from DOMAINS
        ]
        turns = [q for turn in range(count) for pool in pools for q in pool[turn : turn + 1]]
        return turns[:count]

    def _texts(self) -> dict[str, list[Text]]:
        """Held-out questions with what should follow them, by domain."""
        found: dict[str, list[Text]] = {}
        bare = set()
        for domain in DOMAINS:
            for question in self.held_out(domain, self.options.texts):
                if question.solution is None:
                    bare.add(question.family)
                text = self.session.text_of(question)
                if text is not None:
                    found.setdefault(domain, []).append(text)
        if not found:
            raise UserError(
                f"{self.session.journal.root}: the run has no validation or test question that fits the model;"
                " analyse measures losses on these: give tasks.families validation: N"
            )
        if not self.session.suite.questions("validation"):
            self.notes.append("The run has no validation questions: losses and samples are of test questions.")
        if bare:
            self.notes.append(
                f"{', '.join(sorted(bare))}: no worked solutions, so losses there are of the answers alone."
            )
        return found

    # --- answers ---

    def sample(self, model: str, questions: Sequence[Question], samples: int, title: str) -> list[Row]:
        """Draw and judge samples of a model: {question_id, sample, text, tokens, reason, score}."""
        session = self.session
        block = dataclasses.replace(session.config.block(self.method, "sampling"), samples=samples)
        gather = session.config.mesh.gather_to_decode
        settings = block.settings(dtype=self.dtype, gather=gather, stop=session.stops(block.stop))
        return self._ask(self.weights(model), questions, settings, title)

    def solver(self, model: str, title: str) -> Callable[[Sequence[Question]], Mapping[str, float]]:
        """Return a function from questions to right (1.0) or not, answered greedily as the run evaluates."""
        params = self.weights(model)

        def solve(questions: Sequence[Question]) -> dict[str, float]:
            return is_right(self._ask(params, questions, self.session.greedily, title))

        return solve

    def completions(self, model: str, questions: Sequence[Question], title: str) -> list[Begun]:
        """Greedy completions of a model, as the run evaluates: (question, text)."""
        rows = self._ask(self.weights(model), questions, self.session.greedily, title)
        return [(question, row["text"]) for question, row in zip(questions, rows, strict=True)]

    def reasoner(self, model: str, title: str) -> tuple[Answer, GoOn]:
        """Functions that let a model answer right after a chain of thought, and go on with one, greedily."""
        session, params = self.session, self.weights(model)
        style, shots = session.config.tasks.style, session.config.tasks.few_shot
        key, own = jax.random.fold_in(session.key, 0xA7A1), session.greedily
        brief = dataclasses.replace(own, max_new_tokens=min(own.max_new_tokens, ANSWER_TOKENS))
        named = session.weights.with_params(params)

        def goes_on(begun: Sequence[Begun], settings: Settings = own) -> list[str | None]:
            return go_on(named, session.suite, begun, settings, key, shots=shots, title=title)

        def answer(begun: Sequence[Begun]) -> list[str | None]:
            said = goes_on([(q, put(q, chain, style)) for q, chain in begun], brief)
            return [None if s is None else read(q, s, style) for (q, _), s in zip(begun, said, strict=True)]

        return answer, goes_on

    def _ask(self, params: Params, questions: Sequence[Question], settings: Settings, title: str) -> list[Row]:
        session = self.session
        key, shots = jax.random.fold_in(session.key, 0xA7A1), session.config.tasks.few_shot
        model = session.weights.with_params(params)
        return ask(model, session.suite, questions, settings, key, shots=shots, title=title).rows


def open_study(root: Path, options: AnalyseOptions) -> Study:
    """Open a run's folder, finished or not, for reading.

    Raises:
      UserError: not a run, an unknown method or round, a probe, nothing fine-tuned yet, weights that are gone.
    """
    if not (root / "config.yaml").is_file():
        raise UserError(f"{root}: not the folder of a run (no config.yaml); give what `jaxmerge improve` printed last")
    # Read where this is, not on the mesh of the run.
    config = dataclasses.replace(build(Improve, read_yaml(root / "config.yaml")), mesh=Mesh())
    todo, outcomes = plan(config)
    session = Session(config, Journal(root, read_only=True), todo, outcomes)
    method = chosen_method(config, options.method)
    there, missing = [], []
    for number in range(1, config.rounds + 1):
        own = [p for p in todo.phases if p.round == number and method in (p.method, *p.shared_by)]
        outcome = next(o for o in outcomes if (o.method, o.round) == (method, number) and not o.extra)
        tuned, end = todo[outcome.tuned], outcome.model
        committed = all(session.journal.committed(name) is not None for name in (tuned.name, end))
        if committed and all((session.weights.folder(name) / "weights").is_dir() for name in {tuned.name, end}):
            sample = next((p for p in own if p.kind == "sample"), None)
            there.append(Round(number, tuned.inputs["model"], tuned.name, end, sample))
        elif committed:
            missing.append(number)
    chosen = chosen_rounds(root, options.rounds, there, missing)
    study = Study(session, method, chosen, options)
    if missing and not options.rounds:
        study.notes.append(f"The weights of round {', '.join(map(str, missing))} were deleted (keep={config.keep}).")
    return study


def chosen_method(config: Improve, wanted: str | None) -> str:
    trained = [name for name, method in config.methods.items() if method.probe is None]
    if wanted is None:
        return next((name for name in trained if config.block(name, "merge").rule != "none"), trained[0])
    if wanted in config.methods and wanted not in trained:
        raise UserError(
            f"method={wanted}: a probe trains nothing, so there is nothing to analyse; wanted {', '.join(trained)}"
        )
    if wanted not in trained:
        raise UserError(f"method={wanted}: the run has no such method{nearest(wanted, trained)}")
    return wanted


def chosen_rounds(root: Path, wanted: Sequence[int], there: Sequence[Round], missing: Sequence[int]) -> list[Round]:
    if not there:
        why = f"the weights of round {', '.join(map(str, missing))} were deleted (keep)" if missing else "none is done"
        raise UserError(f"{root}: no round to analyse, {why}; go on with the run, or take one that keeps its weights")
    numbers = [r.number for r in there]
    for number in wanted:
        if number not in numbers:
            raise UserError(f"rounds={list(wanted)}: round {number} is not there; wanted some of {numbers}")
    return [r for r in there if not wanted or r.number in wanted]
