"""Laws of every kind of search on scripted models, and of what is read in replies."""

import random

import pytest
from helpers.scripts import Script, play, run, subject

from train.log import UserError
from train.resolve import build
from train.search.ask import Ask, Reply, gather
from train.search.kinds import KINDS, cot, dart, tot
from train.search.read import normal, read_hint, read_score, read_step
from train.search.settings import Search

# --- determinism ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_depends_on_its_replies_alone(kind):
    def once(seed, shuffle=None):
        c = subject(seed=seed, judged=True, iterations=9, leaves=2, samples=2)
        scores = lambda steps: (sum(map(ord, "".join(steps))) % 9) / 10  # noqa: E731
        found, asked = play(KINDS[kind](c), Script(score=scores), shuffle=shuffle)
        return found.row(), [a.name for a in asked], dict(c.counts)

    assert once(0) == once(0) == once(0, random.Random(3))
    names = once(0)[1]
    assert len(set(names)) == len(names)  # each name keys one draw


def test_gather_keeps_what_is_whose():
    def part(n):
        total = 0
        for k in range(n):
            replies = yield [Ask(f"{n}.{k}.{j}", "step", "policy", {}) for j in range(k + 1)]
            assert [r.text for r in replies] == [f"{n}.{k}.{j}" for j in range(k + 1)]
            total += len(replies)
        return total

    found, asked = play(gather([part(n) for n in (2, 0, 3)]), lambda ask: Reply(ask.name))
    assert found == [3, 0, 6]
    assert len(asked) == 9


# --- the other kinds ---


def test_tree_of_thoughts_keeps_the_beam():
    score = lambda steps: int(steps[-1].split("step")[1][0]) / 10  # noqa: E731  # the third child is the best
    found, asked, _ = run(Script(score=score), tot, depth=3, children=3, beam=2)
    assert sum(n.expanded for n in found.tree.nodes) == 1 + 2 + 2
    assert all(a.prompt != "hint" for a in asked)
    assert found.end == "depth"
    expanded = [n for n in found.tree.nodes[1:] if n.expanded]
    assert all("step0" not in n.step for n in expanded if n.depth == 1)


def test_chains_are_one_request_each():
    found, asked, _ = run(kind=cot, samples=3, judged=True)
    assert [a.name for a in asked if a.prompt == "chain"] == ["chain0", "chain1", "chain2"]
    assert [s.verdict for s in found.solutions] == [1.0] * 3
    assert found.chosen == 1


def right_every(n):
    """The verifier calls every n-th chain right."""
    return lambda text: float(int(text.removeprefix("Do chain").removesuffix(".")) % n == n - 1)


@pytest.mark.parametrize(
    ("mode", "every", "drawn", "right"),
    [
        ("uniform", 1, 8, 4),  # all right: the first eight, four kept
        ("uniform", 4, 16, 4),
        ("uniform", 100, 64, 0),  # given up
        ("prop2diff", 1, 8, 1),  # easy: at least one
        ("prop2diff", 2, 8, 2),  # half wrong: half of four
        ("prop2diff", 8, 32, 4),  # 7/8 wrong: ⌈3.5⌉
    ],
)
def test_difficulty_decides_how_many_are_drawn(mode, every, drawn, right):
    found, asked, _ = run(Script(verdict=right_every(every)), dart, judged=True, dart={"mode": mode})
    assert len([a for a in asked if a.prompt == "chain"]) == drawn
    assert sum(s.verdict == 1.0 for s in found.solutions) == right
    assert found.end == ("most" if right == 0 else "right")


def test_difficulty_is_a_share_of_whole_chains():
    """Seven right of ten: three tenths of ten are three, which 10 · (1 − 0.7) in floats is not."""
    verdicts = iter([1.0] * 7 + [0.0] * 3)
    found, _, _ = run(
        Script(verdict=lambda text: next(verdicts)), dart, judged=True,
        dart={"mode": "prop2diff", "right": 10, "samples": 10},
    )  # fmt: skip
    assert sum(s.verdict == 1.0 for s in found.solutions) == 3


def test_an_answer_in_a_step_completes_the_plan():
    def script(ask):
        if ask.prompt == "step" and len(ask.values["steps"]) == 1:
            return Reply(f"Answer: {ask.name}")
        return Script(score=lambda steps: 0.3 + 0.1 * len(steps))(ask)

    found, asked, _ = run(script, iterations=4, complete="Answer:", judged=True)
    assert {n.depth for n in found.tree.nodes} == {0, 1, 2}
    assert all(n.solved == (n.depth == 2) for n in found.tree.nodes[1:])
    assert not [a for a in asked if a.prompt == "write"]
    assert len(found.solutions) == 1
    assert found.solutions[0].verdict == 1.0


# --- reading ---


def test_steps_are_read_without_label_and_without_the_next():
    assert read_step(Reply("Step 1: Read n.\nStep 2: Print.")) == ("Read n.", "")
    assert read_step(Reply("**Step 4:** Read n")) == ("Read n", "")
    assert read_step(Reply("Read n. Then pri", "length")) == ("Read n.", "")
    assert read_step(Reply("Read n and then pri", "length")) == ("", "unfinished")
    assert read_step(Reply(" \n ")) == ("", "empty")
    assert read_step(Reply("read N"), frozenset({normal("Read n.")})) == ("", "repeated")
    assert read_step(Reply("anything", "context")) == ("", "context")
    assert normal("a + b") != normal("a - b")


def test_scores_are_read_strictly():
    assert read_score(Reply("Score: 10")) == 1.0
    assert read_score(Reply("The plan is fine.\n**Score: 3/10**\n")) == 0.3
    assert read_score(Reply("Score: 1", "length")) is None
    assert read_score(Reply("Score: 1\nbec", "length")) == 0.1
    assert read_score(Reply("Score: 7 because")) is None
    assert read_hint(Reply(" <end>. ")) == ("", True)
    assert read_hint(Reply("Not yet <end> sort")) == ("Not yet  sort", False)


def test_settings_are_checked():
    for values, words in (
        ({"iterations": 0}, "search.iterations"),
        ({"gate": 0.0}, "search.gate"),
        ({"rollout": {"mixing": 2.0}}, "mixing"),
        ({"dart": {"most": 3}}, "most"),
        ({"kind": "mtcs"}, "one of mcts, tot"),
    ):
        with pytest.raises(UserError, match=words):
            build(Search, values)
