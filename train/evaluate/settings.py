"""How a model is questioned, as configured: the evaluation of a run, of a file of questions, of the harness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from ..data.hub import is_hub
from ..generate.decodings import Alone, Decode
from ..generate.settings import COLDEST, Settings
from ..log import UserError
from ..resolve import at_least
from ..runtime.settings import Distributed, Mesh


def is_questions(name: str) -> bool:
    """Whether a name is of questions (a file, a TFDS version, a dataset of the hub, humaneval), and not of a config."""
    if name == "humaneval" or is_hub(name):
        return True
    return Path(name).suffix in (".jsonl", ".json") or Path(name).is_dir()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Greedy decoding on held-out questions, the same for every method."""

    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    """The questions of these splits are asked."""
    max_new_tokens: int = 64
    """An answer ends after this many tokens."""
    slots: int = 64
    """This many answers are decoded side by side; no result depends on it."""
    batch: int = 256
    """The answers to this many questions are committed to disk together."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these strings; a special token may be one of them."""
    base: bool = True
    """The original model is evaluated too."""
    samples: int = 0
    """This many samples of each test question are drawn beside the greedy answer, for pass@k, maj@k and rank@k with k
    up to this; 0 draws none."""
    temperature: float = 0.8
    """The logits of these samples are divided by it."""
    sampled: Literal["last", "all"] = "last"
    """Samples are drawn from the base, and from the models of the last round (last) or of all rounds (all)."""

    def __post_init__(self):
        at_least(self, "evaluation", max_new_tokens=1, slots=1, batch=1, samples=0)
        if self.samples and self.temperature < COLDEST:
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
    """Answers are judged as for this task; null tells it by the keys of the lines."""
    limit: int | None = None
    """This many questions are asked, from the beginning of the file; null takes all."""
    prompt: Literal["chat", "cot"] = "chat"
    """gsm8k: questions are put in words through the chat template (chat), or after the eight worked examples of Wei et
    al. (cot)."""
    extract: Literal["flexible", "strict"] = "flexible"
    """gsm8k: the answer is the last number (flexible), or the one after the last `####` or `The answer is`
    (strict)."""
    split: str = "train"
    """This split of a TFDS version or of a dataset on the hub is asked."""
    samples: int = 0
    """This many samples of each question are drawn beside the greedy answer, for pass@k, maj@k and rank@k with k up to
    this; 0 draws none."""
    temperature: float = 0.8
    """The logits of these samples are divided by it."""
    seed: int = 0
    """The samples are drawn with this seed."""
    max_new_tokens: int = 512
    """An answer ends after this many tokens."""
    slots: int = 64
    """This many answers are decoded side by side; no result depends on it."""
    decode: Decode = dataclasses.field(default=Alone())
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Every matmul takes its operands in this precision."""
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
    """Tasks are also looked for as YAML files in this folder."""
    num_fewshot: int | None = None
    """This many worked examples stand before each question; null leaves it to the task."""
    limit: float | None = None
    """This many documents of a task are taken, or this share of them below 1; null takes all."""
    chat: bool = False
    """Prompts are put through the chat template."""
    slots: int = 64
    """This many sequences are decoded side by side; no result depends on it."""
    decode: Decode = dataclasses.field(default=Alone())
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Every matmul takes its operands in this precision."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        at_least(self, "harness", slots=1)
