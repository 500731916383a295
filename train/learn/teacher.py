"""The teacher of distillation: another model on the same mesh, and whether its tokens are the student's."""

from __future__ import annotations

import itertools

import jax

from ..log import UserError
from ..models.open import Model, load_source
from ..models.tokenizer import Tokenizer
from .distill import Distill


def open_teacher(distill: Distill | None, student: Model, mesh: jax.sharding.Mesh, *, seed: int) -> Model | None:
    """The model that `distill.teacher` names, laid out as its own sizes want; None where none is named."""
    if distill is None or distill.teacher is None:
        return None
    source = distill.teacher
    teacher = load_source(source, mesh, seed=seed, dtype=source.dtype)
    check_vocabulary(student, teacher, where=f"sft.distill.teacher={source.path or 'random'}")
    return teacher


def check_vocabulary(student: Model, teacher: Model, *, where: str) -> None:
    """Refuse a teacher whose distributions are of other tokens than the student's."""
    found = first_difference(student.tokenizer, teacher.tokenizer)
    if found is not None:
        id, ours, theirs = found
        raise UserError(
            f"{where}: token {id} is {theirs!r:.60} to the teacher and {ours!r:.60} to the student; distributions are "
            "compared token by token: take a teacher with the student's tokenizer"
        )
    wanted = student.tokenizer.vocab_size
    for name, config in (("student", student.config), ("teacher", teacher.config)):
        if config.vocab_size < wanted:
            raise UserError(f"{where}: the {name} has logits of {config.vocab_size} tokens, its tokenizer has {wanted}")


def first_difference(ours: Tokenizer, theirs: Tokenizer) -> tuple[int, str | None, str | None] | None:
    """The smallest token id that means another text, and both texts; None where one has no such token."""
    a, b = ({id: token for token, id in t.backend.get_vocab(with_added_tokens=True).items()} for t in (ours, theirs))
    differing = (id for id in itertools.chain(a, b) if a.get(id) != b.get(id))
    first = min(differing, default=None)
    return None if first is None else (first, a.get(first), b.get(first))
