"""Pieces of HTML that every page uses: escaped text, tables, folded details."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence

_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(text: object) -> str:
    """Make any text safe inside XML and HTML; what neither may contain becomes U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)))


def table(
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    *,
    caption: str,
    left: Collection[int] = (0,),
    groups: Collection[int] = (),
) -> str:
    """Write a table whose cells are HTML already; `left` columns are words, `groups` the rows that open one."""
    align = [' class="l"' if i in left else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{a}>{h}</th>' for h, a in zip(head, align, strict=True))
    lines = []
    for number, row in enumerate(body):
        cells = f'<th scope="row" class="l">{row[0]}</th>'
        cells += "".join(f"<td{a}>{cell}</td>" for cell, a in zip(row[1:], align[1:], strict=True))
        lines.append(f"<tr{' class=first' if number in groups else ''}>{cells}</tr>")
    title = f"<caption><span>{caption}</span></caption>"
    inside = f"{title}<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>{inside}</table></div>'


def details(summary: str, content: str) -> str:
    """Fold something away behind its one-line summary, both HTML already."""
    return f"<details><summary>{summary}</summary>{content}</details>"
