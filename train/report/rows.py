"""The accuracy rows of a run: which are shown, in which order, under which names; the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..log import format_percent, is_speaker, rich_wanted, say

DOMAIN_NAMES = {"id": "in domain", "harder": "harder", "ood": "out of domain", "unseen": "never seen"}


DOMAINS = tuple(DOMAIN_NAMES)


def pooled_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep the pooled families: a row a (method, round, domain, coefficient), test split if there is one.

    Ordered as rows first appear by method, then by round, then id, harder, out of domain.
    """
    pooled = [dict(row) for row in rows if row.get("family", "all") == "all"]
    tested = {(r["method"], r["round"], r["domain"]) for r in pooled if r.get("split", "test") == "test"}
    pooled = [
        r for r in pooled
        if r.get("split", "test") == "test" or (r["method"], r["round"], r["domain"]) not in tested
    ]  # fmt: skip
    methods = list(dict.fromkeys(r["method"] for r in pooled))
    order = {name: i for i, name in enumerate(DOMAINS)}
    return sorted(
        pooled,
        key=lambda r: (
            methods.index(r["method"]),
            r["round"],
            r.get("coefficient") or 0.0,
            order.get(r["domain"], len(order)),
        ),
    )


def format_interval(row: Mapping[str, Any]) -> str:
    """Write the 95 % interval of a row in percent: `[38.0, 46.6]`."""
    if row.get("low") is None or row.get("high") is None:
        return "–"
    return f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def method_label(row: Mapping[str, Any]) -> str:
    """Name a row's method, with its coefficient where it is a point of a sweep: `line λ=0.5`."""
    coefficient = row.get("coefficient")
    return row["method"] if coefficient is None else f"{row['method']} λ={coefficient:g}"


def print_table(summary: Mapping[str, Any]) -> None:
    """Print method × round × domain with accuracy, 95 % interval, n, mean tokens of an answer, and seconds.

    Args:
      summary: the contents of `summary.json`. Families are pooled; where both were evaluated, the test split
        stands and the validation split is left out.
    """
    if not is_speaker():
        return
    header = ("method", "round", "domain", "accuracy", "95 % interval", "n", "tokens", "seconds")
    body = [
        (
            method_label(row),
            str(row["round"]),
            str(DOMAIN_NAMES.get(row["domain"], row["domain"]))
            + ("" if row.get("split", "test") == "test" else f" ({row['split']})"),
            format_percent(row.get("accuracy")),
            format_interval(row),
            f"{row['n']:,}" if row.get("n") is not None else "–",
            f"{row['tokens']:.1f}" if row.get("tokens") is not None else "–",
            f"{row['seconds']:.1f}" if row.get("seconds") is not None else "–",
        )
        for row in pooled_rows(summary.get("rows", ()))
    ]
    if not body:
        say("nothing evaluated yet")
        return
    left = (0, 2)
    title = f"{summary.get('name', 'run')}" + ("" if summary.get("finished", True) else " (unfinished)")
    if rich_wanted():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
        for i, row in enumerate(body):
            ends = i + 1 == len(body) or body[i + 1][:2] != row[:2]
            table.add_row(*(escape(cell) for cell in row), end_section=ends)
        Console().print(table)
        return
    widths = [max(len(header[i]), *(len(row[i]) for row in body)) for i in range(len(header))]
    for row in (header, tuple("-" * width for width in widths), *body):
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        say("  ".join(cells).rstrip())
