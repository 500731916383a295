r"""Texts about solutions and questions, which are learnt in their place: critiques and guidance.

References:
  critique: Wang et al., "Critique Fine-Tuning: Learning to Critique is More Effective than Learning to Imitate",
    https://arxiv.org/abs/2501.17703
  guidance: Bi et al., "Enhancing the Reasoning Capabilities of Small Language Models via Solution Guidance
    Fine-Tuning", https://arxiv.org/abs/2412.09906
"""

from __future__ import annotations

from .ask import Asking, gather
from .found import Found, Solution, chains
from .read import read_verdict
from .subject import Subject
from .tree import ROOT


def critique(c: Subject) -> Asking[Found]:
    r"""Critiques of the model's own chains: learn $c \sim p_\theta(\cdot \mid x \oplus y)$ that concludes what is true.

    A critique is right if its conclusion is the verifier's verdict on the chain. The paper's critic is a larger model,
    whose critiques are not checked; a file of such critiques is learnt by `jaxmerge sft`.
    """
    tree = c.tree()
    drawn = yield from chains(c, tree, range(c.search.samples))

    def one(solution: Solution) -> Asking[Solution]:
        name, about = f"{solution.name}/critique", {"text": solution.text}
        (reply,) = yield [c.ask(name, "critique", **about)]
        concluded = read_verdict(reply, c.conclusions)
        c.counts["no conclusion"] += concluded is None
        verdict = float(concluded == solution.verdict)
        return Solution(name, solution.node, [], reply.text, reply.reason, None, verdict, "critique", about)

    judged = [s for s in drawn if s.verdict is not None and s.reason not in ("length", "context")]
    critiques = yield from gather([one(solution) for solution in judged])
    tree.settle(ROOT)
    return Found(tree, next((s.node for s in critiques if s.verdict == 1.0), None), "samples", critiques)


def guidance(c: Subject) -> Asking[Found]:
    r"""Solution guidance: learn $g \sim p_\theta(\cdot \mid x)$ where the answer drawn after $x \oplus g$ is right.

    Guidance says how a question is to be understood and in which steps it is solved, without computing. In the paper a
    larger model writes what is learnt, and a second small model answers with the guidance in its prompt; here both are
    the round's model, and guidance is kept by what comes of it.
    """
    tree = c.tree()

    def one(k: int) -> Asking[Solution | None]:
        name = f"guide{k}"
        (said,) = yield [c.ask(name, "guide")]
        if said.reason == "context":
            c.counts["guide context"] += 1
            return None
        (reply,) = yield [c.ask(f"{name}/follow", "follow", text=said.text)]
        verdict = None
        if c.judged and reply.reason != "context":
            verdict = yield from c.verify(name, [], reply.text)
        node = tree.add(ROOT, said.text, None, solved=True)
        return Solution(name, node, [], said.text, said.reason, None, verdict, "guide")

    drawn = yield from gather([one(k) for k in range(c.search.samples)])
    found = [s for s in drawn if s is not None]
    tree.settle(ROOT)
    return Found(tree, next((s.node for s in found if s.verdict == 1.0), None), "samples", found)
