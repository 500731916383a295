"""Laws of the tree and of the searches, on scripted models: no weights, no engine."""

import math
import random

import pytest
from helpers.scripts import Script, run

from train.search.ask import Reply
from train.search.tree import ROOT, Tree, ucb


def tree_of(depth=8, exploration=0.05, bonus=0.8, seed=0):
    return Tree(exploration=exploration, bonus=bonus, depth=depth, rng=random.Random(seed))


# --- selection ---


def test_the_bound_is_the_formula():
    assert ucb(0.4, 0, 7, exploration=0.05, bonus=0.8) == pytest.approx(1.2)
    wanted = 0.4 + 0.05 * math.sqrt(2 * math.log(9) / 4)
    assert ucb(0.4, 4, 9, exploration=0.05, bonus=0.8) == pytest.approx(wanted)
    # m virtual visits of value 0: the mean over n + m visits, and the parent's count with them
    wanted = 0.4 * 4 / 6 + 0.05 * math.sqrt(2 * math.log(11) / 6)
    assert ucb(0.4, 4, 11, exploration=0.05, bonus=0.8, virtual=2) == pytest.approx(wanted)
    assert ucb(0.4, 1, 1, exploration=5.0, bonus=0.8) == pytest.approx(0.4)  # ln 1 = 0


@pytest.mark.parametrize(
    ("children", "wanted"),
    [
        ([(0.9, 1), (0.2, 0), (0.1, 0)], 1),  # unvisited before visited: 0.2 + 0.8 > 0.9 + …
        ([(0.9, 3), (0.2, 2), (0.87, 1)], 2),  # 0.87 + 0.05·√(2 ln 7) > 0.9 + 0.05·√(2 ln 7 / 3)
        ([(0.9, 3), (0.2, 2), (0.7, 1)], 0),
    ],
)
def test_selection_takes_the_highest_bound(children, wanted):
    tree = tree_of()
    for value, visits in children:
        i = tree.add(ROOT, f"s{value}", value)
        tree.nodes[i].visits = visits
    tree.nodes[ROOT].expanded, tree.nodes[ROOT].visits = True, 1 + sum(n for _, n in children)
    assert tree.select() == 1 + wanted


def test_ties_are_broken_at_random_and_by_the_seed():
    def first(seed):
        tree = tree_of(seed=seed)
        for k in range(3):
            tree.add(ROOT, str(k), 0.5)
        tree.nodes[ROOT].expanded = True
        return tree.select()

    found = [first(seed) for seed in range(60)]
    assert found == [first(seed) for seed in range(60)]
    assert {found.count(i) > 8 for i in (1, 2, 3)} == {True}


def test_of_equals_what_was_proposed_more_often_goes_first():
    for seed in range(10):
        tree = tree_of(seed=seed)
        for times in (1, 3, 2):
            tree.add(ROOT, str(times), 0.9, times=times)
        tree.add(ROOT, "worse", 0.5, times=9)
        tree.nodes[ROOT].expanded = True
        assert tree.best() == tree.over(0.88) == tree.select() == 2
    assert tree.over(0.95) is None


def test_twins_proposed_side_by_side_are_one_child_that_counts_them():
    class Twins(Script):
        def __call__(self, ask):
            return Reply("Add both.") if ask.prompt == "step" and "step1" not in ask.name else super().__call__(ask)

    found, _, c = run(Twins(), iterations=1, diverse=False)
    assert [(n.step, n.times) for n in found.tree.nodes[1:]] == [("Add both.", 2), ("Do r/step1/0.", 1)]
    assert c.counts["step repeated"] == 1


# --- backup ---


def test_backup_is_the_visit_weighted_mean_of_the_children():
    tree = tree_of()
    a, b = tree.add(ROOT, "a", 0.6), tree.add(ROOT, "b", 0.2)
    tree.settle(ROOT)
    assert (tree.nodes[ROOT].visits, tree.nodes[ROOT].value) == (1, 0.0)  # no child was visited yet
    aa = tree.add(a, "aa", 0.9)
    tree.settle(a)
    assert tree.nodes[a].value == 0.6
    assert tree.nodes[ROOT].value == pytest.approx(0.6)
    tree.add(aa, "aaa", 0.1)
    tree.settle(aa)
    assert tree.nodes[a].value == pytest.approx(0.9)  # of its one visited child
    assert [tree.nodes[i].visits for i in (ROOT, a, b, aa)] == [3, 2, 0, 1]
    tree.settle(b)  # nothing could be proposed: closed, but visited
    assert tree.nodes[b].closed
    assert tree.nodes[ROOT].value == pytest.approx((2 * 0.9 + 1 * 0.2) / 3)
    assert tree.nodes[a].score == 0.6  # the critic's word stays


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("leaves", [1, 3])
def test_visits_add_up_and_values_are_means(seed, leaves):
    rng = random.Random(seed)
    found, _, _ = run(Script(score=lambda steps: rng.randint(0, 8) / 10), iterations=20, leaves=leaves, seed=seed)
    nodes = found.tree.nodes
    assert nodes[ROOT].visits == 20
    for node in nodes:
        below = [nodes[i] for i in node.children]
        assert node.virtual == 0
        assert node.visits == node.expanded + sum(b.visits for b in below)
        if any(b.visits for b in below):
            mean = sum(b.visits * b.value for b in below) / sum(b.visits for b in below)
            assert node.value == pytest.approx(mean)
        elif node.parent is not None:
            assert node.value == node.score
    assert found.tree.nodes[found.chosen].value == max(n.value for n in nodes[1:])


# --- virtual loss ---


def test_leaves_in_flight_are_not_taken_twice_and_turn_others_away():
    tree = tree_of()
    a, b = tree.add(ROOT, "a", 0.6), tree.add(ROOT, "b", 0.55)
    tree.settle(ROOT)
    for parent in (a, b):
        for k in range(2):
            tree.add(parent, f"{parent}{k}", 0.6 if parent == a else 0.55)
        tree.settle(parent)
    for i in (a, b):
        tree.nodes[i].visits = 4
    tree.nodes[ROOT].visits = 9
    first = tree.select()
    assert tree.nodes[first].parent == a
    assert tree.nodes[tree.select()].parent == b  # 0.6·4/5 + … < 0.55 + …
    rest = {tree.select(), tree.select()}
    assert len(rest) == 2
    assert tree.select() is None  # four leaves, four in flight
    assert tree.nodes[ROOT].virtual == 4
    for leaf in sorted(tree.in_flight):
        tree.settle(leaf)
    assert all(node.virtual == 0 for node in tree.nodes)


def test_parallel_leaves_expand_as_many_nodes():
    one, _, _ = run(iterations=12, leaves=1)
    many, _, _ = run(iterations=12, leaves=5)
    assert sum(n.expanded for n in one.tree.nodes) == sum(n.expanded for n in many.tree.nodes) == 12


# --- the search as a whole ---


def test_plans_reach_the_depth_they_should():
    """The defaults make plans of three steps and more; the release's two iterations stop at two."""
    rising = lambda steps: min(0.8, 0.3 + 0.1 * len(steps))  # noqa: E731
    found, _, _ = run(Script(score=rising))
    assert len(found.tree.steps(found.chosen)) >= 3
    short, _, _ = run(Script(score=rising), iterations=2)
    assert max(n.depth for n in short.tree.nodes) == 2
    deep, _, _ = run(Script(score=rising), iterations=300, depth=5, children=2)
    assert max(n.depth for n in deep.tree.nodes) == 5
    assert deep.end == "exhausted"  # 1 + 2 + … + 16 = 31 nodes can be expanded
    assert sum(n.expanded for n in deep.tree.nodes) == 31


def test_the_end_gate_ends_with_the_first_node_over_it():
    score = lambda steps: 0.9 if len(steps) == 2 and "step1" in steps[-1] else 0.5  # noqa: E731
    found, _, _ = run(Script(score=score), iterations=50)
    assert found.end == "gate"
    chosen = found.tree.nodes[found.chosen]
    assert (chosen.depth, chosen.value) == (2, 0.9)
    assert sum(n.expanded for n in found.tree.nodes) == 2
    none, _, _ = run(Script(score=score), iterations=50, gate=1.1)
    assert none.end == "iterations"


def test_siblings_are_shown_to_each_other_and_differ():
    _, asked, _ = run(iterations=1)
    steps = [a for a in asked if a.prompt == "step"]
    assert [len(a.values["siblings"]) for a in steps] == [0, 1, 2]
    assert steps[2].values["siblings"] == ["Do r/step0/0.", "Do r/step1/0."]
    _, asked, _ = run(iterations=1, diverse=False)
    assert [a.values["siblings"] for a in asked if a.prompt == "step"] == [[], [], []]


def test_the_hint_is_passed_on_and_kept():
    found, asked, _ = run(Script(hint="Hint: mind the zero."), iterations=3)
    below = [a for a in asked if a.prompt == "step" and a.values["steps"]]
    assert below
    assert {a.values["hint"] for a in below} == {"mind the zero."}
    assert {a.values["hint"] for a in asked if a.prompt == "step" and not a.values["steps"]} == {""}
    assert sum(n.reflection == "mind the zero." for n in found.tree.nodes) == 2
    _, asked, _ = run(iterations=3, reflect=False)
    assert all(a.prompt != "hint" for a in asked)


def test_a_plan_the_reflector_calls_solved_is_not_gone_on_with():
    found, _, c = run(Script(hint=lambda steps: "<end>" if len(steps) == 1 else "on"), iterations=30)
    assert {n.depth for n in found.tree.nodes} == {0, 1}
    assert all(n.solved for n in found.tree.nodes[1:])
    assert found.end == "exhausted"
    assert c.counts["hint"] == 3


def test_repeated_and_empty_steps_are_asked_for_again_and_given_up():
    def stubborn(ask):
        return Reply("  ") if ask.prompt == "step" and ask.name.startswith("r/step1") else Reply("Same step.")

    found, asked, c = run(lambda ask: Script()(ask) if ask.prompt != "step" else stubborn(ask), iterations=1)
    assert [n.step for n in found.tree.nodes[1:]] == ["Same step."]
    assert c.counts["step empty"] == 4  # a first try and three retries
    assert c.counts["step repeated"] == 4
    assert c.counts["step given up"] == 2
    assert len({a.name for a in asked}) == len(asked)
    # Nor may a plan say the same step twice.
    found, _, c = run(lambda ask: Reply("Same step.") if ask.prompt == "step" else Script()(ask), iterations=5)
    assert found.end == "exhausted"
    assert len(found.tree.nodes) == 2


@pytest.mark.parametrize("words", ["I like it", "Score: 11", "Score: -3", "Score: seven", "Score: 7\nScore: 9", ""])
def test_what_a_critic_does_not_score_is_dropped_and_counted(words):
    found, asked, c = run(Script(score=lambda steps: words), iterations=1)
    assert found.chosen is None
    assert found.solutions == []
    assert len(found.tree.nodes) == 1
    assert c.counts["score unparsable"] == 12  # three children, four tries each
    assert c.counts["score dropped"] == 3
    assert len([a for a in asked if a.prompt == "score"]) == 12


def test_a_critic_asked_again_may_score():
    once: set[str] = set()

    def script(ask):
        if ask.prompt == "score" and ask.name.endswith("score0"):
            once.add(ask.name)
            return Reply("hm")
        return Script(score=lambda steps: 0.4)(ask)

    found, _, c = run(script, iterations=1)
    assert [n.score for n in found.tree.nodes[1:]] == [0.4] * 3
    assert c.counts["score unparsable"] == len(once) == 3
    assert c.counts["score dropped"] == 0


def test_a_roll_out_mixes_what_it_meets():
    score = lambda steps: {1: 0.4, 2: 0.8}[min(len(steps), 2)]  # noqa: E731
    found, asked, _ = run(Script(score=score), iterations=1, rollout={"steps": 1, "mixing": 0.5})
    node = found.tree.nodes[1]
    assert (node.simulated, node.value, node.visits, node.score) == (0.8, pytest.approx(0.6), 1, 0.4)
    assert found.tree.nodes[ROOT].value == pytest.approx(0.6)
    assert len([a for a in asked if "rollout" in a.name and a.prompt == "step"]) == 2
    off, asked, _ = run(Script(score=score), iterations=1)
    assert not [a for a in asked if "rollout" in a.name]
    assert off.tree.nodes[1].simulated is None


def test_no_room_in_the_model_closes_the_node():
    full = lambda ask: Reply("", "context") if len(ask.values["steps"]) >= 1 and ask.prompt == "step" else Script()(ask)  # noqa: E731
    found, _, c = run(full, iterations=20)
    assert found.end == "exhausted"
    assert {n.depth for n in found.tree.nodes} == {0, 1}
    assert c.counts["step context"] == 9
