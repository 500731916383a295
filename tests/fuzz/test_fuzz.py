"""The fuzzer itself: a few mutants of every kind keep the rules, and what breaks a rule is told as what it is."""

import logging
import random
import signal
import time
import warnings

import pytest
from fuzz import run
from fuzz.kinds import KINDS, Kind
from fuzz.mutate import mutate

from train.log import UserError, set_quiet

MUTANTS = 15


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """The fuzzer sets handlers, levels and the folder of a process of its own: here they are put back."""
    monkeypatch.chdir(tmp_path)
    quiet, level = set_quiet(True), logging.getLogger("absl").level
    handler = signal.getsignal(signal.SIGALRM)
    with warnings.catch_warnings():
        yield
    signal.signal(signal.SIGALRM, handler)
    logging.getLogger("absl").setLevel(level)
    set_quiet(quiet)


@pytest.mark.parametrize("name", KINDS)
def test_a_few_mutants_of_every_kind_keep_the_rules(apart, name):
    found = run.try_batch(name, 0, MUTANTS)
    assert [seed for seed, _, _ in found] == list(range(MUTANTS))
    assert {verdict for _, verdict, _ in found} <= {"read", "refused"}, found
    assert "refused" in {verdict for _, verdict, _ in found}, "damage that nobody notices is none"


def keep(_):
    """Read anything."""


def fail(error):
    def read(_):
        raise error

    return read


def wait(_):
    time.sleep(5)


def litter(folder):
    (folder / "left").mkdir()
    (folder / "left" / "file").write_text("")


BROKEN = {
    "traceback": (fail(KeyError("a.txt")), keep),
    "unnamed": (fail(ValueError("math domain error")), keep),
    "lines": (fail(ValueError("a.txt:\nno")), keep),
    "long": (fail(UserError("a.txt " + "x" * 2000)), keep),
    "hang": (wait, keep),
    "litter": (litter, keep),
    "taken": (keep, fail(OSError())),
    "refused": (fail(UserError("a.txt: no")), fail(OSError())),
    "read": (keep, keep),
}


@pytest.mark.parametrize("verdict", BROKEN)
def test_what_breaks_a_rule_is_told(apart, tmp_path, monkeypatch, verdict):
    monkeypatch.setattr(run, "SECONDS", 0.2)
    signal.signal(signal.SIGALRM, run._ring)
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    read, refuses = BROKEN[verdict]
    kind = Kind(lambda _: None, ("*.txt",), read, refuses)
    assert run.try_mutant("any", kind, tmp_path, 0)[0] == verdict
    assert (tmp_path / "a.txt").read_bytes() == b"0123456789"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("data", [b'{"a": [1, {"b": null}], "c": "d"}', b"plain text", b"", bytes(300)])
def test_damage_is_a_function_of_its_seed(data):
    made = [mutate(data, random.Random(seed)) for seed in range(200)]
    assert made == [mutate(data, random.Random(seed)) for seed in range(200)]
    assert sum(mutant != data for mutant in made) > (150 if data else 50)
    assert len(set(made)) > (20 if data else 1)
