"""What a report shows of a search: what it came to in numbers, and its trees to open and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..log import format_percent
from ..runtime.jsonl import read_jsonl_tolerant
from .html import bar, details, escape, table

Row = Mapping[str, Any]
SHOWN = 40
"""Trees on the page; all are in trees.jsonl."""


def numbers(phases: Sequence[Row]) -> str:
    """Write the counts of a search; empty where there was none."""
    found = next((p for p in phases if p.get("kind") == "search"), None)
    if found is None:
        return ""
    ends = ", ".join(f"{count} {end}" for end, count in found["ends"].items())
    right = f"{found['right']} of {found['judged']} judged solutions are right. " if found["judged"] else ""
    occupancy = "" if found["occupancy"] is None else f", {format_percent(found['occupancy'])} of the slots in use"
    parts = [
        f"<p>{found['questions']:,} questions, {found['nodes']:,} nodes. {right}Searches ended by: {escape(ends)}."
        f" {found['tokens_per_second']:,.0f} tokens a second{occupancy}.</p>",
        '<div class="panels">',
        counted("Steps of the plans", "steps", found["plan_steps"], "plans"),
        counted("Depth of the nodes", "depth", found["depths"], "nodes"),
        counted("Scores the critic gave", "score", found["scores"], "scores"),
        counted("Values of the plans taken", "value", intervals(found["values"]), "values"),
        "</div>",
    ]
    made = next((p for p in phases if p.get("kind") == "examples"), None)
    if made is not None:
        body = [[escape(why), f"{n:,}"] for why, n in made["removed"].items() if n]
        body.append(["<strong>kept</strong>", f"<strong>{made['kept']:,}</strong>"])
        caption = f"What became of {made['solutions']:,} solutions; each filter sees what those above it left."
        parts.append(table(["filter", "solutions"], body, caption=caption))
    body = [[escape(what), f"{n:,}"] for what, n in found["counts"].items()]
    caption = "Requests by prompt, and replies that could not be used."
    parts.append(details("Requests and what went wrong", table(["", "count"], body, caption=caption)))
    return "".join(parts)


def intervals(counts: Sequence[int]) -> dict[str, int]:
    """Name tenths; those at the ends without a count are left out."""
    named = {f"{i / 10:.1f}–{(i + 1) / 10:.1f}": n for i, n in enumerate(counts)}
    filled = [i for i, n in enumerate(counts) if n]
    return dict(list(named.items())[filled[0] : filled[-1] + 1]) if filled else {}


def counted(title: str, unit: str, counts: Mapping[str, int], what: str) -> str:
    """A histogram as a table with bars."""
    if not counts:
        return ""
    most, total = max(counts.values()), sum(counts.values())
    body = [
        [
            escape(key),
            bar([("s0", n), ("faint", most - n)], said=f"{n} {what}"),
            f"{n:,}",
        ]
        for key, n in counts.items()
    ]
    return f"<div>{table([unit, '', what], body, caption=f'{title} ({total:,}).', left=(0, 1))}</div>"


def trees(folder: Path) -> str:
    """Write the trees of a run's folder to open and read; empty where there are none."""
    path = folder / "trees.jsonl"
    if not path.exists():
        return ""
    rows = read_jsonl_tolerant(path)
    rest = f" These are the first {SHOWN} of {len(rows):,}; all are in trees.jsonl." if len(rows) > SHOWN else ""
    words = (
        "Open a question, then a step. V is the value of the plan so far on [0, 1], n how often the search came by;"
        f" the plan that was taken is marked ●.{rest}"
    )
    return f'<p class="quiet">{escape(words)}</p><div class="tree">{"".join(map(question, rows[:SHOWN]))}</div>'


def question(row: Row) -> str:
    """One question with its tree and what was written."""
    nodes, chosen = row["nodes"], row["chosen"]
    way: set[int] = set()
    at = chosen
    while at is not None:
        way.add(at)
        at = nodes[at]["parent"]
    verdicts = [s["verdict"] for s in row["solutions"] if s["verdict"] is not None]
    judged = "" if not verdicts else ' · <span class="yes">right</span>' if 1.0 in verdicts else (
        ' · <span class="no">wrong</span>'
    )  # fmt: skip
    value = "no plan" if chosen is None or nodes[chosen]["score"] is None else f"V {nodes[chosen]['value']:.2f}"
    first = " ".join(row["question"].split())
    short = first if len(first) <= 110 else first[:109] + "…"
    about = f"<small>{len(nodes) - 1} nodes · {value} · {escape(row['end'])}{judged}</small>"
    below = "".join(step(nodes, i, way) for i, _ in children_of(nodes, 0))
    answer = f'<p class="quiet">Answer: {escape(row["answer"])}</p>' if row.get("answer") else ""
    return details(
        f"{escape(short)} {about}",
        f"<pre>{escape(row['question'])}</pre>{answer}{below}{''.join(map(solution, row['solutions']))}",
    )


def step(nodes: Sequence[Row], i: int, way: set[int]) -> str:
    """A node with all below it; those on the way to the plan that was taken are open."""
    node = nodes[i]
    mark = "● " if i in way else ""
    score = "" if node["score"] is None else f"V {node['value']:.2f} · n {node['visits']} · "
    kind = " · solved" if node["solved"] and node["score"] is not None else ""
    head = f"{mark}<small>{score}depth {node['depth']}{kind}</small> {escape(node['step'][:2000])}"
    inside = ""
    if node["score"] is not None and node["score"] != node["value"]:
        inside += f'<p class="quiet">The critic\'s score: {node["score"]:.1f}</p>'
    if node["simulated"] is not None:
        inside += f'<p class="quiet">Best of the roll-out: {node["simulated"]:.1f}</p>'
    if node["reflection"]:
        inside += f'<p class="quiet">Reflection: {escape(node["reflection"])}</p>'
    inside += "".join(step(nodes, child, way) for child, _ in children_of(nodes, i))
    if not inside:
        return f'<p class="leaf">{head}</p>'
    return f"<details{' open' if i in way else ''}><summary>{head}</summary>{inside}</details>"


def solution(found: Row) -> str:
    """What was written from the plan, with the verdict on it."""
    verdict = {None: "", 1.0: ' <span class="yes">right</span>', 0.0: ' <span class="no">wrong</span>'}
    cut = " (cut off)" if found["reason"] == "length" else ""
    if not found["text"]:
        return (
            f'<p class="quiet">{escape(found["name"])}:{verdict.get(found["verdict"], "")} the plan is the solution</p>'
        )
    said = f'<p class="quiet">{escape(found["name"])}{cut}:{verdict.get(found["verdict"], "")}</p>'
    return f"{said}<pre>{escape(found['text'])}</pre>"


def children_of(nodes: Sequence[Mapping[str, Any]], i: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, node) of the children in rows of `Tree.rows`, the highest value first."""
    for child in sorted(nodes[i]["children"], key=lambda c: (-nodes[c]["value"], c)):
        yield child, nodes[child]
