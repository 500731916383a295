"""Solutions to be judged: what the miniature learns to score is right where it says so, and in a search's own form."""

import itertools
import types
from collections import Counter
from random import Random

import pytest

from train.generate.slots import Completion
from train.generate.stops import Stops
from train.log import UserError
from train.models.characters import decode, encode, write_tokenizer
from train.models.tokenizer import Tokenizer
from train.search.ask import Ask, Reply
from train.search.examples import whole
from train.search.prompts import load_prompts
from train.search.read import read_score, read_step
from train.search.voice import Voice
from train.tasks import FamilySpec, Ingredient, build_suite, held_out, pretraining_examples, pretraining_rows, render
from train.tasks.judged import JudgedTask, shown

ARGS = {"min_value": 1, "max_value": 40}
SPEC = FamilySpec("gcd", "id", ARGS, train=40)


def drawn(seed=0, count=400):
    return list(JudgedTask("judge:gcd").draw(ARGS, seed, count))


def test_scores_say_what_the_last_step_is():
    counts = Counter()
    for text, score, solution, entry in drawn():
        _, work, answer = render(entry)
        right, steps = (work + answer).split(","), text.partition("?")[2].removesuffix("!").split(",")
        *before, last = steps
        assert before == right[: len(before)], "a search has judged these before"
        true = right[len(before)]
        wanted = 0 if last != true else 10 if len(steps) == len(right) else 7
        came = last.split("=")[-1]
        assert (score, solution) == (f"score:{wanted}", f"{true}:{came};score:{wanted}"), (text, right)
        assert (came != true.split("=")[-1]) == (wanted == 0)
        counts[wanted] += 1
    assert 0.4 < counts[0] / 400 < 0.6
    assert min(counts.values()) > 40


def test_a_draw_is_the_same_again_and_another_with_another_seed():
    assert drawn(count=20) == drawn(count=20)
    assert [d[0] for d in drawn(count=20)] != [d[0] for d in drawn(seed=1000, count=20)]


def test_questions_left_out_of_pretraining_are_left_out_of_what_is_judged():
    kept = held_out(build_suite([SPEC], seed=1, style="compact"))

    def questions(excluded):
        stream = pretraining_examples([Ingredient("judge:gcd", 1.0, ARGS)], seed=0, excluded=excluded)
        return {text.partition("?")[0] + "?" for text in itertools.islice(stream, 3000)}

    assert questions(frozenset()) & kept
    assert not questions(kept) & kept


def test_what_is_judged_is_not_learnt():
    """Half of it is wrong."""
    ingredient = Ingredient("judge:gcd", 1.0, ARGS, learn="solution")
    rows, learnt = pretraining_rows([ingredient], 4000, seed=0)
    texts = "".join(decode(row[mask]) for row, mask in zip(rows, learnt, strict=True))
    lines = [line for line in texts.split("\n") if line]
    assert {line.partition(";")[2] for line in lines} == {"score:0", "score:7", "score:10"}
    for step in {line.partition(":")[0].partition("#")[0] for line in lines}:
        left, right = step.split("=")
        assert int(left.split("%")[0]) % int(left.split("%")[1]) == int(right)
    assert learnt[:, 0].all()


def test_a_verdict_is_the_score_and_nothing_else():
    suite = build_suite([FamilySpec("judge:gcd", "id", ARGS, test=3)], seed=0, style="compact")
    for q in suite.all:
        assert suite.prompt(q) == "\n" + q.text
        assert suite.verify(q, q.answer + "\ng1,") == suite.verify(q, q.solution) == 1.0
        assert suite.verify(q, q.answer + "0") == 0.0
    with pytest.raises(UserError, match="'nothing' has no compact rendering"):
        build_suite([FamilySpec("judge:nothing", "id", {}, test=3)], seed=0, style="compact")


def test_a_search_asks_in_the_form_that_was_learnt():
    """Prompts of steps and scores are beginnings of texts the miniature was trained on; a plan is a solution."""
    prompts = load_prompts("compact")
    for q in build_suite([SPEC], seed=1, style="compact").all:
        steps = q.solution.split(",")
        for count in range(len(steps) + 1):
            said = {"question": q.text, "steps": steps[:count], "text": ",".join(steps[count:])}
            (asked,), _ = prompts.step.render(said)
            assert ("\n" + q.text + q.solution + ",").startswith(asked["content"])
            (judged,), prefix = prompts.score.render(said)
            assert judged["content"] + prefix == f"\n{q.text}{','.join(steps[:count])}!"
            if count:
                assert whole(prompts, said) == q.solution
        assert [read_step(Reply(step)) for step in steps] == [(step, "") for step in steps]
        assert [prompts.complete in step for step in steps] == [False] * (len(steps) - 1) + [True]
    *_, score = shown("48%18=12,18%12=6,12%6=0#6", Random(5))
    assert read_score(Reply(f"score:{score}")) == 1.0
    with pytest.raises(UserError, match=r"compact has no prompt hint; add it, or set search\.reflect=false"):
        load_prompts("compact", reflects=True)


@pytest.mark.parametrize(
    ("text", "reason", "score"),
    [("18%12=6:6;score:7\n", "eos", 0.7), ("18%12=6:6;sc", "length", None), ("score:7\n", "eos", None)],
)
def test_what_a_critic_thinks_first_is_no_score(tmp_path, text, reason, score):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    voice = types.SimpleNamespace(
        prompts=load_prompts("compact"), model=types.SimpleNamespace(tokenizer=tokenizer), begins={0: False},
        stops=lambda strings, begins: Stops(tokenizer, strings, begins=begins),
    )  # fmt: skip
    ask = Ask("r/score0", "score", "critic", {"question": "g48,18?", "steps": ["48%18=12", "18%12=6"]})
    reply = Voice.reply(voice, ask, Completion(0, tuple(encode(text)), (), reason))
    assert reply.tokens == len(text)
    assert read_score(reply) == score
