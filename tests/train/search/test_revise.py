"""Chains that are revised and texts about them, on scripted models: what is taken is right, and never longer."""

from __future__ import annotations

import itertools
import random
import types

import pytest
from helpers.scripts import play, subject
from helpers.tiny_tokenizers import CHATML, byte_level

from train.log import UserError
from train.models.tokenizer import Tokenizer
from train.resolve import build
from train.search.ask import Reply
from train.search.kinds import KINDS
from train.search.prompts import load_prompts
from train.search.read import read_verdict
from train.search.revise import doubted, reflect, retro, split
from train.search.settings import Drawing, Retro, SearchRun
from train.search.teach import critique, guidance
from train.search.voice import Voice

WAY = {"step": ";", "switches": ("Wait", "But"), "tries": 3}


class Said:
    """Chains as given, what follows a beginning by a function, and a verifier that looks for RIGHT."""

    def __init__(self, chains, follow=lambda begun, name: Reply("")):
        self.chains, self.follow, self.begun = list(chains), follow, []

    def __call__(self, ask):
        if ask.role == "verifier":
            return Reply(verdict=float("RIGHT" in ask.values["text"]))
        if "begun" in ask.values:
            self.begun.append(ask.values["begun"])
            return self.follow(ask.values["begun"], ask.name)
        return Reply(self.chains[int(ask.name.removeprefix("chain"))])


def texts(kind, said, count=1, **search):
    c = subject(judged=True, samples=count, **search)
    found, asked = play(kind(c), said)
    return [(s.text, s.verdict) for s in found.solutions], c, asked


# --- Retro-Search ---


def test_thoughts_are_the_text():
    text = "a;wait b;c;But d;"
    assert split(text, ";", WAY["switches"]) == ["a;", "wait b;c;", "But d;"]
    assert "".join(split(text, ";", WAY["switches"])) == text
    assert split("Wait a;b", ";", WAY["switches"]) == ["Wait a;b"], "a first thought changes none"


def test_an_abandoned_thought_that_leads_there_sooner_takes_the_chain_s_place():
    long = "think;But no;go on;Wait again;at last RIGHT"
    said = Said([long], lambda begun, name: Reply("so RIGHT" if begun == "think;" else "no"))
    assert texts(retro, said, retro=WAY)[0] == [("think;so RIGHT", 1.0)]
    said = Said([long], lambda begun, name: Reply("RIGHT" if begun.endswith("on;") else "no"))
    assert texts(retro, said, retro=WAY)[0] == [("think;But no;go on;RIGHT", 1.0)]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply("short"), ""),  # wrong
        (Reply("this is RIGHT and a good deal longer than what it would replace"), "path no shorter"),
        (Reply("RIGHT", "length"), "path no shorter"),
        (Reply("Wait RIGHT"), "thought changed again"),
        (Reply("", "context"), "chain context"),
    ],
)
def test_what_is_wrong_longer_cut_off_or_another_thought_is_not_taken(reply, why):
    long = "think;But no;go on RIGHT"
    found, c, asked = texts(retro, Said([long], lambda begun, name: reply), retro=WAY)
    assert found == [(long, 1.0)]
    assert not why or c.counts[why] >= 1
    tries = [a for a in asked if a.prompt == "chain" and "begun" in a.values]
    assert len(tries) == (1 if reply.reason == "context" else 3)


def test_wrong_chains_are_left_as_they_are():
    found, _, asked = texts(retro, Said(["think;But no"]), retro=WAY)
    assert found == [("think;But no", 0.0)]
    assert not [a for a in asked if "begun" in a.values]


def test_no_chain_is_ever_longer_or_wrong_after_it():
    rng = random.Random(4)
    words = ["x", "Wait y", "But z", "RIGHT", "longer words"]

    def some(most):
        return ";".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    shorter = 0
    for _ in range(200):
        chain = some(9)
        replies = {}
        said = Said(
            [chain], lambda begun, name, r=replies: r.setdefault(name, Reply(some(4), rng.choice(["eos", "length"])))
        )
        ((text, verdict),), _, _ = texts(retro, said, retro=WAY)
        assert len(text) <= len(chain)
        assert verdict == float("RIGHT" in chain)
        assert ("RIGHT" in text) == ("RIGHT" in chain)
        shorter += len(text) < len(chain)
    assert shorter > 20
    with pytest.raises(UserError, match="none is empty"):
        Retro(step="")


# --- LEMMA with corrections by the model ---


def test_a_doubt_stands_behind_the_first_step_that_no_right_chain_has():
    assert doubted("a;x;y", [["b"], ["a", "c"]], ";", "Wait.") == "a;x;Wait.;"
    assert doubted("a;x;y", [], ";", "Wait.") == "a;x;Wait.;", "before the answer, where nothing is known"
    assert doubted("a", [], ";", "Wait.") == ""
    assert doubted("a;b", [["a", "b", "c"]], ";", "Wait.") == "", "no step of it is wrong"


def test_corrections_that_come_out_right_stand_behind_the_chains():
    said = Said(["a;b RIGHT", "a;x;y", "z"], lambda begun, name: Reply("b RIGHT" if "a;x" in begun else "no"))
    way = {"step": ";", "phrase": "Wait.", "tries": 2}
    found, c, _ = texts(reflect, said, 3, reflection=way)
    fixed = ("a;x;Wait.;b RIGHT", 1.0)
    assert found == [("a;b RIGHT", 1.0), ("a;x;y", 0.0), ("z", 0.0), fixed, fixed]
    assert (c.counts["corrected"], c.counts["not corrected"]) == (2, 2)
    assert sorted(set(said.begun)) == ["a;x;Wait.;", "z;Wait.;"]


# --- critiques and guidance ---


def test_a_critique_is_right_if_its_conclusion_is_the_verdict():
    conclusions = {"a RIGHT": "fine. right", "b RIGHT": "hm. right? no: wrong", "c": "wrong", "d": "who knows"}

    def script(ask):
        if ask.prompt == "critique":
            return Reply(conclusions[ask.values["text"]])
        return Said(conclusions)(ask)

    c = subject(judged=True, samples=4)
    found, _ = play(critique(c), script)
    assert [(s.text, s.verdict) for s in found.solutions] == list(
        zip(conclusions.values(), (1.0, 0.0, 1.0, 0.0), strict=True)
    )
    assert {(s.prompt, s.about["text"]) for s in found.solutions} == {("critique", text) for text in conclusions}
    assert c.counts["no conclusion"] == 1
    assert read_verdict(Reply("right", "length"), ("right", "wrong")) is None


def test_guidance_is_right_if_the_answer_after_it_is():
    count = itertools.count()

    def script(ask):
        if ask.role == "verifier":
            return Reply(verdict=float("RIGHT" in ask.values["text"]))
        if ask.prompt == "guide":
            return Reply(f"way {next(count)}")
        assert ask.prompt == "follow"
        return Reply("RIGHT" if ask.values["text"] == "way 1" else "no")

    found, _ = play(guidance(subject(judged=True, samples=3)), script)
    assert [(s.text, s.verdict, s.prompt) for s in found.solutions] == [
        ("way 0", 0.0, "guide"), ("way 1", 1.0, "guide"), ("way 2", 0.0, "guide"),
    ]  # fmt: skip


def test_a_chain_goes_on_from_its_beginning_and_texts_may_be_as_long_as_those_they_stand_for():
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, chat_template=CHATML)
    model = types.SimpleNamespace(tokenizer=tokenizer, config=types.SimpleNamespace(context=4096))
    voice = object.__new__(Voice)  # without an engine
    given = {"prompts": load_prompts("mathematics"), "drawing": Drawing(chain=5, write=7), "seed": 0, "chain": None}
    voice.__dict__.update(given, model=model, temperatures={}, begins={}, read_tokens=0)
    c = subject()

    def said(ask):
        request = voice.request(0, "q", ask)
        assert request is not None
        return tokenizer.decode(request.prompt, special=True), request.max_new_tokens

    whole, most = said(c.ask("chain0", "chain"))
    assert (
        said(c.ask("chain0/thought1/0", "chain", begun="One.\n\n"))
        == (whole + "One.\n\n", most)
        == (whole + "One.\n\n", 5)
    )
    assert said(c.ask("a", "critique", text="x = 1"))[1] == said(c.ask("b", "guide"))[1] == 7
    assert said(c.ask("c", "follow", text="Add."))[1] == 5
    assert "x = 1" in said(c.ask("a", "critique", text="x = 1"))[0]
    voice.chain = lambda id, begun: (1, 2, len(begun))
    request = voice.request(0, "q", c.ask("chain0", "chain", begun="One."))
    assert request is not None
    assert request.prompt == (1, 2, 4)


def test_a_domain_without_the_prompts_of_a_kind_is_refused(tmp_path):
    for domain in ("code", "mathematics", "compact"):
        load_prompts(domain, needs=("critique", "guide", "follow"))
    text = "d: {step: &p {messages: [{role: user, content: q}]}, score: *p, chain: *p, write: *p, target: t}\n"
    (tmp_path / "mine.yaml").write_text(text)
    load_prompts("d", tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="d has no prompt guide; add it"):
        load_prompts("d", tmp_path / "mine.yaml", needs=("guide",))
    with pytest.raises(UserError, match=r"sampling\.source=critique"):
        build(SearchRun, {"model": {"path": "m"}, "questions": {"path": "q"}, "search": {"kind": "critique"}})
    assert set(KINDS) >= {"retro", "reflect", "critique", "guidance"}
