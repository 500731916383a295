"""Every key of a config with its default and meaning, from the settings' own docstrings.

`python -m train.cli.keys` writes docs/config.md.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..evaluate.settings import HarnessOptions, QuestionOptions
from ..generate.settings import SampleOptions
from ..improve.settings import Improve
from ..learn.settings import Finetune, Sft
from ..models.settings import Source
from ..runtime.disk import write_durably
from ..runtime.settings import Distributed, Mesh
from ..search.settings import SearchRun
from ..studies.settings import AnalyseOptions, Sweep
from ..studies.statistics_settings import StatisticsOptions
from ..studies.tune_settings import TuneOptions
from ..tasks.settings import FamilySpec
from .settings import (
    DataOptions,
    ExportOptions,
    ExtractOptions,
    InspectOptions,
    MergeOptions,
    PushOptions,
    ResultsOptions,
    VerifyOptions,
)

HEAD = """# Keys of a config

Written by `python -m train.cli.keys` from the settings' docstrings. On the command line `a.b=value` sets a key of a
config, values in YAML; a key of a method is written `methods.imm.merge.alpha=0.6`. An entry of a list
(`tasks.families[]`) is set in the file.
"""
SHARED = (Mesh, Distributed, Source, Sft, FamilySpec)
ABOUT = {
    "improve": (Improve, "`jaxmerge improve CONFIG`; methods set keys of `sampling`, `selection`, `sft`, `merge`."),
    "sweep": (Sweep, "The `sweep:` block that makes an `improve` config an [experiment](experiments.md)."),
    "sft": (Finetune, "`jaxmerge sft CONFIG`, or `MODEL DATA OUT`, which are `model.path`, `data.path`, `out`."),
    "search": (SearchRun, "`jaxmerge search CONFIG`: see [search.md](search.md)."),
    "data": (DataOptions, "`jaxmerge data PATH`; see [data.md](data.md)."),
    "sample": (SampleOptions, "`jaxmerge sample MODEL PROMPTS OUT`."),
    "evaluate": (QuestionOptions, "`jaxmerge evaluate MODEL FILE`; with a `CONFIG` its keys are those of `improve`."),
    "harness": (HarnessOptions, "`jaxmerge harness MODEL TASKS`."),
    "analyse": (AnalyseOptions, "`jaxmerge analyse RUN`."),
    "tune": (
        TuneOptions, "`jaxmerge tune RECIPE QUESTIONS OUT`, and the keys of `evaluate`; see [tune.md](tune.md)."
    ),
    "statistics": (
        StatisticsOptions, "`jaxmerge statistics MODEL DATA OUT`; see [merge.md](merge.md#rules-that-read-data)."
    ),
    "merge": (MergeOptions, "`jaxmerge merge RECIPE OUT`; see [merge.md](merge.md)."),
    "verify": (VerifyOptions, "`jaxmerge verify OUT`."),
    "inspect": (InspectOptions, "`jaxmerge inspect MODEL`, `jaxmerge inspect BASE MODELS`."),
    "extract-lora": (ExtractOptions, "`jaxmerge extract-lora BASE TUNED OUT`."),
    "export": (ExportOptions, "`jaxmerge export RUN OUT`; see [sharing.md](sharing.md)."),
    "push": (PushOptions, "`jaxmerge push FOLDER NAME`; see [sharing.md](sharing.md)."),
    "results": (ResultsOptions, "`jaxmerge results`."),
}  # fmt: skip


REQUIRED = "must be given"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: `sft.step.clip`, its type and default as they are written, its meaning."""

    path: str
    kind: str
    default: str
    meaning: str


def keys(settings: type, prefix: str = "", told: tuple[type, ...] = ()) -> Iterator[Key]:
    """The keys of a dataclass of settings, depth first; settings `told` of elsewhere are not gone into."""
    hints, written = typing.get_type_hints(settings), documented(settings)
    for field in dataclasses.fields(settings):
        inner, shape = nested(hints[field.name])
        path = f"{prefix}{field.name}{shape}"
        kind, meaning = written[field.name]
        if typing.get_origin(hints[field.name]) is typing.Literal:  # also where the annotation is a name for it
            kind = " | ".join(typing.get_args(hints[field.name]))
        gone_into = [cls for cls in inner if cls not in told]
        if not gone_into or meaning:
            yield Key(path, kind, default(field), meaning or ("The keys are those of `improve`." if inner else ""))
        if len(gone_into) == 1:
            yield from keys(gone_into[0], f"{path}.", told)
        elif gone_into:
            yield from choices(gone_into, f"{path}.", told)


def choices(options: list[type], prefix: str, told: tuple[type, ...]) -> Iterator[Key]:
    """The keys of several dataclasses of which `name` chooses one; the first is the default."""
    found = {cls.__dataclass_fields__["name"].default: list(keys(cls, prefix, told)) for cls in options}
    names = list(found)
    about = next(key.meaning for key in found[names[0]] if key.path == f"{prefix}name")
    yield Key(f"{prefix}name", " | ".join(names), names[0], about)
    for name, inside in found.items():
        for key in inside:
            if key.path != f"{prefix}name":
                yield dataclasses.replace(key, meaning=key.meaning and f"{name}: {key.meaning}")


def documented(settings: type) -> dict[str, tuple[str, str]]:
    """Field → its type as written, and its meaning: the docstring that follows it, or the class's under Attributes.

    Fields of the classes it inherits from are among them.
    """
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed([cls for cls in settings.__mro__ if dataclasses.is_dataclass(cls)]):
        meanings = {}
        for names, text in re.findall(r"^  (\w[\w, ]*): ((?:.|\n   )*)", inspect.getdoc(cls) or "", re.MULTILINE):
            meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()))
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        last = None
        for statement in body.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                last = statement.target.id
                found[last] = (plainly(ast.unparse(statement.annotation)), meanings.get(last, ""))
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
                found[last] = (found[last][0], " ".join(str(statement.value.value).split()))
    return found


def plainly(annotation: str) -> str:
    """A type in the words of YAML.

    Example:
      >>> plainly("tuple[Literal['a', 'b'], ...] | None"), plainly("dict[str, Any]")
      ('[a | b, …] | null', 'map')
    """
    text = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), annotation)
    while (inner := re.sub(r"tuple\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*), \.\.\.\]", r"[\1, …]", text)) != text:
        text = inner
    text = re.sub(r"(dict|Mapping)\[.*\]", "map", text)
    words = {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true | false",
        "None": "null",
        "Any": "any",
    }
    return re.sub(r"\b(str|int|float|bool|None|Any)\b", lambda m: words[m[1]], text)


def settable(settings: Iterable[type]) -> list[str]:
    """The keys that can be set on a command line: those of a list or of a map's entry are set in a file."""
    paths = dict.fromkeys(found.path for cls in settings for found in keys(cls))
    return [path for path in paths if "[]" not in path and ".NAME" not in path]


def nested(hint: Any) -> tuple[list[type], str]:
    """The settings inside a type, and how a path goes on there: `[]` in a list, `.NAME` in a map."""
    found: list[type] = []
    for option in typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,):
        arguments = typing.get_args(option)
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            found.append(option)
        elif arguments and isinstance(arguments[-1], type) and dataclasses.is_dataclass(arguments[-1]):
            return [arguments[-1]], ".NAME"
        elif typing.get_origin(option) is tuple and arguments and dataclasses.is_dataclass(arguments[0]):
            return [typing.cast(type, arguments[0])], "[]"
    return found, ""


def default(field: dataclasses.Field) -> str:
    """The default in YAML's words."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return REQUIRED
    if dataclasses.is_dataclass(value):
        return ""
    words = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, str) and "\n" in value:  # a line of a table is one line
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return words.get(value, str(value)) if isinstance(value, bool | str | None) else str(value)


def page() -> str:
    """docs/config.md."""
    parts = [HEAD]
    for name, (settings, about) in ABOUT.items():
        parts += [f"## {name}", "", about, "", "| key | type | default | |", "|---|---|---|---|"]
        for key in keys(settings, "sweep." if name == "sweep" else "", () if name == "improve" else SHARED):
            cells = (f"`{key.path}`", f"`{key.kind}`", f"`{key.default}`" if key.default else "", key.meaning)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    write_durably(Path(__file__).parents[2] / "docs" / "config.md", page())
