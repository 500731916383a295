"""Pairs of answers as people keep them: texts, messages, whole conversations, labels; what is refused."""

import pytest

from train.data.formats import detect, read_row
from train.data.records import columns, digest, from_columns
from train.log import UserError

USER = [{"role": "user", "content": "2+2?"}]
FOUR, FIVE = ([{"role": "assistant", "content": text}] for text in ("4", "5"))
TEXTS = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


def contents(record):
    return [m["content"] for m in record.messages]


@pytest.mark.parametrize(
    ("row", "messages", "plain"),
    [
        (TEXTS, ["2+2=", "4"], True),
        ({"chosen": "H: 2+2? A: 4", "rejected": "H: 2+2? A: 5"}, ["H: 2+2? A:", " 4"], True),
        ({"prompt": USER, "chosen": FOUR, "rejected": FIVE}, ["2+2?", "4"], False),
        ({"prompt": USER, "chosen": "4", "rejected": "5"}, ["2+2?", "4"], False),
        ({"prompt": "2+2?", "chosen": FOUR, "rejected": FIVE}, ["2+2?", "4"], False),
        ({"chosen": USER + FOUR, "rejected": USER + FIVE}, ["2+2?", "4"], False),
        ({"prompt": "2+2?", "chosen": USER + FOUR, "rejected": USER + FIVE}, ["2+2?", "4"], False),
        ({"prompt": USER, "chosen": USER + FOUR, "rejected": USER + FIVE}, ["2+2?", "4"], False),
    ],
)
def test_a_pair_is_the_chosen_answer_with_the_rejected_one_beside_it(row, messages, plain):
    record = read_row(row)
    assert contents(record) == messages
    assert record.plain == plain
    assert record.rejected.strip() == "5"
    (stored,) = columns([record])
    assert from_columns(stored) == record
    alone = read_row(row, "chosen")
    assert contents(alone) == messages
    assert not alone.rejected
    assert alone.id == digest(alone) != record.id
    assert read_row({**row, "prompt_id": "p7"}).id == "p7"


def test_an_earlier_turn_is_part_of_the_prompt():
    start = [*USER, *FOUR, {"role": "user", "content": "And 3+3?"}]
    end = [[{"role": "assistant", "content": text}] for text in ("6", "7")]
    record = read_row({"chosen": start + end[0], "rejected": start + end[1]})
    assert contents(record) == ["2+2?", "4", "And 3+3?", "6"]
    assert record.rejected == "7"


def test_labels():
    good = read_row({"prompt": "2+2=", "completion": "4", "label": True})
    bad = read_row({"prompt": USER, "completion": FIVE, "label": False})
    assert (good.reward, good.plain, contents(good)) == (1.0, True, ["2+2=", "4"])
    assert (bad.reward, bad.plain, contents(bad)) == (-1.0, False, ["2+2?", "5"])
    assert detect({"prompt": 0, "completion": 0, "label": 0}) == "labelled"
    assert detect({"prompt": 0, "completion": 0}) == "prompt"
    assert detect(TEXTS) == "pairs"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**TEXTS, "rejected": "4"}, "the same answer, '4'"),
        ({**TEXTS, "rejected": ""}, "the rejected answer is empty"),
        ({**TEXTS, "rejected": FIVE}, "two texts or two lists"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt, and chosen and rejected begin otherwise"),
        ({"chosen": FOUR, "rejected": FIVE}, "there is no prompt; give one"),
        ({"prompt": "3+3?", "chosen": USER + FOUR, "rejected": USER + FIVE}, r"data\.ignore=\[prompt\]"),
        ({"chosen": USER + FOUR, "rejected": USER + FIVE + USER}, "rejected: after what the two answers share come"),
        ({"chosen": USER + FOUR, "rejected": [*USER, {"role": "robot", "content": "5"}]}, "rejected: message 1: role"),
        ({**TEXTS, "score_chosen": 9.0}, r"'score_chosen' is not understood.*data\.ignore=\[score_chosen\]"),
        ({"prompt": "2+2=", "completion": "4", "label": "yes"}, "label is 'yes'; true or false is wanted"),
        ({"prompt": 3, "completion": FOUR, "label": 1}, "prompt: messages is 3"),
    ],
)
def test_what_is_no_pair_is_refused(row, said):
    with pytest.raises(UserError, match=said):
        read_row(row)
