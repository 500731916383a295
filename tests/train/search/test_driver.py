"""Many searches through one engine: slots, order and stops change no tree."""

import threading
import zlib
from concurrent.futures import Future

import pytest

from train.generate.slots import Completion
from train.log import UserError
from train.resolve import build
from train.runtime.jsonl import read_jsonl
from train.search.ask import Reply
from train.search.driver import AHEAD, Driver
from train.search.kinds import KINDS
from train.search.replies import Replies
from train.search.settings import Search
from train.search.subject import Subject
from train.search.voice import key_of


class FakeVoice:
    """Answers as a script says, each after some chunks of its own, in as many slots as it has."""

    def __init__(self, slots, seed=0):
        self.engine, self.slots, self.seed = self, slots, seed
        self.decoded = self.read_tokens = self.computed = 0
        self.most = 0

    def request(self, number, id, ask):
        return None if len(ask.values["steps"]) > 4 else (number, id, ask)

    def serve(self, more, *, between):
        queue, active, others = [], {}, True
        while True:
            came = more() if others else None
            others = came is not None
            queue += came or []
            if not others and not queue and not active:
                return
            while queue and len(active) < self.slots:
                number, id, ask = queue.pop(0)
                active[number] = 1 + zlib.crc32(f"{self.seed}{id}{ask.name}".encode()) % 5
            self.most = max(self.most, len(active))
            active = {n: left - 1 for n, left in active.items()}
            between()
            ended = [n for n, left in active.items() if left == 0]
            active = {n: left for n, left in active.items() if left}
            yield [Completion(n, (1,), (0.0,), "eos") for n in ended]

    def reply(self, ask, completion):
        name = f"{ask.name} {len(ask.values['siblings'])} {ask.values['hint']}"
        words = {"score": f"Score: {zlib.crc32(repr(ask.values['steps']).encode()) % 12}", "hint": f"after {ask.name}"}
        return Reply(words.get(ask.prompt, f"Say {name}"), completion.reason, 3)


def drive(path, slots, *, kind="mcts", count=30, order=1, stop_after=None, **settings):
    voice = FakeVoice(slots, seed=slots)
    search = build(Search, {"iterations": 6, "leaves": 2, **settings})
    subjects = [Subject(f"q{i}", "?", search, seed=5, judged=True) for i in range(count)][::order]
    found, chunks = {}, 0

    def between():
        nonlocal chunks
        chunks += 1
        if stop_after is not None and chunks > stop_after:
            raise InterruptedError

    with Replies(path) as log:
        roles = dict.fromkeys(("policy", "critic", "reflector"), voice)
        driver = Driver(roles, lambda id, ask: 1.0, log, on_end=lambda id, f: found.update({id: f.row()}))
        driver.run(((c.id, KINDS[kind](c)) for c in subjects), between=between)
    return found, driver, voice


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_order_change_no_tree(tmp_path, kind):
    wanted, driver, _ = drive(tmp_path / "a", 1, kind=kind)
    assert len(wanted) == 30
    for slots, order in ((7, 1), (64, -1)):
        found, other, _ = drive(tmp_path / f"{slots}", slots, kind=kind, order=order)
        assert found == wanted
        assert other.counts == driver.counts


def test_searches_begin_as_there_is_room_and_slots_are_full(tmp_path):
    _, driver, voice = drive(tmp_path / "a", 8, count=40)
    assert voice.most == 8
    assert max(driver.waiting, default=0) == 0
    starts = [row["id"] for row in read_jsonl(tmp_path / "a") if row["name"].startswith("r/step0/0")]
    assert len(starts) == 40
    first = [row["id"] for row in read_jsonl(tmp_path / "a")][:60]
    assert len(set(first)) <= AHEAD * 8 + 8  # not all forty at once


@pytest.mark.parametrize("chunks", [0, 3, 20, 60])
def test_a_search_that_was_stopped_goes_on_from_its_replies(tmp_path, chunks):
    wanted, undisturbed, _ = drive(tmp_path / "whole", 8)
    with pytest.raises(InterruptedError):
        drive(tmp_path / "cut", 8, stop_after=chunks)
    with (tmp_path / "cut").open("ab") as file:
        file.write(b'{"id": "q0", "na')  # a torn line, as a kill leaves it
    known = len(read_known(tmp_path / "cut"))
    found, driver, _ = drive(tmp_path / "cut", 3)
    assert found == wanted
    assert driver.counts["replayed"] == known
    asked = undisturbed.counts["replies"] + undisturbed.counts["verdicts"]
    assert driver.counts["replies"] + driver.counts["verdicts"] == asked - known
    assert sorted(map(str, read_jsonl(tmp_path / "cut"))) == sorted(map(str, read_jsonl(tmp_path / "whole")))


def read_known(path):
    return [line for line in path.read_text().split("\n")[:-1] if line.startswith('{"id"')]


def test_a_log_that_is_none_is_named(tmp_path):
    (tmp_path / "log").write_text('{"x": 1}\n')
    with pytest.raises(UserError, match=r"log: a line is no reply.*remove"):
        Replies(tmp_path / "log")


def test_keys_depend_on_seed_question_and_name():
    keys = {tuple(key_of(*about)) for about in ((0, "q", "r"), (1, "q", "r"), (0, "p", "r"), (0, "q", "s"))}
    assert len(keys) == 4
    assert key_of(0, "q", "r").shape == (2,)


def test_verdicts_may_come_later(tmp_path):
    """A future that is done only when nothing else is under way stops nobody."""
    made = []

    def verify(id, ask):
        made.append(Future())
        threading.Timer(0.01, made[-1].set_result, [1.0]).start()
        return made[-1]

    voice, found = FakeVoice(4), {}
    subjects = [Subject(f"q{i}", "?", Search(iterations=2), judged=True) for i in range(6)]
    with Replies(tmp_path / "log") as log:
        roles = dict.fromkeys(("policy", "critic", "reflector"), voice)
        driver = Driver(roles, verify, log, on_end=lambda id, f: found.update({id: f}))
        driver.run((c.id, KINDS["mcts"](c)) for c in subjects)
    assert len(found) == len(made) == 6
    assert all(f.solutions[0].verdict == 1.0 for f in found.values())
