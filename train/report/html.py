"""Pieces of HTML that every page uses: escaped text, tables, folded details."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence

from jaxmerge.files.inspect.canvas import clean


def escape(text: object) -> str:
    """Make any text safe inside XML and HTML; what neither may contain becomes U+FFFD."""
    return html.escape(clean(text))


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


def bar(parts: Sequence[tuple[str, float]], *, said: str) -> str:
    """Draw shares of a whole as one bar for a table cell: (colour, amount) from the left."""
    total = sum(amount for _, amount in parts) or 1.0
    inside = "".join(
        f'<i style="width:{100 * amount / total:.4g}%;--c:var(--{colour})"></i>' for colour, amount in parts if amount
    )
    return f'<span class="bar" role="img" aria-label="{escape(said)}" title="{escape(said)}">{inside}</span>'
