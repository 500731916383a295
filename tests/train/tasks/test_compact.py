"""The compact style: renderings that are true, its symbols, pretraining without a question of the suite."""

import itertools

import numpy as np
import pytest
from helpers.suites import COMPACT

from train.log import UserError
from train.models.characters import EOS, EOS_ID, PAD_ID, SYMBOLS, decode, encode, write_tokenizer
from train.tasks import (
    MINIATURE,
    Ingredient,
    build_suite,
    held_out,
    pretraining_examples,
    pretraining_rows,
)
from train.tasks.compact import RENDERERS


@pytest.fixture(scope="module")
def compact():
    return build_suite(COMPACT, seed=1, style="compact")


# --- the compact style -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"source_dataset": "chain_sum", "expression": "12 + 7 - 5"}, "12+7-5?12+7=19,19-5=14#14"),
        ({"source_dataset": "chain_sum", "expression": "-3 - -4 + 9"}, "-3--4+9?-3--4=1,1+9=10#10"),
        ({"source_dataset": "products", "expression": "23 * 47"}, "23*47?23*40=920,23*7=161,920+161=1081#1081"),
        ({"source_dataset": "products", "expression": "5 * 0"}, "5*0?5*0=0#0"),
        ({"source_dataset": "gcd", "numbers": [48, 18]}, "g48,18?48%18=12,18%12=6,12%6=0#6"),
        ({"source_dataset": "lcm", "numbers": [12, 18]}, "l12,18?12*18=216,216/6=36#36"),
        (
            {"source_dataset": "number_sorting", "direction": "ascending", "original_numbers": ["31.0", "5", "12"]},
            "s31,5,12<?5:31,12;12:31;31#5,12,31",
        ),
        (
            {"source_dataset": "number_sorting", "direction": "descending", "original_numbers": ["1", "1", "2.5"]},
            "s1,1,2.5>?2.5:1,1;1:1;1#2.5,1,1",
        ),
        ({"source_dataset": "simple_geometry", "known_angles": [50.0, 60.0]}, "t50,60?180-50=130,130-60=70#70"),
    ],
)
def test_renderings(metadata, text):
    from train.tasks import render

    assert "".join(render({"metadata": metadata})) == text


def test_every_step_of_a_rendering_is_true(compact):
    checked = 0
    for q in compact.all:
        assert q.text.endswith("?")
        work, _, answer = q.solution.partition("#")
        assert answer == q.answer
        assert encode(q.text + q.solution + EOS)
        if q.family != "number_sorting":
            for step in work.split(","):
                left, right = step.split("=")
                a, op, b = _split(left)
                assert {"+": a + b, "-": a - b, "*": a * b, "%": a % b if b else None}[op] == int(right), q
                checked += 1
        gold = {
            # the generator's own answer, in its own form
            "number_sorting": lambda e: ",".join(f"{float(x):g}" for x in e["metadata"]["sorted_numbers"]),
        }.get(q.family, lambda e: e["answer"])(q.entry)
        assert answer == gold
    assert checked > 1000


def _split(step):
    for i, c in enumerate(step):
        if i and c in "+-*%":
            return int(step[:i]), c, int(step[i + 1 :])
    raise AssertionError(step)


def test_every_rendered_family_has_an_ingredient():
    assert {x.family for x in MINIATURE} == set(RENDERERS) - {"lcm"}  # the one never seen


def test_verdicts_on_compact_text(compact):
    q = compact.questions("test", domain="id")[0]
    assert compact.prompt(q) == EOS + q.text
    assert compact.verify(q, f"#{q.answer}\ng1,1?") == 1.0
    for text in (q.answer, f"#{q.answer}#", f"# {q.answer}", f"#0{q.answer}", f"\n#{q.answer}", "#"):
        assert compact.verify(q, text) == 0.0


# --- symbols and pretraining -------------------------------------------------------------------------------


def test_symbols():
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 64
    assert (SYMBOLS[PAD_ID], SYMBOLS[EOS_ID]) == ("<pad>", "\n")
    with pytest.raises(UserError, match="'Q' in 'Q' is none of the 64 symbols"):
        encode("Q")


def test_tokenizer_files_load_in_transformers_and_agree(tmp_path, compact):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 64
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD_ID, EOS_ID, EOS_ID)
    for q in compact.all[::20]:
        text = EOS + q.text + q.solution + EOS
        assert tokenizer(text).input_ids == encode(text)
        assert tokenizer.decode(encode(text)) == decode(encode(text)) == text
    every = "".join(SYMBOLS[1:])
    assert tokenizer.decode(tokenizer(every).input_ids) == every


def test_pretraining_holds_no_question_of_the_suite(compact):
    kept = held_out(compact)
    examples = list(itertools.islice(pretraining_examples(MINIATURE, seed=0, excluded=kept), 20_000))
    prompts = {e.partition("?")[0] + "?" for e in examples}
    assert not prompts & kept
    without = list(itertools.islice(pretraining_examples(MINIATURE, seed=0), 20_000))
    assert {e.partition("?")[0] + "?" for e in without} & kept, "nothing would have leaked: the test shows nothing"


def test_pretraining_knows_small_gcd_only():
    examples = itertools.islice(pretraining_examples(MINIATURE, seed=0), 5_000)
    numbers = [int(n) for e in examples if e.startswith("g") for n in e[1:].partition("?")[0].split(",")]
    most = next(x for x in MINIATURE if x.family == "gcd").args["max_value"]
    assert len(numbers) > 0
    assert max(numbers) <= most < 130


def test_pretraining_rows_hold_whole_true_examples(compact):
    rows, learnt = pretraining_rows(MINIATURE, 50_000, seed=0, excluded=held_out(compact))
    np.testing.assert_array_equal(learnt, rows != PAD_ID)
    assert rows.shape[1] == 96
    assert rows.dtype == np.uint8
    assert 50_000 <= (rows != PAD_ID).sum() < 50_096
    assert (rows == PAD_ID).mean() < 0.1
    seen = dict.fromkeys((x.family for x in MINIATURE), 0)
    for row in rows[:200]:
        text = decode(row)
        assert text[0] == text[-1] == EOS
        for example in text[1:-1].split(EOS):
            assert example.count("?") == example.count("#") == 1
            seen[{"g": "gcd", "s": "number_sorting", "t": "simple_geometry"}.get(example[0], "chain_sum")] += 1
    assert all(n for family, n in seen.items() if family != "products")
    again, _ = pretraining_rows(MINIATURE, 50_000, seed=0, excluded=held_out(compact))
    np.testing.assert_array_equal(rows, again)
    other, _ = pretraining_rows(MINIATURE, 50_000, seed=1, excluded=held_out(compact))
    assert not np.array_equal(rows, other)


def test_pretraining_mistakes():
    with pytest.raises(UserError, match="positive number"):
        Ingredient("gcd", 0.0)
    with pytest.raises(UserError, match="no ingredients"):
        pretraining_rows([], 100, seed=0)
    with pytest.raises(UserError, match="held out or longer than a row of 8"):
        next(pretraining_examples([Ingredient("gcd", 1.0, {"min_value": 1000, "max_value": 2000})], seed=0, row=8))
