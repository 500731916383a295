"""From YAML and `key=value` overrides to dataclasses and back; unknown keys and wrong types are errors."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from .log import UserError

T = TypeVar("T")
SHIPPED = Path(__file__).parents[1] / "configs"
"""The configs that come with the code: in a checkout `configs/` beside `train/`, once installed `jaxmerge/configs/`."""
FINISH_WITH = "finish_with"
"""Metadata of a field that came later: the commit that finishes runs begun without it, which compute otherwise."""


def at_least(config: Any, where: str, **bounds: float) -> None:
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise UserError(f"{where}.{name} is {getattr(config, name)}; it must be at least {bound}")


def read_date(text: str, where: str) -> datetime.date:
    """A date written as 2026-01-31; the error names where another text stands."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{where} is {text[:40]!r}; a date is wanted, written as 2026-01-31") from None


def check_known(cls: type, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise UserError(f"{where}.{key}: no such key{nearest(str(key), names)}")
    return values


def nearest(key: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(key, known, 1, 0.5)
    return f"; did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"


def build(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from plain data; every error names the key, the value found and the type wanted."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'config'} is {values!r}; a map of keys is wanted")
    prefix = f"{where}." if where else ""
    check_known(cls, values, where or "config")
    hints = typing.get_type_hints(cls)
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass by construction
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing; it has no default")
    return cls(**{key: convert(hints[key], value, prefix + key) for key, value in values.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says, or a UserError; ints are good floats, nothing else is stretched."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if isinstance(value, str) and all(has_name(kind) for kind in kinds):
            value = {"name": value}
        return convert(kinds[0] if len(kinds) == 1 else chosen(kinds, value, where), value, where)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise UserError(f"{where} is {value!r:.100}; it must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r:.100}; a list is wanted")
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r:.100}; a map is wanted")
        return {str(k): convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, str) and looks_like_float(value):
        value = float(value)  # YAML 1.1 reads 2e-5 as a string
    if hint is str and isinstance(value, datetime.date):
        value = value.isoformat()  # YAML reads 2026-01-31 as a date
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{where} is a number of {len(str(value))} digits; a finite number is wanted") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} is {value!r:.100}; {hint.__name__} is wanted")
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} is {value!r:.100}; a whole number of 64 bits is wanted")
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; a finite number is wanted")
    return value


def has_name(kind: Any) -> bool:
    """Whether a type is a dataclass that `name` chooses: the name alone then stands for it with its defaults."""
    return dataclasses.is_dataclass(kind) and "name" in {field.name for field in dataclasses.fields(kind)}


def chosen(kinds: Sequence[type], value: Any, where: str) -> type:
    """Of several dataclasses that each have a `name` of their own, the one that `value` names; the first by default."""
    by_name = {kind.__dataclass_fields__["name"].default: kind for kind in kinds}
    name = value.get("name", next(iter(by_name))) if isinstance(value, Mapping) else next(iter(by_name))
    if name not in by_name:
        raise UserError(f"{where}.name is {name!r}; no such name{nearest(str(name), list(by_name))}")
    return by_name[name]


def looks_like_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_dict(config: Any) -> Any:
    """Plain data that `build` reads back: what config.yaml of a run holds. A dict, of a dataclass."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(config)


def shipped(name: str, *, folder: bool = False) -> Path | None:
    """The config `quickstart`, or the folder `configs/miniature`, that comes with the code; None if there is none."""
    inside = Path(name.removeprefix("configs/"))
    if inside.is_absolute() or ".." in inside.parts or not inside.parts:
        return None
    if folder:
        return SHIPPED / inside if (SHIPPED / inside).is_dir() else None
    return next((p for p in (SHIPPED / inside, SHIPPED / f"{inside}.yaml") if p.is_file()), None)


def shipped_names() -> list[str]:
    """The names of the configs that come with the code: `quickstart`, `experiments/frontier`; no recipe of a merge."""
    files = sorted(SHIPPED.glob("*.yaml")) + sorted(SHIPPED.glob("*/*.yaml"))
    return [file.relative_to(SHIPPED).with_suffix("").as_posix() for file in files if file.parent.name != "recipes"]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config, one map of keys: of a file here, else of one that comes with the code."""
    from jaxmerge.files import documents

    if not path.is_file() and (found := shipped(path.as_posix())) is not None:
        path = found
    if not path.exists():
        near = [*sorted(str(p) for p in path.parent.glob("*.yaml") if path.parent.is_dir()), *shipped_names()]
        raise UserError(f"{path}: no such config{nearest(str(path), near)}")
    try:
        found = documents.read_yaml(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if len(found) != 1 or not isinstance(found[0], dict):
        what = f"{len(found)} documents" if len(found) != 1 else documents.shown(found[0])
        raise UserError(f"{path}: a config is one map of keys, found {what}")
    return found[0]


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b.c=value` assignments (values in YAML); intermediate maps are made."""
    from jaxmerge.files import documents

    values = copy.deepcopy(values)
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign or not path:
            raise UserError(f"{assignment!r}: overrides are written key=value, e.g. rounds=3 sft.epochs=2")
        place = place_of(values, path, repr(assignment))
        try:
            found = documents.parse_yaml(text, repr(assignment))
        except ValueError as error:
            raise UserError(str(error)) from None
        place[path.rpartition(".")[2]] = found[0] if found else None
    return values


def place_of(values: dict[str, Any], path: str, where: str) -> dict[str, Any]:
    """The map that holds the last part of a key `a.b.c`; intermediate maps are made."""
    node = values
    for parent in path.split(".")[:-1]:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"{where}: {parent} holds {node!r}, not a map of keys")
    return node


def load(cls: type[T], path: str | Path, assignments: Sequence[str] = ()) -> T:
    """Read a config file with overrides into `cls`."""
    return build(cls, override(read_yaml(Path(path)), assignments))
