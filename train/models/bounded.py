"""Jinja for templates of strangers: no rendering takes longer, or makes more text, than a chat template needs.

Jinja's own sandbox keeps a template from Python's insides, not from taking for ever. Here every turn of a loop and
every call looks at the clock, and whatever can make much out of little (operators, methods, filters, joined pieces) is
asked for its size: before, or where it is known beforehand to be moderate, after.
"""

from __future__ import annotations

import ast
import functools
import re
import time
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 10.0
"""What one rendering may take."""
CHARACTERS = 10_000_000
"""What one rendering, or any text or list inside it, may come to."""
ELEMENT = 10
"""Characters that an element of a list counts as, beside its text."""
WORK = 100_000_000
"""What the two largest of a call's texts and numbers may come to, multiplied, where the call may multiply them."""
MULTIPLY = frozenset(
    {
        *("replace", "join", "expandtabs", "ljust", "rjust", "center", "zfill", "translate", "format", "format_map"),
        *("indent", "wordwrap", "batch", "slice", "tojson", "xmlattr"),
    }
)
_BITS = 100_000
_DATE = re.compile(r"%[\^_#+-]?\d{6}")
_WIDE = re.compile(r"[%{][^%{}]{0,40}?\d{6}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds; takes the arguments of `jinja2.Environment`."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, **options: Any):
        super().__init__(optimized=False, **options)  # nothing is computed while a template is compiled
        self.deadline = float("inf")
        self.template_class = _Template
        self.concat = self._joined  # type: ignore[assignment]
        self.filters = {name: self._bounded(name, filter) for name, filter in self.filters.items()}
        self.globals.pop("lipsum", None)

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"it takes longer than {SECONDS:g} s")

    def sized(self, value: Any) -> Any:
        """The value, unless it is too large."""
        if isinstance(value, int):
            if value.bit_length() > _BITS:
                raise _too_much()
        elif _size(value) > CHARACTERS:
            raise _too_much()
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.sized(left)
        self.sized(right)
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            many, few = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(few, str | list | tuple) and many * (_size(few) + 1) > CHARACTERS:
                raise _too_much()
        powers = operator == "**" and isinstance(left, int) and isinstance(right, int)
        if powers and left.bit_length() * right > _BITS:
            raise _too_much()
        if operator == "%" and isinstance(left, str):
            self._weigh("format", left, [right])
        return self.sized(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.tick()
        args = tuple(map(_whole, args))
        method = getattr(function, "__wrapped__", function)  # Jinja's sandbox puts its own around `format`
        of, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        values = [*args, *kwargs.values()]
        if isinstance(of, str | list | tuple):
            self._weigh(name, of, values)
        else:
            self._weigh("", None, values)
            if not isinstance(function, Macro) and any(isinstance(v, str) and _DATE.search(v[:200]) for v in values):
                raise _too_much()
        return self.sized(super().call(context, function, *args, **kwargs))

    def _bounded(self, name: str, filter: Callable) -> Callable:
        @functools.wraps(filter)  # what marks a filter that wants the environment or the context is copied too
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            args = tuple(map(_whole, args))
            plain = [v for v in (*args, *kwargs.values()) if v is None or isinstance(v, _PLAIN)]
            self._weigh(name, plain[0] if plain else None, plain[1:])
            return self.sized(filter(*args, **kwargs))

        return bounded

    def _weigh(self, name: str, of: Any, values: Sequence[Any]) -> None:
        """Refuse a call that might make too much out of `of` and `values`."""
        weights = [abs(v) if isinstance(v, int) else _size(v) for v in (of, *values)]
        if max(weights) > CHARACTERS:
            raise _too_much()
        if name in MULTIPLY:
            *_, second, first = sorted([1, 1, *weights])
            if (first + 1) * second > WORK:
                raise _too_much()
        if name in ("format", "format_map") and isinstance(of, str) and _WIDE.search(of):
            raise _too_much()

    def _joined(self, pieces: Iterable[str]) -> str:
        kept, total = [], 0
        for piece in pieces:
            total += len(piece)
            if total > CHARACTERS:
                raise _too_much()
            kept.append(piece)
        return "".join(kept)

    def _compile(self, source: str, filename: str) -> Any:
        tree = _Watched().visit(ast.parse(source))
        return compile(ast.fix_missing_locations(tree), filename, "exec")


class _Template(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        environment = self.environment
        assert isinstance(environment, BoundedEnvironment), "no other environment has this class of templates"
        environment.deadline = time.monotonic() + SECONDS
        return super().render(*args, **kwargs)


class _Watched(ast.NodeTransformer):
    """Has the code that Jinja made of a template look at the clock, and at the size of what is made text or joined."""

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        node.body[:0] = ast.parse("environment.tick()").body
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.ifs.insert(0, ast.parse("environment.tick() is None", mode="eval").body)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("str", "escape", "markup_join", "str_join"):
            sized = ast.Attribute(ast.Name("environment", ast.Load()), "sized", ast.Load())
            node.args = [ast.Call(sized, [argument], []) for argument in node.args]
            return ast.Call(sized, [node], [])
        return node


def _whole(value: Any) -> Any:
    """A list in place of a generator, so that its size is known."""
    return list(value) if isinstance(value, types.GeneratorType) else value


_PLAIN = (str, int, list, tuple, dict)


def _too_much() -> jinja2.TemplateRuntimeError:
    return jinja2.TemplateRuntimeError(f"it makes more than {CHARACTERS:,} characters")


def _size(value: Any) -> int:
    """How much text a value would make, at least: counted no further than to CHARACTERS."""
    if isinstance(value, str):
        return len(value)
    total, todo = 0, [value]
    while todo and total <= CHARACTERS:
        value = todo.pop()
        total += len(value) if isinstance(value, str) else ELEMENT
        if isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, Namespace):
            todo += object.__getattribute__(value, "_Namespace__attrs").values()
    return total
