"""One question as the searches see it: what they ask about it, and what they count."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

from .ask import VERIFIER, Ask, Asking, gather
from .read import normal, read_hint, read_score, read_step
from .settings import Search
from .tree import ROOT, Tree


@dataclasses.dataclass
class Subject:
    """A question, the settings of its search, and the counts of what came of its requests.

    Attributes:
      id: names the question; with the seed it keys every draw.
      judged: whether a verifier can say who is right.
      complete: what a step contains that completes its plan.
      conclusions: with which texts a critique says right and wrong.
    """

    id: str
    text: str
    search: Search
    seed: int = 0
    judged: bool = False
    complete: str | None = None
    conclusions: tuple[str, str] = ("right", "wrong")
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    grown: Tree | None = None

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed}/{self.id}")

    def tree(self) -> Tree:
        s = self.search
        self.grown = Tree(exploration=s.exploration, bonus=s.bonus, depth=s.depth, rng=self.rng())
        return self.grown

    @property
    def nodes(self) -> int:
        """Nodes made so far, the root not counted."""
        return 0 if self.grown is None else len(self.grown.nodes) - 1

    def ask(self, name: str, prompt: str, role: str = "policy", **values: Any) -> Ask:
        self.counts[prompt] += 1
        given = {"question": self.text, "steps": [], "hint": "", "siblings": [], **values}
        return Ask(name, prompt, role, given)

    def finishes(self, step: str) -> bool:
        return self.complete is not None and self.complete in step

    # --- the requests of a tree ---

    def reflect(self, tree: Tree, i: int) -> Asking[bool]:
        """Ask for a hint for what follows node `i`; whether the reflector declared its plan solved."""
        (reply,) = yield [self.ask(f"{tree.name(i)}/hint", "hint", "reflector", steps=tree.steps(i))]
        tree.nodes[i].reflection, solved = read_hint(reply)
        return solved

    def propose(self, name: str, steps: list[str], hint: str, beside: list[str], shown: bool) -> Asking[str | None]:
        """A step that follows `steps` and is neither empty nor one of theirs or of `beside`; None after all retries."""
        seen = frozenset(normal(s) for s in (*steps, *beside))
        for attempt in range(1 + self.search.retries):
            siblings = list(beside) if shown else []
            (reply,) = yield [self.ask(f"{name}/{attempt}", "step", steps=steps, hint=hint, siblings=siblings)]
            step, reason = read_step(reply, seen)
            if step:
                return step
            self.counts[f"step {reason}"] += 1
            if reason == "context":
                return None
        self.counts["step given up"] += 1
        return None

    def propose_all(self, name: str, steps: list[str], hint: str, count: int) -> Asking[dict[str, int]]:
        """Up to `count` different next steps, and how often each was proposed.

        One after another, each shown those before it, or side by side.
        """
        found: dict[str, int] = {}
        if self.search.diverse:
            for k in range(count):
                step = yield from self.propose(f"{name}/step{k}", steps, hint, list(found), True)
                if step is not None:
                    found[step] = 1
            return found
        # Side by side none knows of the others, so their own number keys what is drawn, and twins are told after.
        drawn = yield from gather([self.propose(f"{name}/step{k}", steps, hint, [], False) for k in range(count)])
        for step in filter(None, drawn):
            twin = next((s for s in found if normal(s) == normal(step)), None)
            if twin is None:
                found[step] = 1
            else:
                self.counts["step repeated"] += 1
                found[twin] += 1
        return found

    def judge(self, name: str, steps: list[str]) -> Asking[float | None]:
        """The critic's score of a plan on [0, 1]; None, and counted, where it gives none after all retries."""
        for attempt in range(1 + self.search.retries):
            (reply,) = yield [self.ask(f"{name}/score{attempt}", "score", "critic", steps=steps)]
            score = read_score(reply)
            if score is not None:
                return score
            self.counts["score unparsable"] += 1
            if reply.reason == "context":
                break
        self.counts["score dropped"] += 1
        return None

    def verify(self, name: str, steps: list[str], text: str) -> Asking[float | None]:
        """The verifier's verdict on a whole solution."""
        (reply,) = yield [Ask(f"{name}/verdict", "", VERIFIER, {"steps": steps, "text": text})]
        return reply.verdict

    def expand(self, tree: Tree, leaf: int, *, reflect: bool) -> Asking[None]:
        """Reflect on a leaf, propose its children, have the critic judge them; a roll-out from the best."""
        name, node = tree.name(leaf), tree.nodes[leaf]
        if reflect and leaf != ROOT and (yield from self.reflect(tree, leaf)):
            node.solved = node.closed = True
            return
        steps = tree.steps(leaf)
        proposed = yield from self.propose_all(name, steps, node.reflection, self.search.children)
        yield from self.adopt(tree, leaf, steps, proposed)
        if self.search.rollout.steps and node.children:
            best = max(node.children, key=lambda i: (tree.nodes[i].value, -i))
            if not tree.nodes[best].solved:
                yield from self.roll_out(tree, best)

    def adopt(self, tree: Tree, leaf: int, steps: list[str], proposed: dict[str, int]) -> Asking[None]:
        """Have the critic judge proposed steps; those with a score become children."""
        name = tree.name(leaf)
        scores = yield from gather([self.judge(f"{name}/child{k}", [*steps, step]) for k, step in enumerate(proposed)])
        for (step, times), score in zip(proposed.items(), scores, strict=True):
            if score is not None:
                tree.add(leaf, step, score, times=times, solved=self.finishes(step))

    def roll_out(self, tree: Tree, i: int) -> Asking[None]:
        """V ← (1 − a)·V + a·best, where best is the highest score of the steps walked greedily from node `i`."""
        rollout, node = self.search.rollout, tree.nodes[i]
        steps, best = tree.steps(i), None
        for t in range(rollout.steps):
            name = f"{tree.name(i)}/rollout{t}"
            proposed = list((yield from self.propose_all(name, steps, "", rollout.proposals)))
            scores = yield from gather([self.judge(f"{name}/child{k}", [*steps, s]) for k, s in enumerate(proposed)])
            scored = [(score, -k) for k, score in enumerate(scores) if score is not None]
            if not scored:
                break
            score, k = max(scored)
            best = score if best is None else max(best, score)
            steps = [*steps, proposed[-k]]
        node.visits += 1
        if best is not None:
            node.simulated = best
            node.value = (1 - rollout.mixing) * node.value + rollout.mixing * best
