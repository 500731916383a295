"""What judged samples become: the words, the corrections, and the weights of TRICE against a known posterior."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluate import answer
from train.improve.rewrites import REWRITES, Right, RTuning, agree, trice_weights
from train.improve.select import select
from train.improve.settings import Improve, Selection
from train.log import UserError
from train.models.characters import EOS_ID, write_tokenizer
from train.models.tokenizer import Tokenizer
from train.resolve import build, to_dict
from train.tasks import FamilySpec, build_suite


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def suite():
    spec = FamilySpec("chain_sum", "id", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, train=6)
    return build_suite([spec], seed=0, style="compact")


def examples_of(suite, tokenizer, said, rewrite, **more):
    """Examples of texts by question number; a text that ends in … has no end."""
    questions = suite.questions("train")
    rows = [
        {
            "question_id": questions[q].id, "sample": s, "text": text.rstrip("…"),
            "tokens": tokenizer.encode(text.rstrip("…")) + [EOS_ID] * (not text.endswith("…")),
            "reason": "length" if text.endswith("…") else "eos",
        }
        for q, texts in said.items()
        for s, text in enumerate(texts)
    ]  # fmt: skip
    scored = answer.verify(suite, {q.id: q for q in questions}, rows)
    config = build(Selection, {"rewrite": rewrite}, "selection")
    return select(suite, tokenizer, questions, scored, config, seed=0, **more)[0]


def test_the_registry_is_what_a_config_may_name():
    for name, kind in REWRITES.items():
        found = build(Selection, {"rewrite": {"name": name}}, "selection").rewrite
        assert type(found) is kind
        assert kind.name == name  # type: ignore[attr-defined]
        assert "$" in str(kind.__doc__), "the formula is in the docstring"
        assert "https://arxiv.org/abs/" in str(kind.__doc__)
    assert Selection().rewrite == Right()


# --- RFT ---


def test_solutions_with_the_same_equations_are_the_same():
    same = Right(same="equations").distinct
    assert same("First 2 + 3 = 5. Then 5*4 = 20.\nAnswer: 20") == same("We add: 2+3=5 and so 5 * 4 = 20")
    assert same("2+3=5, 5*4=20") != same("5*4=20, 2+3=5"), "their order counts"
    assert same("no equation  here") == "no equation here"
    assert Right().distinct("2+3=5 a") != Right().distinct("2+3=5 b")


def test_of_solutions_with_the_same_equations_the_first_is_learnt(suite, tokenizer):
    q = suite.questions("train")[0]
    texts = [str(q.solution), f",{q.solution}", f"#{q.answer}"]
    assert len(examples_of(suite, tokenizer, {0: texts}, {"name": "right"})) == 3
    kept = examples_of(suite, tokenizer, {0: texts}, {"name": "right", "same": "equations"})
    assert [e["sample"] for e in kept] == [0, 2]


# --- R-Tuning ---


def test_the_word_is_by_the_share_of_right_samples(suite, tokenizer):
    questions = suite.questions("train")
    said = {i: [f"#{questions[i].answer}"] * n + ["#999"] * (4 - n) for i, n in enumerate((4, 2, 1, 0))}
    ours = {"name": "r_tuning", "ask": "?", "sure": "1", "unsure": "0"}
    for threshold, words in ((0.5, "1100"), (0.25, "1110"), (1.0, "1000")):
        found = examples_of(suite, tokenizer, said, {**ours, "threshold": threshold})
        assert [e["completion"] for e in found] == [f"{questions[i].solution}?{word}" for i, word in enumerate(words)]
        assert [e["score"] for e in found] == [1.0, 0.5, 0.25, 0.0]
    assert RTuning().sure == " I am sure."
    with pytest.raises(UserError, match="threshold is 0"):
        build(Selection, {"rewrite": {"name": "r_tuning", "threshold": 0}})


# --- LEMMA ---


def test_a_correction_is_error_reflection_and_the_right_way(suite, tokenizer):
    q = suite.questions("train")[0]
    first, second = str(q.solution).split(",")
    wrong = f"{first},1+1=3,3+1=4#99"
    lemma = {"name": "lemma", "step": ",", "phrases": ["!"]}
    fixed, anew = f"{first},1+1=3,!,{second}", f"{first},1+1=3,!,{first},{second}"
    for which, texts in (("both", [fixed, anew]), ("continue", [fixed]), ("restart", [anew])):
        found = examples_of(suite, tokenizer, {0: [wrong]}, {**lemma, "correction": which})
        assert [e["completion"] for e in found] == texts
        assert all(suite.verify(q, e["completion"]) == 1.0 for e in found)
        assert [tokenizer.decode(e["tokens"][e["prompt_length"] :], special=True) for e in found] == [
            text + "\n" for text in texts
        ]


def test_a_correction_follows_the_right_sample_that_agrees_the_longest(suite, tokenizer):
    q = suite.questions("train")[0]
    first, second = str(q.solution).split(",")
    said = {0: [f"#{q.answer}", f"{first},#{q.answer}", f"{first},1=2"]}
    found = examples_of(suite, tokenizer, said, {"name": "lemma", "step": ",", "phrases": ["!"]})
    assert found[0]["completion"] == f"{first},1=2,!,#{q.answer}"
    assert second


def test_what_a_correction_cannot_be_made_of_is_left_out(suite, tokenizer):
    q = suite.questions("train")[0]
    first = str(q.solution).split(",")[0]
    # The answer stands in the wrong step; nothing is wrong but the end that lacks; a sample that was cut off.
    said = {0: ["#999,1=1", first, f"{first},1=2…"]}
    assert examples_of(suite, tokenizer, said, {"name": "lemma", "step": ",", "phrases": ["!"]}) == []
    assert agree(["a", "b"], ["a", "c"]) == 1


# --- critiques ---


def test_a_critique_is_of_the_question_and_the_sample(suite, tokenizer):
    q = suite.questions("train")[0]
    rewrite = {"name": "critique", "ask": "{question}{solution}!", "right": "1", "wrong": "0,{worked}"}
    found = examples_of(suite, tokenizer, {0: [f"#{q.answer}", "#999", "#998…"]}, rewrite)
    assert [e["prompt"] for e in found] == [f"\n{q.text}#{q.answer}!", f"\n{q.text}#999!"]
    assert [e["completion"] for e in found] == ["1", f"0,{q.solution}"]
    for e in found:
        assert tokenizer.decode(e["tokens"], special=True) == f"{e['prompt']}{e['completion']}\n"
        assert tokenizer.decode(e["tokens"][: e["prompt_length"]], special=True) == e["prompt"]
    with pytest.raises(UserError, match=r"ask lacks \{solution\}"):
        build(Selection, {"rewrite": {"name": "critique", "ask": "{question}"}})


# --- TRICE ---


def gradients(probabilities, right, rounds, seed, *, control_variate):
    """The estimate of the gradient of log p(y) by z's logits, a round: z of one question each, p over z in all alike.

    The last question is looked at; the others are what its β is made of.
    """
    rng, K = np.random.default_rng(seed), len(probabilities)
    M, S = 4, 2
    posterior = probabilities * right / (probabilities * right).sum()
    found = []
    for _ in range(rounds):
        memory = rng.choice(K, M, p=posterior)
        proposals = rng.choice(K, (M, S), p=probabilities)
        memories, (kept, proposed) = trice_weights(
            np.ones(M, bool), right[proposals].astype(bool), control_variate=control_variate
        )
        estimate = np.zeros(K)
        for s in range(S):
            z = memory[-1] if memories[-1, s] == -1 else proposals[-1, memories[-1, s]]
            for value, weight in ((z, kept[-1, s]), (proposals[-1, s], proposed[-1, s])):
                estimate += weight * (np.eye(K)[value] - probabilities)  # ∇ log p(z) by the logits
        found.append(estimate)
    return np.array(found), posterior - probabilities  # the posterior's mean of ∇ log p(z)


@pytest.mark.parametrize(("shares", "right"), [((0.5, 0.3, 0.2), (1, 0, 1)), ((0.6, 0.35, 0.05), (1, 1, 0))])
def test_the_control_variate_changes_no_mean_and_lowers_the_variance(shares, right):
    probabilities, right = np.array(shares), np.array(right)
    variances = {}
    for control in (False, True):
        found, truth = gradients(probabilities, right, 20_000, seed=3, control_variate=control)
        error = np.sqrt(found.var(axis=0) / len(found))
        assert (np.abs(found.mean(axis=0) - truth) < 4 * error + 1e-12).all(), (control, found.mean(axis=0), truth)
        variances[control] = found.var(axis=0).sum()
    # With 70 % and with 95 % of the proposals right: the more of them are, the more of the variance goes.
    assert variances[True] < (0.85 if right.tolist() == [1, 0, 1] else 0.25) * variances[False]


def test_where_all_proposals_are_right_nothing_is_left_to_learn():
    memories, (kept, proposed) = trice_weights(np.ones(3, bool), np.ones((3, 2), bool))
    assert memories.tolist() == [[0, 1]] * 3
    np.testing.assert_allclose(kept + proposed, 0.0)


def test_a_question_has_no_memory_before_its_first_right_proposal():
    right = np.array([[0, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    memories, (kept, proposed) = trice_weights(np.array([False, False, True]), right)
    assert memories.tolist() == [[-2, 1, 1], [-2, -2, -2], [0, 1, 2]]
    np.testing.assert_allclose(kept * 3, [[0, 1, 1], [0, 0, 0], [1, 1, 1]])
    # Question 1 alone proposes in the first step; its first memory has nothing subtracted.
    np.testing.assert_allclose(proposed * 3, [[0, 0, -1], [0, 0, 0], [0, -1, 0]])


def test_the_memory_goes_from_round_to_round(suite, tokenizer):
    a, b = suite.questions("train")[:2]
    right = {0: [f"#{a.answer}", "#9"], 1: [str(b.solution), f"#{b.answer}"]}
    first = examples_of(suite, tokenizer, right, {"name": "trice"})
    kept = [(e["question_id"] == a.id, e["completion"], e["weight"]) for e in first]
    assert kept == [
        # The other question's proposal is right: β is 1 in the second step.
        (True, "#9", -0.5), (True, f"#{a.answer}", 1.0), (False, b.solution, 0.5), (False, f"#{b.answer}", 0.5),
    ]  # fmt: skip
    later = {0: ["#8…", "#9"], 1: ["#7", f"#{b.answer}"]}
    second = examples_of(suite, tokenizer, later, {"name": "trice"}, earlier=first)
    assert [(e["completion"], e["weight"], e["score"]) for e in second] == [
        ("#9", -0.5, 0.0), (f"#{a.answer}", 1.0, 1.0), (f"#{b.answer}", 1.0, 1.0),
    ]  # fmt: skip
    assert second[1]["tokens"] == first[1]["tokens"]
    said = {0: ["#8…"], 1: [f"#{b.answer}"]}
    third = examples_of(suite, tokenizer, said, {"name": "trice"}, earlier=first)
    (cut,) = (e for e in third if e["completion"] == "#8")
    assert cut["tokens"][-1] != EOS_ID, "a proposal without an end is not made to end"


def test_a_memory_that_a_proposal_without_an_end_repeats_is_kept(suite, tokenizer):
    a, b = suite.questions("train")[:2]
    said = {0: [f"#{a.answer}", f"#{a.answer}…"], 1: [f"#{b.answer}"] * 2}
    found = examples_of(suite, tokenizer, said, {"name": "trice"})
    assert [(e["completion"], e["weight"], e["tokens"][-1] == EOS_ID) for e in found if e["question_id"] == a.id] == [
        (f"#{a.answer}", -0.5, False), (f"#{a.answer}", 1.0, True),
    ]  # fmt: skip


def test_trice_needs_an_objective_that_takes_its_weights():
    values = {
        "model": {"random": {"hidden_size": 8}},
        "tasks": {"families": [{"family": "gcd", "domain": "id", "train": 4}]},
        "methods": {"a": {"selection": {"rewrite": {"name": "trice"}}}},
    }
    with pytest.raises(UserError, match=r"methods\.a\.sft\.objective=\{name: signed\}"):
        build(Improve, values)
    values["methods"]["a"]["sft"] = {"objective": {"name": "signed"}}
    config = build(Improve, values)
    assert to_dict(config.block("a", "selection").rewrite)["name"] == "trice", "other keys than the default's"
