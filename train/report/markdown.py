"""The result as Markdown, to be copied into an issue, a model card or a paper's notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxmerge.files.inspect.canvas import clean

from ..log import format_percent
from ..runtime.jsonl import Row
from .about import facts
from .html import part
from .rows import DOMAIN_NAMES, format_interval, pooled_rows
from .sections import in_order, last_rounds
from .verdict import Verdict, compared_at, format_interval_of, format_points

if TYPE_CHECKING:
    from .read import Run

_SPECIAL = re.compile(r"([\\`*<>|\[\]])")


def spell(text: object) -> str:
    r"""Write a word so that Markdown shows it as it is, on one line.

    Example:
      >>> print(spell("a|b\n<c> [d]"))
      a\|b \<c\> \[d\]
    """
    return _SPECIAL.sub(r"\\\1", " ".join(clean(text).split()))


def copied(run: Run, said: Verdict) -> str:
    """Show the block of Markdown; empty where nothing was evaluated."""
    last = last_rounds(pooled_rows(run.rows))
    return part("copied", text=table(run, last, said)) if last else ""


def table(run: Run, last: dict[str, dict[str, Row]], said: Verdict) -> str:
    """Write the sentences, the facts and a row a method: its accuracy, and against the base the paired difference."""
    domains = in_order({d for cells in last.values() for d in cells})
    pairs = compared_at(run.summary.get("paired") or ())
    head = ["method", "round", *(f"{spell(DOMAIN_NAMES.get(d, d))} (n = {count(last, d)})" for d in domains)]
    lines = [f"**{spell(run.name)}**{'' if run.finished else ' (unfinished)'}: {sentences(said)}", ""]
    lines += [f"- {term}: {spell(words)}" for term, words in facts(run)]
    lines += ["", row(head), row(["---"] * 2 + ["---:"] * len(domains))]
    for method, cells in last.items():
        number = max(cell["round"] for cell in cells.values())
        lines.append(row([spell(method), str(number), *(accuracy(method, cells.get(d), pairs) for d in domains)]))
    lines += ["", "Share of questions answered right with its 95 % interval; after the semicolon the paired difference"]
    lines[-1] += " from the base on the same questions, in points, with its 95 % interval."
    if run.summary.get("command"):
        # Four spaces make it code, whatever is in it.
        lines += ["", "    " + " ".join(clean(run.summary["command"]).split())]
    return "\n".join(lines).replace("\u00a0", " ")


def sentences(said: Verdict) -> str:
    """Write the sentences, of which only the names may hold signs that Markdown would read."""
    words = ["".join(words if method is None else spell(words) for words, method in s) for s in said.sentences]
    return " ".join(" ".join(words).split())


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def count(last: dict[str, dict[str, Row]], domain: str) -> str:
    found = {cells[domain].get("n") for cells in last.values() if domain in cells}
    return ", ".join(f"{n:,}" if isinstance(n, int) else "?" for n in found)


def accuracy(method: str, cell: Row | None, pairs: Mapping[tuple[str, int | None, str, str], Row]) -> str:
    """Write one accuracy: `43.0 % \\[38.1, 47.9\\]; +10.0 \\[+6.0, +14.0\\]`."""
    if cell is None:
        return "–"
    text = f"{format_percent(cell['accuracy'])} {format_interval(cell)}"
    pair = pairs.get((method, cell["round"], cell["domain"], cell.get("split", "test")))
    if pair is not None:
        text += f"; {format_points(pair['difference'])} {format_interval_of(pair)}"
    return text
