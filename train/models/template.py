"""The environment that chat templates are rendered in: that of transformers, with the marks of an assistant's words."""

from __future__ import annotations

import functools
import json

from ..log import UserError

MARKS = ("\uf8fe", "\uf8ff")
"""Private characters that stand around an assistant's words while a template is rendered."""


@functools.lru_cache(maxsize=8)
def compiled(template: str, marks: bool = False):
    """A template in the environment of transformers: sandboxed, blocks trimmed, loop controls, and its few names.

    Args:
      marks: put `MARKS` around what stands in generation blocks.
    """
    import jinja2
    import jinja2.ext
    import jinja2.nodes

    from .bounded import BoundedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks what the assistant wrote; its text stands as it is."""

        tags = {"generation"}  # noqa: RUF012  # read by jinja2 as a class attribute

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marks:
                start, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in MARKS)
                body = [start, *body, end]
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except Exception as error:  # of a stranger's template: deep nesting, for example, is a RecursionError
        raise UserError(f"the chat template is not valid Jinja: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An error's own words, shortened; its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
