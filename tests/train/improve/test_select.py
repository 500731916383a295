"""One round's steps on values made by hand: who is selected and why, what is learnt, what is merged."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_tokenizers import llama_like

from train.evaluate import answer
from train.evaluate.change import by_layer
from train.improve import select as rounds
from train.improve.settings import Selection
from train.log import UserError
from train.models.characters import EOS_ID, write_tokenizer
from train.models.tokenizer import Tokenizer
from train.tasks import FamilySpec, build_suite


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def suite():
    return build_suite(
        [FamilySpec("gcd", "id", {"min_value": 1, "max_value": 60}, train=8, test=4)], seed=0, style="compact"
    )


@pytest.fixture(scope="module")
def questions(suite):
    return suite.questions("train")


def sample(tokenizer, question, text, index=0, reason="eos"):
    tokens = tokenizer.encode(text) + ([EOS_ID] if reason == "eos" else [])
    return {"question_id": question.id, "sample": index, "text": text, "tokens": tokens, "reason": reason}


def select(suite, tokenizer, questions, samples, config=None, **more):
    scored = answer.verify(suite, {q.id: q for q in questions}, samples)
    return rounds.select(suite, tokenizer, questions, scored, config or Selection(), seed=0, **more)


def test_right_finished_and_new_samples_are_kept(suite, tokenizer, questions):
    a, b = questions[:2]
    samples = [
        sample(tokenizer, a, a.solution, 0),
        sample(tokenizer, a, a.solution, 1),  # the same again
        sample(tokenizer, a, f"#{a.answer}", 2),  # right, by another way
        sample(tokenizer, a, "#99999", 3),
        sample(tokenizer, b, b.solution, 0, reason="length"),
    ]
    examples, counts = select(suite, tokenizer, questions, samples)
    assert [(e["question_id"], e["sample"]) for e in examples] == [(a.id, 0), (a.id, 2)]
    assert {k: counts[k] for k in ("sampled", "correct", "duplicates", "unfinished", "kept", "unjudged")} == {
        "sampled": 5,
        "correct": 4,
        "duplicates": 1,
        "unfinished": 1,
        "kept": 2,
        "unjudged": 0,
    }
    assert counts["questions_solved"] == 2
    assert {e["reason"] for e in counts["examples"]} == {"kept", "wrong", "unfinished"}


def test_the_examples_of_a_report_are_of_different_questions(suite, tokenizer, questions):
    wrong = [sample(tokenizer, q, f"#{90000 + i}", i) for q in questions[:6] for i in range(3)]
    right = [sample(tokenizer, q, text, 9) for q in questions[:3] for text in (q.solution, f"#{q.answer}")]
    _, counts = select(suite, tokenizer, questions, wrong + right)
    shown = [(e["accepted"], e["question"]) for e in counts["examples"]]
    assert shown == [(True, q.text) for q in questions[:3]] + [(False, q.text) for q in questions[: rounds.SHOWN]]
    assert all(e["answer"] == {q.text: q.answer for q in questions}[e["question"]] for e in counts["examples"])


def test_an_example_is_prompt_completion_and_one_end(suite, tokenizer, questions):
    a = questions[0]
    for reason in ("eos", "stop"):
        row = sample(tokenizer, a, a.solution, reason=reason)
        if reason == "stop":  # the stop string's own tokens follow
            row["tokens"] = row["tokens"] + tokenizer.encode("g1")
        (example,), _ = select(suite, tokenizer, questions, [row])
        text = tokenizer.decode(example["tokens"], special=True)
        assert text == "\n" + a.text + a.solution + "\n"
        assert tokenizer.decode(example["tokens"][: example["prompt_length"]], special=True) == example["prompt"]


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_an_example_reads_as_prompt_and_text_in_any_tokenizer(suite, questions, kind):
    """A sample cut at a stop string and a worked solution are joined to the prompt without a space between."""
    ours, a = llama_like(kind), questions[0]
    prompt = answer.prompt_tokens(suite, ours, a)
    row = {"question_id": a.id, "sample": 0, "text": a.solution, "tokens": [], "reason": "stop"}
    worked = {**row, "text": "none", "reason": "length"}
    for rows, config in (([row], Selection()), ([worked], Selection(real_ratio=1.0))):
        (example, *_), _ = select(suite, ours, questions, rows, config)
        assert example["tokens"][: example["prompt_length"]] == prompt
        assert ours.decode(example["tokens"]) == example["prompt"] + example["completion"]
        assert (example["tokens"].count(1), example["tokens"].count(2)) == (1, 1)


def test_limit_per_question_and_earlier_rounds(suite, tokenizer, questions):
    a = questions[0]
    samples = [sample(tokenizer, a, a.solution, 0), sample(tokenizer, a, f"#{a.answer}", 1)]
    examples, counts = select(suite, tokenizer, questions, samples, Selection(per_question=1))
    assert len(examples) == 1
    assert counts["over_limit"] == 1
    again, counts = select(suite, tokenizer, questions, samples, earlier=examples)
    assert [e["sample"] for e in again] == [0, 1]
    assert (counts["earlier"], counts["duplicates"], counts["kept"]) == (1, 1, 1)


def test_the_limit_per_question_is_of_all_rounds_learnt_from(suite, tokenizer, questions):
    a, b = questions[:2]
    first, _ = select(suite, tokenizer, questions, [sample(tokenizer, a, a.solution)], Selection(per_question=1))
    later = [sample(tokenizer, a, f"#{a.answer}"), sample(tokenizer, b, b.solution)]
    # Twice, as rounds that each hold those before them once gave it.
    found, counts = select(suite, tokenizer, questions, later, Selection(per_question=1), earlier=first * 2)
    assert [e["question_id"] for e in found] == [a.id, b.id]
    assert (counts["earlier"], counts["over_limit"], counts["kept"], counts["examples_written"]) == (1, 1, 1, 2)
    worked = [{**first[0], "sample": -1}]  # the generator's, in place of the model's own
    found, _ = select(suite, tokenizer, questions, later, Selection(per_question=1), earlier=worked)
    assert len(found) == 3


def test_real_data_takes_the_place_of_samples(suite, tokenizer, questions):
    samples = [sample(tokenizer, q, q.solution) for q in questions]
    for ratio in (0.0, 0.5, 1.0):
        examples, counts = select(suite, tokenizer, questions, samples, Selection(real_ratio=ratio))
        real = [e for e in examples if e["sample"] == -1]
        assert len(real) == counts["real"] == ratio * len(questions)
        assert len(examples) == len({e["question_id"] for e in examples}) == len(questions)
        assert all(suite.verify({q.id: q for q in questions}[e["question_id"]], e["completion"]) == 1.0 for e in real)
    first = rounds.real_questions(questions, 0.5, seed=1)
    assert first == rounds.real_questions(questions, 0.5, seed=1) != rounds.real_questions(questions, 0.5, seed=2)


def test_few_shot_prompts_show_other_questions(suite, tokenizer, questions):
    text = answer.prompt_text(suite, tokenizer, questions[0], shots=2)
    assert questions[0].text in text
    assert questions[1].text in text
    with pytest.raises(UserError, match=r"few_shot=20: family gcd has 7"):
        answer.prompt_text(suite, tokenizer, questions[0], shots=20)


def test_chat_questions_need_a_chat_template(tokenizer):
    chats = build_suite([FamilySpec("chain_sum", "id", {}, train=2)], seed=0, style="instruct")
    with pytest.raises(UserError, match="no chat template"):
        answer.prompt_text(chats, tokenizer, chats.questions("train")[0])


def params(value):
    return {"model": {"layers": {str(i): {"mlp": {"weight": np.full((2, 2), value, np.float32)}} for i in range(2)}}}


def test_change_is_relative_and_by_layer():
    assert by_layer(params(3.0), params(2.0)) == {
        "model/layers/0": pytest.approx(0.5),
        "model/layers/1": pytest.approx(0.5),
    }
