"""Searches on a scripted model: no weights, no engine."""

import itertools

from train.resolve import build
from train.search.ask import Ask, Reply
from train.search.kinds import mcts
from train.search.settings import Search
from train.search.subject import Subject


def play(search, answer, *, shuffle=None):
    """Answer a search to its end; (what it returns, every Ask it made)."""
    asked = []
    try:
        asks = next(search)
        while True:
            asked += asks
            order = list(range(len(asks)))
            if shuffle is not None:  # replies may come in any order; they are sent in that of the asks
                shuffle.shuffle(order)
            replies = {i: answer(asks[i]) for i in order}
            asks = search.send([replies[i] for i in range(len(asks))])
    except StopIteration as end:
        return end.value, asked


class Script:
    """A policy that numbers its steps, a reflector with nothing to say, a critic that scores by a function."""

    def __init__(self, score=lambda steps: 0.5, hint="look again", verdict=lambda text: 1.0):
        self.score, self.hint, self.verdict = score, hint, verdict
        self.made = itertools.count()

    def __call__(self, ask: Ask) -> Reply:
        if ask.role == "verifier":
            return Reply(verdict=self.verdict(ask.values["text"]))
        if ask.prompt == "score":
            score = self.score(ask.values["steps"])
            return Reply(score if isinstance(score, str) else f"Score: {round(10 * score)}")
        if ask.prompt == "hint":
            return Reply(self.hint(ask.values["steps"]) if callable(self.hint) else self.hint)
        # The name, not a counter: the same ask gets the same answer whoever asked before.
        return Reply(f"Do {ask.name}.")


def subject(id="q", seed=0, judged=False, complete=None, **search):
    return Subject(id, "What?", build(Search, search), seed=seed, judged=judged, complete=complete)


def run(script=None, kind=mcts, **given):
    c = subject(**given)
    found, asked = play(kind(c), script or Script())
    return found, asked, c
