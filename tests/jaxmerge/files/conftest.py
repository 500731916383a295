"""The folder that tests of vocabularies work in."""

import pytest
from helpers.tiny_vocabularies import folder, words


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Three word-level models; <|im|> is special in two, `extra` added in one, `shared` in the second and third."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base", words(["a", "b", "c", "d"], ["<|im|>"]), 0)
    folder(tmp_path / "one", words(["d", "a", "x", "shared"], ["<|im|>", "extra"]), 1)
    folder(tmp_path / "two", words(["shared", "y", "b"], ["<|end|>"]), 2)
    return tmp_path
