"""How a model is questioned, as configured: the evaluation of a run, of a file of questions, of the harness."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..generate.settings import Settings
from ..log import UserError
from ..resolve import at_least
from ..runtime.settings import Distributed, Mesh


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Greedy decoding on held-out questions, the same for every method."""

    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    max_new_tokens: int = 64
    slots: int = 64
    batch: int = 256
    """Questions committed to disk at once."""
    stop: tuple[str, ...] = ()
    base: bool = True
    """Whether the original model is evaluated too."""
    samples: int = 0
    """Samples a test question beside the greedy answer, for pass@k with k up to this; 0 draws none."""
    temperature: float = 0.8
    sampled: Literal["last", "all"] = "last"
    """Rounds whose models are sampled from, besides the base."""

    def __post_init__(self):
        at_least(self, "evaluation", max_new_tokens=1, slots=1, batch=1, samples=0)
        if self.samples and self.temperature <= 0:
            raise UserError(f"evaluation.temperature is {self.temperature}: samples would all be the same; above 0")
        if "" in self.stop:
            raise UserError("evaluation.stop holds an empty string; leave it out")

    def settings(self, *, dtype: str, gather: bool, stop: tuple[str, ...]) -> Settings:
        """Greedy decoding of a model of a precision and a mesh."""
        return Settings(max_new_tokens=self.max_new_tokens, stop=stop, slots=self.slots, dtype=dtype, gather=gather)

    def sampling(self, settings: Settings) -> Settings:
        """Greedy settings turned into those of the samples for pass@k."""
        return dataclasses.replace(settings, samples=self.samples, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """Keys of `jaxmerge evaluate MODEL FILE.jsonl`."""

    task: Literal["gsm8k", "choice", "problem", "mbpp"] | None = None
    """How answers are judged; null tells it by the keys of the lines."""
    limit: int | None = None
    """Questions, from the beginning of the file; null takes all."""
    prompt: Literal["chat", "cot"] = "chat"
    """gsm8k: in words through the chat template, or after the eight worked examples of Wei et al."""
    extract: Literal["flexible", "strict"] = "flexible"
    """gsm8k: the last number, or the one after `####` or `The answer is`."""
    split: str = "train"
    """Of a TFDS version in place of a file."""
    samples: int = 0
    """Samples a question beside the greedy answer, for pass@k with k up to this."""
    temperature: float = 0.8
    """Of these samples."""
    seed: int = 0
    max_new_tokens: int = 512
    slots: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        at_least(self, "evaluate", max_new_tokens=1, slots=1, samples=0, temperature=1e-6)
        if self.limit is not None:
            at_least(self, "evaluate", limit=1)


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """Keys of `jaxmerge harness MODEL TASKS`."""

    include: str | None = None
    """A folder with tasks as YAML files."""
    num_fewshot: int | None = None
    limit: float | None = None
    """Documents of a task, or their share below 1; null takes all."""
    chat: bool = False
    """Put prompts through the chat template."""
    slots: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        at_least(self, "harness", slots=1)
