"""reasoning-gym's `codeio` mended: it runs programs of its own collection, some of which differ from run to run.

Of 700 of its 3,002 programs 26 gave other results under another hash seed, and two gave results that JSON cannot hold;
some print or warn; and two data sets opened for different difficulties share one list.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import warnings
from typing import Any

# What a result may depend on beside its input: the order of a set, the time, a generator of nobody's seed, memory.
UNSTABLE = frozenset(
    {
        *("set", "frozenset", "hash", "id", "time", "datetime", "uuid", "secrets", "os", "sys", "globals"),
        *("open", "Path", "pathlib", "shutil", "input", "eval", "exec"),  # and what would reach out of the program
        *("random", "empty", "where", "tempfile", "threading", "subprocess", "symbols", "__hash__"),
    }
)


@functools.lru_cache(maxsize=4096)
def is_determined(code: str) -> bool:
    """Whether source names nothing that could make two runs differ.

    Example:
      >>> is_determined("def f(x): return sorted(x)"), is_determined("def f(x): return list({*x})")
      (True, False)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(code)
        except SyntaxError:
            return False
    for node in ast.walk(tree):
        match node:
            case ast.Set() | ast.SetComp():
                return False
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=name) if name in UNSTABLE:
                return False
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                parts = {part for alias in names for part in alias.name.split(".")}
                if UNSTABLE & parts or getattr(node, "module", None) in UNSTABLE:
                    return False
    return True


def mend(dataset: Any) -> None:
    """Make a data set give equal items in every process; what cannot be is marked in its metadata, and left out."""
    original = type(dataset)
    rows = original._jsonl_data

    class Mended(original):
        def __getitem__(self, idx: int) -> dict:
            original._jsonl_data = rows  # the class keeps those of whichever was opened last
            self.determined = True
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                try:
                    entry = super().__getitem__(idx)
                except TypeError:  # a result that JSON cannot hold
                    entry, self.determined = {"question": "", "answer": "", "metadata": {}}, False
            entry["metadata"]["determined"] = self.determined
            return entry

        def _generate_io_pair(self, main_code: str, input_generator_code: str, *rest: Any) -> tuple[Any, Any]:
            self.determined = is_determined(main_code) and is_determined(input_generator_code)
            if not self.determined:
                return {}, {}
            found = super()._generate_io_pair(main_code, input_generator_code, *rest)
            self.determined = found != ({}, {})  # what a program that raised gives
            return found

    dataset.__class__ = Mended


def is_sound(entry: Any) -> bool:
    """Whether an item may be asked."""
    return entry["metadata"]["determined"]


def same_json(answer: str, gold: str) -> bool:
    """Whether an answer is the gold one as JSON; the data set's scorer pays nearly full marks for near misses.

    Example:
      >>> same_json('It is {"n": 2}', '{"n": 2}'), same_json('{"n": 2913}', '{"n": 2912}')
      (True, False)
    """
    wanted = json.loads(gold)
    for text in (answer.strip(), answer[answer.find("{") : answer.rfind("}") + 1]):
        try:
            return json.loads(text) == wanted
        except json.JSONDecodeError:
            continue
    return answer.strip() == gold.strip()
