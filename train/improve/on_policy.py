"""The phase that learns from fresh samples: questions and verdicts in, tuned weights out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluate.answer import prompts
from ..generate.rollout import Sample
from ..learn.checkpoints import SftCheckpoints
from ..learn.on_policy import Questions, learn_on_policy
from ..learn.on_policy_distill import check_shown
from ..log import say
from ..resolve import to_dict
from ..runtime import stop
from ..runtime.jsonl import Row
from ..runtime.sinks import follow
from ..tasks import Question
from .gate import check_passed
from .plan import BASE, Phase
from .session import Session
from .settings import Learning


def policy(session: Session, phase: Phase, folder: Path) -> Row:
    settings: Learning = phase.settings
    config, improver = settings.sft, settings.improver
    check_passed(session.journal.committed(phase.inputs.get("gate", "")), phase.name, improver.gate)
    asked = session.suite.questions("train", domain="id")
    student, teacher = session.weights.model_of(phase.inputs["model"]), session.teacher_of(config.distill)
    questions = questions_of(session, asked, demonstrate=settings.demonstrates)
    check_shown(questions.shown, (teacher or student).config.max_position_embeddings, settings.sampling.max_new_tokens)
    home = session.weights.folder(phase.name)
    about = {"folder": session.journal.root, "name": phase.name, "config": to_dict(session.config)}
    drawing = settings.sampling.settings(
        dtype=session.config.model.dtype,
        gather=session.config.mesh.gather_to_decode,
        stop=session.stops(settings.sampling.stop),
    )
    total = config.stay.last(improver.steps)
    with follow(folder / "steps.jsonl", config.watch.sinks, **about, total=total) as on_step:
        params, log = learn_on_policy(
            student,
            questions,
            lambda samples: verdicts(session, asked, samples),
            improver,
            drawing,
            config,
            mesh=session.mesh,
            seed=session.config.seed * 1000 + phase.round,
            dtype=session.config.model.dtype,
            anchor=session.weights.get(BASE) if config.stay.penalised else None,
            teacher=teacher,
            checkpoints=SftCheckpoints(home / "state", home / "snapshots"),
            on_step=on_step,
            asked_to_stop=stop.asked,
        )
    if failures := session.suite.describe_unjudged():
        say(f"{phase.name}: some samples could not be judged and are not learnt from: {failures}")
    thin = max(1, len(log) // 200)
    tenth = max(1, len(log) // 10)
    return {
        "improver": improver.name,
        "steps": len(log),
        "questions": len(asked),
        "samples": int(sum(m["samples"] for m in log)),
        "tokens": int(sum(m["targets"] for m in log)),
        "learning_rate": config.learning_rate,
        "loss": [[m["step"], m["loss"]] for m in log[::thin]],
        "reward": [[m["step"], m["reward"]] for m in log[::thin]],
        "reward_first": sum(m["reward"] for m in log[:tenth]) / tenth,
        "reward_last": sum(m["reward"] for m in log[-tenth:]) / tenth,
        "samples_per_second": sum(m["samples"] for m in log) / sum(m["seconds"] for m in log),
        **session.weights.keep(phase, params),
    }


def questions_of(session: Session, asked: Sequence[Question], *, demonstrate: bool) -> Questions:
    """The prompts of questions, their families, their worked solutions, and what a teacher is shown."""
    tokenizer, shots = session.model.tokenizer, session.config.tasks.few_shot
    solutions = [session.text_of(q) if q.solution else None for q in asked]
    shown = prompts(session.suite, tokenizer, asked, shots, demonstrate=True) if demonstrate else []
    return Questions(
        prompts(session.suite, tokenizer, asked, shots),
        [q.family for q in asked],
        [None if text is None else text.completion for text in solutions],
        [prompt.tokens for prompt in shown],
    )


def verdicts(session: Session, asked: Sequence[Question], samples: Sequence[Sample]) -> list[float | None]:
    """The score of each sample; one that was cut short is judged as it stands."""
    by_id = {q.id: q for q in asked}
    return [session.suite.verify(by_id[sample.prompt_id], sample.text) for sample in samples]
