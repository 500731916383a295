r"""A tree of reasoning steps: which node to expand next, and what an expansion says of the nodes above. No model.

A node's state is the steps from the root to it. V is its value on [0, 1], n its visits, N those of its parent:

    selection   from the root, while a node is expanded, to the child with the largest
                V + c·√(2 ln N / n),  or  V + bonus  where n = 0;
                of equals to one proposed most often, then at random
    backup      from the expanded node to the root:  n ← n + 1,  V ← Σ_children n·V / Σ_children n  (if that is not 0)

With several leaves in flight, each node on the way to one counts m virtual visits of value 0 until the leaf is
backed up: V·n/(n + m) + c·√(2 ln(N + M) / (n + m)).  Without, the formulas are the published ones.

References:
  Xu et al., "SRA-MCTS: Self-driven Reasoning Augmentation with Monte Carlo Tree Search for Code Generation",
  https://arxiv.org/abs/2411.11053
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

ROOT = 0


@dataclasses.dataclass
class Node:
    """One step and what is known of the plan that ends with it."""

    step: str
    parent: int | None
    depth: int
    score: float | None
    """The critic's, never changed; None where no critic was asked."""
    value: float
    times: int = 1
    """How often it was proposed: of equals, what the policy says more often is more often right."""
    visits: int = 0
    virtual: int = 0
    """Leaves in flight at or below this node."""
    expanded: bool = False
    closed: bool = False
    """Not to be expanded (again): solved, too deep, or nothing could be proposed."""
    solved: bool = False
    """Declared complete, by the reflector or by an answer in its step."""
    reflection: str = ""
    simulated: float | None = None
    """The best score a roll-out from here met."""
    children: list[int] = dataclasses.field(default_factory=list)


def ucb(value: float, visits: int, above: int, *, exploration: float, bonus: float, virtual: int = 0) -> float:
    """The upper bound by which children are compared.

    Args:
      visits, virtual: of the child, n and m.
      above: visits of its parent, virtual ones included, N + M.

    Example:
      >>> ucb(0.5, 0, 3, exploration=0.05, bonus=0.8)
      1.3
      >>> round(ucb(0.5, 2, 4, exploration=0.05, bonus=0.8), 4)
      0.5589
    """
    n = visits + virtual
    if n == 0:
        return value + bonus
    return value * visits / n + exploration * math.sqrt(2 * math.log(max(above, 1)) / n)


class Tree:
    """The nodes of one question.

    Args:
      exploration, bonus: c and the bonus of a child without visits.
      depth: steps of the longest plan; a node that deep is closed.
      rng: breaks ties.
    """

    def __init__(self, *, exploration: float, bonus: float, depth: int, rng: random.Random):
        self.exploration, self.bonus, self.depth, self.rng = exploration, bonus, depth, rng
        self.nodes = [Node("", None, 0, None, 0.0)]
        self.in_flight: set[int] = set()

    # --- reading ---

    def lineage(self, i: int) -> list[int]:
        """Nodes from the root to `i`, both included."""
        found = [i]
        while (parent := self.nodes[found[-1]].parent) is not None:
            found.append(parent)
        return found[::-1]

    def steps(self, i: int) -> list[str]:
        """The plan that ends with node `i`."""
        return [self.nodes[n].step for n in self.lineage(i)[1:]]

    def name(self, i: int) -> str:
        """The way to a node by numbers of children: `r`, `r.0`, `r.0.2`. It depends on nothing beside the way."""
        way = self.lineage(i)
        return ".".join(["r", *(str(self.nodes[a].children.index(b)) for a, b in itertools.pairwise(way))])

    def available(self, i: int) -> bool:
        """Whether a leaf at or below `i` can be expanded and is not in flight."""
        node = self.nodes[i]
        if node.closed or i in self.in_flight:
            return False
        return not node.expanded or any(self.available(child) for child in node.children)

    def bound(self, i: int) -> float:
        node = self.nodes[i]
        assert node.parent is not None, "the root is compared with nothing"
        above = self.nodes[node.parent]
        return ucb(
            node.value, node.visits, above.visits + above.virtual,
            exploration=self.exploration, bonus=self.bonus, virtual=node.virtual,
        )  # fmt: skip

    def best(self) -> int | None:
        """The node with the highest value; of equals the deepest, then the most proposed, then the first.

        None if there is but the root.
        """
        others = range(1, len(self.nodes))
        return max(
            others, key=lambda i: (self.nodes[i].value, self.nodes[i].depth, self.nodes[i].times, -i), default=None
        )

    def over(self, gate: float) -> int | None:
        """The node whose value reaches the end gate; of several the most proposed, then the first."""
        found = (i for i in range(1, len(self.nodes)) if self.nodes[i].value >= gate)
        return max(found, key=lambda i: (self.nodes[i].times, -i), default=None)

    # --- growing ---

    def select(self) -> int | None:
        """The leaf to expand next, from now on in flight; None if there is none."""
        if not self.available(ROOT):
            return None
        i = ROOT
        while self.nodes[i].expanded:
            open_ones = [child for child in self.nodes[i].children if self.available(child)]
            merits = [(self.bound(child), self.nodes[child].times) for child in open_ones]
            most = max(merits)
            highest = [child for child, merit in zip(open_ones, merits, strict=True) if merit == most]
            i = highest[0] if len(highest) == 1 else self.rng.choice(highest)
        self.in_flight.add(i)
        for n in self.lineage(i):
            self.nodes[n].virtual += 1
        return i

    def add(self, parent: int, step: str, score: float | None, *, times: int = 1, solved: bool = False) -> int:
        """A child of `parent`; its value is the critic's score until something below it is visited."""
        depth = self.nodes[parent].depth + 1
        closed = solved or depth >= self.depth
        self.nodes.append(Node(step, parent, depth, score, score or 0.0, times, closed=closed, solved=solved))
        self.nodes[parent].children.append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def settle(self, leaf: int) -> None:
        """End of an expansion: no longer in flight, closed if it has no child, and backed up."""
        if leaf in self.in_flight:
            self.in_flight.remove(leaf)
            for n in self.lineage(leaf):
                self.nodes[n].virtual -= 1
        node = self.nodes[leaf]
        node.expanded = True
        node.closed = node.closed or not node.children
        self.back_up(leaf)

    def back_up(self, i: int) -> None:
        """Visits and visit-weighted means from `i` to the root."""
        for n in reversed(self.lineage(i)):
            node = self.nodes[n]
            node.visits += 1
            below = [self.nodes[child] for child in node.children]
            visits = sum(child.visits for child in below)
            if visits:
                node.value = sum(child.visits * child.value for child in below) / visits

    # --- on disk ---

    def rows(self) -> list[dict[str, Any]]:
        """The nodes as plain data, in the order in which they were made."""
        return [
            {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.name != "virtual"}
            for node in self.nodes
        ]
