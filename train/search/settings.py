"""What `jaxmerge search` is configured by; each default and each invariant in one place."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..generate.settings import check_top_p
from ..log import UserError
from ..models.settings import Source
from ..resolve import at_least
from ..runtime.settings import Distributed, Mesh
from ..tasks.settings import FamilySpec
from .ask import ROLES

Kind = Literal["mcts", "tot", "cot", "dart"]
Domain = Literal["code", "mathematics"]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A look further than the critic: steps proposed from the best new child, and what the best of them scores."""

    steps: int = 0
    """0 switches it off (the release does 1, the paper's figure none)."""
    proposals: int = 2
    mixing: float = 0.5
    """a: V ← (1 − a)·V + a·best."""

    def __post_init__(self):
        at_least(self, "search.rollout", steps=0, proposals=1)
        if not 0 <= self.mixing <= 1:
            raise UserError(f"search.rollout.mixing is {self.mixing}; it must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Dart:
    """How many solutions of each question are drawn, by difficulty (Tong et al. 2024, https://arxiv.org/abs/2407.13690)."""

    mode: Literal["uniform", "prop2diff"] = "uniform"
    """uniform: until `right` are right. prop2diff: until ⌈right × share of the first `samples` that are wrong⌉ are."""
    right: int = 4
    samples: int = 8
    """Drawn at once."""
    most: int = 64
    """Where a question is given up."""

    def __post_init__(self):
        at_least(self, "search.dart", right=1, samples=1, most=self.samples)


@dataclasses.dataclass(frozen=True)
class Search:
    """How solutions of one question are looked for."""

    kind: Kind = "mcts"
    """mcts: SRA-MCTS. tot: Tree of Thoughts, breadth first. cot: chains. dart: chains until enough are right."""
    iterations: int = 16
    """Nodes expanded in a tree (mcts). The release's 2 cannot make a plan of three steps."""
    children: int = 3
    """Steps proposed at each node."""
    depth: int = 8
    """Steps of the longest plan."""
    leaves: int = 1
    """Leaves of a tree expanded side by side (mcts); changes the search, as all else here, unlike `sampling.slots`."""
    exploration: float = 0.05
    """c of the upper bound; 0.05 on [0, 1] is the release's 0.5 on its scale of 10."""
    bonus: float = 0.0
    """Of children without visits. The release's 0.8 expands every sibling before any child of one."""
    gate: float = 0.88
    """A value that ends the search."""
    retries: int = 3
    """Of a reply that cannot be used: an empty or repeated step, a critic without a score."""
    diverse: bool = True
    """Show the policy the steps that stand beside the one it is to propose."""
    reflect: bool = True
    """Ask the reflector for a hint before a node is expanded (mcts)."""
    beam: int = 3
    """Plans kept at each depth (tot)."""
    samples: int = 1
    """Chains of a question (cot); texts written from each plan (mcts, tot)."""
    rollout: Rollout = Rollout()
    dart: Dart = Dart()

    def __post_init__(self):
        at_least(
            self, "search", iterations=1, children=1, depth=1, leaves=1, retries=0, beam=1, samples=1,
            exploration=0, bonus=0,
        )  # fmt: skip
        if self.gate <= 0:
            raise UserError(f"search.gate is {self.gate}; a value in (0, 1] ends a search, above 1 none does")

    @property
    def reflects(self) -> bool:
        """Whether hints are asked for: mcts alone does."""
        return self.kind == "mcts" and self.reflect


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is searched: a file, or families of problems."""

    path: str = ""
    """JSON lines with `question` (or `problem`, `prompt`), optionally `id` and `answer`."""
    families: tuple[FamilySpec, ...] = ()
    """Instead of `path`: their training questions, with their verifiers."""
    domain: Domain = "mathematics"
    """Which prompts are put: plans and programs, or steps and answers."""
    limit: int | None = None
    """Questions taken, from the first."""
    seed: int = 0
    """Of the draw from `families`."""

    def __post_init__(self):
        if bool(self.path) == bool(self.families):
            raise UserError("questions: give either questions.path or questions.families, not both and not neither")
        if self.limit is not None:
            at_least(self, "questions", limit=1)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How texts are drawn, and how long each kind may be, in tokens."""

    temperature: float = 0.7
    top_k: int = 0
    """0 takes all."""
    top_p: float = 1.0
    step: int = 96
    """Most tokens of a step."""
    hint: int = 64
    """Of a reflection."""
    score: int = 16
    """Of the critic's reply."""
    chain: int = 384
    """Of a chain of thought in one piece."""
    write: int = 384
    """Of what a plan is turned into."""
    slots: int = 64
    """Sequences decoded side by side; no result depends on it."""
    kept: int = 4
    """Prompts kept in memory for each slot, for later ones that begin alike; 0: none, else at least 2."""

    def __post_init__(self):
        at_least(
            self, "sampling", temperature=1e-6, top_k=0, step=1, hint=1, score=1, chain=1, write=1, slots=1, kept=0
        )
        check_top_p(self.top_p, "sampling")


@dataclasses.dataclass(frozen=True)
class Role:
    """Who plays a role other than the policy."""

    model: Source | None = None
    """null is the run's model."""
    temperature: float | None = None
    """null is that of `sampling`."""

    def __post_init__(self):
        if self.temperature is not None:
            at_least(self, "roles", temperature=1e-6)


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which found solutions become training examples, in the order in which they are asked."""

    words: int | None = None
    """Plans with fewer words are dropped; null: 20 for code, 0 for mathematics."""
    tests: bool = True
    """Keep what passes its tests or has the right answer, where the question says which; else all."""
    value: float = 0.0
    """Plans with a lower value are dropped."""
    per_question: int | None = None
    """At most this many solutions of a question; null keeps all."""

    def __post_init__(self):
        if self.words is not None:
            at_least(self, "filters", words=0)
        if self.per_question is not None:
            at_least(self, "filters", per_question=1)


@dataclasses.dataclass(frozen=True)
class SearchRun:
    """`jaxmerge search`: a tree (or chains) for every question, and the examples made of the best."""

    model: Source
    questions: Questions
    search: Search = Search()
    sampling: Drawing = Drawing()
    roles: dict[str, Role] = dataclasses.field(default_factory=dict)
    """critic, reflector, and policy (its temperature)."""
    filters: Filters = Filters()
    prompts: str | None = None
    """A file in place of the one that is installed (train/search/prompts.yaml)."""
    seed: int = 0
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        unknown = [name for name in self.roles if name not in ROLES]
        if unknown:
            raise UserError(f"roles.{unknown[0]}: no such role; there are {', '.join(ROLES)}")
        policy = self.roles.get("policy")
        if policy is not None and policy.model is not None:
            raise UserError("roles.policy.model: the policy is the run's own model; set model.path")

    @property
    def words(self) -> int:
        """The least words of a plan."""
        if self.filters.words is not None:
            return self.filters.words
        return 20 if self.questions.domain == "code" else 0
