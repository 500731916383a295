"""The searches: SRA-MCTS, Tree of Thoughts, chains of thought, difficulty-aware sampling. One interface.

Chains that are revised are in `revise.py`, texts about solutions in `teach.py`.

    kind(subject)  yields lists of `Ask`, is sent lists of `Reply`, returns `Found`

References:
  mcts: Xu et al., https://arxiv.org/abs/2411.11053
  tot: Yao et al., "Tree of Thoughts", https://arxiv.org/abs/2305.10601 (breadth first)
  dart: Tong et al., "DART-Math", https://arxiv.org/abs/2407.13690
"""

from __future__ import annotations

from collections.abc import Callable

from .ask import Asking, gather
from .found import Found, Solution, chains
from .revise import reflect, retro
from .settings import Kind
from .subject import Subject
from .teach import critique, guidance
from .tree import ROOT, Tree


def mcts(c: Subject) -> Asking[Found]:
    """Expand the leaf that the upper bound leads to, `iterations` times or until a value is over the gate."""
    tree, spent, end = c.tree(), 0, "iterations"
    while spent < c.search.iterations:
        leaves = []
        while len(leaves) < min(c.search.leaves, c.search.iterations - spent):
            leaf = tree.select()
            if leaf is None:
                break
            leaves.append(leaf)
        if not leaves:
            end = "exhausted"
            break
        yield from gather([c.expand(tree, leaf, reflect=c.search.reflect) for leaf in leaves])
        for leaf in leaves:
            tree.settle(leaf)
        spent += len(leaves)
        if (over := tree.over(c.search.gate)) is not None:
            return Found(tree, over, "gate", (yield from write(c, tree, over)))
    best = tree.best()
    return Found(tree, best, end, (yield from write(c, tree, best)))


def tot(c: Subject) -> Asking[Found]:
    """Breadth first: of all steps proposed at a depth, the `beam` best are gone on with."""
    tree, level, end = c.tree(), [ROOT], "depth"
    for _ in range(c.search.depth):
        yield from gather([c.expand(tree, i, reflect=False) for i in level])
        for i in level:
            tree.settle(i)
        if (over := tree.over(c.search.gate)) is not None:
            return Found(tree, over, "gate", (yield from write(c, tree, over)))
        new = [child for i in level for child in tree.nodes[i].children if not tree.nodes[child].solved]
        level = sorted(new, key=lambda i: (-tree.nodes[i].value, -tree.nodes[i].times, i))[: c.search.beam]
        if not level:
            end = "exhausted"
            break
    best = tree.best()
    return Found(tree, best, end, (yield from write(c, tree, best)))


def cot(c: Subject) -> Asking[Found]:
    """`samples` chains of thought, side by side."""
    tree = c.tree()
    solutions = yield from chains(c, tree, range(c.search.samples))
    tree.settle(ROOT)
    return Found(tree, solutions[0].node if solutions else None, "samples", solutions)


def dart(c: Subject) -> Asking[Found]:
    r"""Chains until enough are right: `right` of them, or ⌈right × difficulty⌉ of them, at least one.

    The difficulty is the share of the first `samples` that are not right; a question without a verifier has none, and
    gets the first `samples` alone.
    """
    dart, tree, drawn, wanted, end = c.search.dart, c.tree(), 0, c.search.dart.right, "right"
    solutions: list[Solution] = []
    while drawn < dart.most:
        count = min(dart.samples, dart.most - drawn)
        solutions += yield from chains(c, tree, range(drawn, drawn + count))
        right = sum(s.verdict == 1.0 for s in solutions)
        if not c.judged:
            end = "samples"
            break
        if drawn == 0 and dart.mode == "prop2diff":
            wanted = max(1, -(-dart.right * (count - right) // count))  # in integers: 1 − c/n rounds
        drawn += count
        if right >= wanted:
            break
    else:
        end = "most"
    tree.settle(ROOT)
    # Only as many right ones as wanted: what is drawn at once must not favour the easy questions.
    kept, seen = [], 0
    for solution in solutions:
        seen += solution.verdict == 1.0
        if not (solution.verdict == 1.0 and seen > wanted):
            kept.append(solution)
    first = next((s.node for s in kept if s.verdict == 1.0), None)
    return Found(tree, first, end, kept)


KINDS: dict[Kind, Callable[[Subject], Asking[Found]]] = {
    "mcts": mcts,
    "tot": tot,
    "cot": cot,
    "dart": dart,
    "retro": retro,
    "reflect": reflect,
    "critique": critique,
    "guidance": guidance,
}


def write(c: Subject, tree: Tree, node: int | None) -> Asking[list[Solution]]:
    """`samples` texts written from the plan that ends with `node`, judged where the question can be.

    A plan whose last step holds the answer is its own text.
    """
    if node is None:
        return []
    steps, value = tree.steps(node), tree.nodes[node].value

    def one(k: int) -> Asking[Solution]:
        name = f"write{k}"
        if c.finishes(steps[-1]):
            text, reason = "", "eos"
        else:
            (reply,) = yield [c.ask(name, "write", steps=steps)]
            text, reason = reply.text, reply.reason
        verdict = None
        if c.judged and reason != "context":
            verdict = yield from c.verify(name, steps, text)
        return Solution(name, node, steps, text, reason, value, verdict)

    return (yield from gather([one(k) for k in range(1 if c.finishes(steps[-1]) else c.search.samples)]))
