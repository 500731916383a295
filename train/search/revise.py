r"""Chains of thought that are revised: the model goes on from a part of what it said.

References:
  retro: Lu et al., "Retro-Search: Exploring Untaken Paths for Deeper and Efficient Reasoning",
    https://arxiv.org/abs/2504.04383
  reflect: Pan et al., "LEMMA: Learning from Errors for MatheMatical Advancement in LLMs",
    https://arxiv.org/abs/2503.17439
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .ask import Asking, gather
from .found import Found, Solution, chains
from .subject import Subject
from .tree import ROOT


def retro(c: Subject) -> Asking[Found]:
    r"""Retro-Search: at every change of thought of a right chain, go on with the thought that it left.

    A chain $s_1 … s_n$ of steps changes its thought at a step that begins with one of `switches`. From the steps before
    it the model goes on, with a first step that is no change of thought; if what comes of it is right and the whole is
    shorter, it takes the chain's place, and the next change of thought is looked at. The paper's value of a path of $N$
    steps that is right is $\gamma^{N}$, so of two right ones the shorter is the better; the length here is in
    characters. The paper keeps the words of a change from being decoded; here a text that begins with one is drawn
    anew.
    """
    tree = c.tree()
    drawn = yield from chains(c, tree, range(c.search.samples))
    tree.settle(ROOT)
    revised = yield from gather([revised_chain(c, solution) for solution in drawn])
    first = next((s.node for s in revised if s.verdict == 1.0), None)
    return Found(tree, first, "samples", revised)


def revised_chain(c: Subject, solution: Solution) -> Asking[Solution]:
    """A right chain as short as its untaken paths make it; any other as it is."""
    way, text = c.search.retro, solution.text
    if solution.verdict != 1.0 or solution.reason in ("length", "context"):
        return solution
    at = 1
    while at < len(thoughts := split(text, way.step, way.switches)):
        begun = "".join(thoughts[:at])
        for attempt in range(way.tries):
            name = f"{solution.name}/thought{at}/{attempt}"
            (reply,) = yield [c.ask(name, "chain", begun=begun)]
            if reply.reason == "context":
                c.counts["chain context"] += 1
                break
            other = begun + reply.text
            if is_switch(reply.text, way.switches):
                c.counts["thought changed again"] += 1
            elif reply.reason == "length" or len(other) >= len(text):
                c.counts["path no shorter"] += 1
            elif (yield from c.verify(name, [], other)) == 1.0:
                c.counts["path taken"] += 1
                text = other
                break
        at += 1
    return dataclasses.replace(solution, text=text)


def split(text: str, step: str, switches: Sequence[str]) -> list[str]:
    """The thoughts of a text, which together are the text: each but the first begins with a change of thought.

    Example:
      >>> split("a;Wait b;c;But d", ";", ("Wait", "But"))
      ['a;', 'Wait b;c;', 'But d']
    """
    steps = text.split(step)
    thoughts = [""]
    for i, said in enumerate(steps):
        if is_switch(said, switches) and thoughts[-1]:
            thoughts.append("")
        thoughts[-1] += said + (step if i + 1 < len(steps) else "")
    return thoughts


def is_switch(step: str, switches: Sequence[str]) -> bool:
    """Whether a step begins with a change of thought."""
    said = step.lstrip().casefold()
    return any(said.startswith(word.casefold()) for word in switches)


def reflect(c: Subject) -> Asking[Found]:
    r"""LEMMA with corrections by the model: $w_1 … w_i \oplus \text{phrase} \oplus y$, y drawn after all of it.

    A wrong chain w is cut behind its first step that no right chain of the question has there, or, if none is right,
    before its last step. The model goes on behind a phrase of doubt. Those that come out right stand behind the chains.
    """
    tree, way = c.tree(), c.search.reflection
    drawn = yield from chains(c, tree, range(c.search.samples))
    rights = [s.text.split(way.step) for s in drawn if s.verdict == 1.0]
    wrong = [s for s in drawn if s.verdict == 0.0 and s.reason not in ("length", "context")]
    begun = {s.name: doubted(s.text, rights, way.step, way.phrase) for s in wrong}
    asked = [(s, k) for s in wrong for k in range(way.tries) if begun[s.name]]
    added = yield from gather([corrected(c, s, begun[s.name], k) for s, k in asked])
    kept = [
        dataclasses.replace(s, node=tree.add(ROOT, s.text, None, solved=True)) for s in added if s is not None
    ]  # fmt: skip
    tree.settle(ROOT)
    first = next((s.node for s in (*drawn, *kept) if s.verdict == 1.0), None)
    return Found(tree, first, "samples", [*drawn, *kept])


def corrected(c: Subject, wrong: Solution, begun: str, number: int) -> Asking[Solution | None]:
    """A wrong chain as the model goes on behind the doubt; None where it does not come out right."""
    name = f"{wrong.name}/doubt{number}"
    (reply,) = yield [c.ask(name, "chain", begun=begun)]
    if reply.reason in ("length", "context"):
        c.counts[f"correction {reply.reason}"] += 1
        return None
    text = begun + reply.text
    verdict = yield from c.verify(name, [], text)
    c.counts["corrected" if verdict == 1.0 else "not corrected"] += 1
    return dataclasses.replace(wrong, name=name, text=text, reason=reply.reason, verdict=verdict) if verdict else None


def doubted(wrong: str, rights: Sequence[Sequence[str]], step: str, phrase: str) -> str:
    """A wrong text up to its first wrong step, and the doubt; "" where it has no step to doubt.

    Example:
      >>> doubted("a;x;y", [["a", "b"]], ";", "Wait.")
      'a;x;Wait.;'
    """
    steps = wrong.split(step)
    if rights:
        agreed = max(
            next((i for i, (a, b) in enumerate(zip(steps, right, strict=False)) if a.split() != b.split()),
                 min(len(steps), len(right)))
            for right in rights
        )  # fmt: skip
        kept = steps[: agreed + 1] if agreed < len(steps) else []
    else:
        kept = steps[:-1]
    return step.join([*kept, phrase, ""]) if kept else ""
