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
    """A rollout looks this many steps further; 0 switches it off (the paper's code takes 1 step, its figure none)."""
    proposals: int = 2
    """This many continuations are proposed at each step of a rollout."""
    mixing: float = 0.5
    """The child's value V becomes (1 − a)·V + a·best with this a, where best is the best value that the rollout
    found."""

    def __post_init__(self):
        at_least(self, "search.rollout", steps=0, proposals=1)
        if not 0 <= self.mixing <= 1:
            raise UserError(f"search.rollout.mixing is {self.mixing}; it must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Dart:
    """How many solutions of each question are drawn, by difficulty (Tong et al. 2024, https://arxiv.org/abs/2407.13690)."""

    mode: Literal["uniform", "prop2diff"] = "uniform"
    """uniform: chains are drawn until `right` are right. prop2diff: until ⌈right × share of the first `samples` that
    are wrong⌉ are right."""
    right: int = 4
    """This many right solutions of a question are wanted."""
    samples: int = 8
    """This many chains are drawn at once."""
    most: int = 64
    """A question is given up after this many chains."""

    def __post_init__(self):
        at_least(self, "search.dart", right=1, samples=1, most=self.samples)


@dataclasses.dataclass(frozen=True)
class Search:
    """How solutions of one question are looked for."""

    kind: Kind = "mcts"
    """Solutions are looked for in this way. mcts: SRA-MCTS. tot: Tree of Thoughts, breadth first. cot: chains of
    thought. dart: chains until enough are right."""
    iterations: int = 16
    """mcts: this many nodes of a tree are expanded. The paper's code takes 2, which cannot make a plan of three
    steps."""
    children: int = 3
    """This many steps are proposed at each node."""
    depth: int = 8
    """The longest plan has this many steps."""
    leaves: int = 1
    """mcts: this many leaves of a tree are expanded at the same time. Other numbers give other trees, while
    `sampling.slots` changes only the speed."""
    exploration: float = 0.05
    """mcts: the upper bound has this c; 0.05 on values in [0, 1] is the 0.5 of the paper's code on its scale of 10."""
    bonus: float = 0.0
    """mcts: it is added to the value of a child that was never visited. The paper's code uses 0.8, which tries all
    siblings before it goes deeper."""
    gate: float = 0.88
    """A plan whose value reaches this ends the search; a gate above 1 never does."""
    retries: int = 3
    """A reply that cannot be used (an empty or repeated step, a critic without a score) is asked for again this many
    times."""
    diverse: bool = True
    """The policy is shown the steps that stand beside the one it is to propose."""
    reflect: bool = True
    """mcts: the reflector is asked for a hint before a node is expanded."""
    beam: int = 3
    """tot: this many plans are kept at each depth."""
    samples: int = 1
    """cot: this many chains of a question are drawn. mcts, tot: this many texts are written from each plan."""
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
    """Questions are read from this file of JSON lines or this dataset of the hub, with `question` (or `problem`,
    `prompt`), optionally `id` and `answer`."""
    families: tuple[FamilySpec, ...] = ()
    """The training questions of these families are taken instead of a file, with their verifiers."""
    domain: Domain = "mathematics"
    """Prompts of this domain are put: plans and programs (code), or steps and answers (mathematics)."""
    limit: int | None = None
    """This many questions are taken, from the first; null takes all."""
    seed: int = 0
    """Questions of `families` are drawn with this seed."""

    def __post_init__(self):
        if bool(self.path) == bool(self.families):
            raise UserError("questions: give either questions.path or questions.families, not both and not neither")
        if self.limit is not None:
            at_least(self, "questions", limit=1)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How texts are drawn, and how long each kind may be, in tokens."""

    temperature: float = 0.7
    """Logits are divided by it."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn from; 0 takes all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities reach this sum are drawn from; 1 takes all."""
    step: int = 96
    """A step of a plan has at most this many tokens."""
    hint: int = 64
    """A hint of the reflector has at most this many tokens."""
    score: int = 16
    """A reply of the critic has at most this many tokens."""
    chain: int = 384
    """A chain of thought has at most this many tokens."""
    write: int = 384
    """A text that is written from a plan has at most this many tokens."""
    slots: int = 64
    """This many sequences are decoded side by side; no result depends on it."""
    kept: int = 4
    """This many prompts are kept in memory for each slot, for later ones that begin alike; 0 keeps none, and otherwise
    at least 2 are needed."""

    def __post_init__(self):
        at_least(
            self, "sampling", temperature=1e-6, top_k=0, step=1, hint=1, score=1, chain=1, write=1, slots=1, kept=0
        )
        check_top_p(self.top_p, "sampling")


@dataclasses.dataclass(frozen=True)
class Role:
    """Who plays a role other than the policy."""

    model: Source | None = None
    """This model plays the role; null is the run's model."""
    temperature: float | None = None
    """The role's texts are drawn at this temperature; null takes that of `sampling`."""

    def __post_init__(self):
        if self.temperature is not None:
            at_least(self, "roles", temperature=1e-6)


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which found solutions become training examples, in the order in which they are asked."""

    words: int | None = None
    """Plans with fewer words are dropped; null means 20 for code, 0 for mathematics."""
    tests: bool = True
    """A solution is kept if it passes its tests or has the right answer, where the question says which; all others are
    kept."""
    value: float = 0.0
    """Plans with a lower value are dropped."""
    per_question: int | None = None
    """At most this many solutions of a question are kept; null keeps all."""

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
    """NAME is critic, reflector or policy. The first two may have a model and a temperature of their own, and the
    policy a temperature."""
    filters: Filters = Filters()
    prompts: str | None = None
    """Prompts are read from this file in place of the one that is installed (train/search/prompts.yaml)."""
    seed: int = 0
    """Every random draw of the search comes from this seed."""
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
