"""Path patterns: their meaning by a regular expression, and a time that no pattern can blow up."""

import random
import re
import time

import pytest

from jaxmerge.where import layer_paths, matches


def expression(pattern: str) -> str:
    """A pattern as a backtracking regular expression over a path with a slash behind it."""
    parts = pattern.strip("/").split("/")
    body = "".join(
        "(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") + "/"
        for part in parts
    )
    return f"{'^' if pattern.startswith('/') else '(?:^|/)'}(?P<run>{body})"


def test_patterns_mean_what_their_regular_expression_does():
    rng = random.Random(0)

    def drawn(letters: str) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 4)))

    hits = 0
    for _ in range(2000):
        parts = [rng.choice(("**", "*", drawn("ab*?"), drawn("ab*?[.\\"))) for _ in range(rng.randint(1, 4))]
        pattern = rng.choice(("", "/")) + "/".join(parts)
        path = "/".join(drawn("ab[.") for _ in range(rng.randint(1, 6)))
        found = re.search(expression(pattern), path + "/")
        assert matches(pattern, path) == (found is not None), (pattern, path)
        if found is not None:
            hits += 1
            head, tail = path[: found.end("run") - 1], path[found.end("run") :]
            wanted = "/".join(filter(None, (head, "0", tail))) if found.end("run") else f"/0/{path}"
            assert layer_paths(path, (1,), (pattern,)) == [wanted], (pattern, path)
    assert hits > 500


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*a" * 8 + "b", "a" * 60),
        ("*?a" * 8 + "b", "a" * 60),
        ("**/" * 7 + "z", "a/" * 40 + "b"),
        ("**/*a*a*a/" * 300 + "z", "a/" * 300 + "b"),
        ("*" * 20_000 + "b", "a" * 20_000),
    ],
)
def test_no_pattern_takes_for_ever(pattern, path):
    start = time.monotonic()
    assert not matches(pattern, path)
    assert time.monotonic() - start < 2
