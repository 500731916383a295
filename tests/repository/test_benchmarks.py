"""Benchmarks run by the command that their first line says, from any folder and without a variable."""

import re

import pytest
from helpers import ROOT

PROGRAMS = [
    path for path in sorted((ROOT / "benchmarks").glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_program_finds_the_stack_it_measures(path):
    text = path.read_text()
    if re.search(r"^ *(from|import) train\b", text, re.MULTILINE):
        assert "sys.path.insert(0, " in text, "`train` is the checkout's, and no installed package"
