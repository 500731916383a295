"""The one reader of JSON and YAML: what it takes, and what it refuses in one line before anything is built."""

import json
import os

import pytest

from jaxmerge.files import documents

HALF = '{"name": "\\ud800"}'


def refused(call, *arguments, match):
    with pytest.raises(ValueError, match=match) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "x is no JSON"),
        ("[1]", r"x is \[1\], wanted a JSON object"),
        ("[" * 10_000 + "]" * 10_000, "x is no JSON"),
        ('{"a": ' * 101 + "1" + "}" * 101, "x is nested more than 100 deep"),
        ('{"a": ' + "9" * 5000 + "}", "x is no JSON"),
        (HALF, "half of a surrogate pair"),
        (HALF.replace("name", "a").replace('"a"', '"\\udc00"'), "half of a surrogate pair"),
        (b'{"a": "\xff"}', "x is no JSON"),
    ],
)
def test_json_that_is_refused(text, match):
    refused(documents.parse_json, text, "x", match=match)


def test_json_keeps_what_it_holds():
    value = {"a": [1, 2.5, None, True, "é 😀"], "b": {"c": []}, "limit": float("inf")}
    assert documents.parse_json(json.dumps(value), "x") == value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [", "x is no YAML"),
        ("a: 2026-02-31", "x is no YAML"),
        ("[" * 200 + "]" * 200, "x is nested more than 100 deep"),
        ("a: &a [*a]", "holds itself by an alias"),
        ("!!python/name:os.system x", "x is no YAML"),
        ('a: "\\uD800"', "half of a surrogate pair|is no YAML"),
    ],
)
def test_yaml_that_is_refused(text, match):
    refused(documents.parse_yaml, text, "x", match=match)


def test_aliases_count_as_often_as_they_are_used(monkeypatch):
    """With a small bound: the text is as short as a recipe, what it stands for grows by three with every line."""
    monkeypatch.setattr(documents, "MOST_VALUES", 500)
    lines = ["a0: &a0 [1, 2, 3]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 6))]
    assert documents.parse_yaml("\n".join(lines[:3]), "x")[0]["a2"][0][0] == [1, 2, 3]
    refused(documents.parse_yaml, "\n".join(lines), "x", match="stands for more than 500 values by its aliases")


def test_several_documents_and_none():
    assert documents.parse_yaml("a: 1\n---\n---\nb: 2\n", "x") == [{"a": 1}, {"b": 2}]
    assert documents.parse_yaml("", "x") == []


def test_files_that_are_none(tmp_path, monkeypatch):
    assert documents.read_json(tmp_path / "nowhere.json") == {}
    (tmp_path / "folder").mkdir()
    refused(documents.read_json, tmp_path / "folder", match="folder (is no plain file|cannot be read)")
    os.mkfifo(tmp_path / "pipe")
    refused(documents.read_json, tmp_path / "pipe", match="pipe is no plain file")
    (tmp_path / "bytes").write_bytes(b"a: \xff")
    refused(documents.read_yaml, tmp_path / "bytes", match="bytes is no text: byte 3 is not UTF-8")
    monkeypatch.setattr(documents, "MOST_BYTES", 3)
    refused(documents.read_json, tmp_path / "bytes", match="has 4 bytes, wanted at most 3")


def test_values_are_shown_shortened():
    assert documents.shown("y" * 5000) == '"' + "y" * 58 + "…"
    assert documents.shown([1, 2, 3, 4]) == "a list of 4"
    assert documents.shown({"a": None}) == '{"a": null}'
