"""Tasks with verifiers: questions with gold answers, how they are asked, and who is right."""

from .compact import render
from .pretraining import MINIATURE, held_out, pretraining_examples, pretraining_rows
from .reasoning import family_names
from .settings import FamilySpec, Ingredient
from .suite import Suite, build_suite
from .task import Prompt, Question, Task, majority_answer, reward
from .wording import STOP_STRINGS, demonstrated, extract_answer
from .wording import shots as few_shot

__all__ = [
    "MINIATURE",
    "STOP_STRINGS",
    "FamilySpec",
    "Ingredient",
    "Prompt",
    "Question",
    "Suite",
    "Task",
    "build_suite",
    "demonstrated",
    "extract_answer",
    "family_names",
    "few_shot",
    "held_out",
    "majority_answer",
    "pretraining_examples",
    "pretraining_rows",
    "render",
    "reward",
]
