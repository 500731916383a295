"""What a report shows of a search: what it came to in numbers, and its trees to open and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..log import format_percent
from ..runtime.jsonl import Row, read_jsonl
from .html import Bar, Cell, Table, cut, part

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
    counted_by = [
        ("Steps of the plans", "steps", found["plan_steps"], "plans"),
        ("Depth of the nodes", "depth", found["depths"], "nodes"),
        ("Scores the critic gave", "score", found["scores"], "scores"),
        ("Values of the plans taken", "value", intervals(found["values"]), "values"),
    ]
    made = next((p for p in phases if p.get("kind") == "examples"), None)
    requests = [[what, f"{n:,}"] for what, n in found["counts"].items()]
    return part(
        "search",
        words=f"{found['questions']:,} questions, {found['nodes']:,} nodes. {right}Searches ended by: {ends}."
        f" {found['tokens_per_second']:,.0f} tokens a second{occupancy}.",
        counted=[counted(*about) for about in counted_by if about[2]],
        made=None if made is None else became(made),
        requests=Table(["", "count"], requests, "Requests by prompt, and replies that could not be used."),
    )


def became(made: Row) -> Table:
    """What each filter removed of the solutions."""
    body: list[list[str | Cell]] = [[why, f"{n:,}"] for why, n in made["removed"].items() if n]
    body.append([Cell("kept", strong=True), Cell(f"{made['kept']:,}", strong=True)])
    caption = f"What became of {made['solutions']:,} solutions; each filter sees what those above it left."
    return Table(["filter", "solutions"], body, caption)


def intervals(counts: Sequence[int]) -> dict[str, int]:
    """Name tenths; those at the ends without a count are left out."""
    named = {f"{i / 10:.1f}–{(i + 1) / 10:.1f}": n for i, n in enumerate(counts)}
    filled = [i for i, n in enumerate(counts) if n]
    return dict(list(named.items())[filled[0] : filled[-1] + 1]) if filled else {}


def counted(title: str, unit: str, counts: Mapping[str, int], what: str) -> Table:
    """A histogram as a table with bars."""
    most, total = max(counts.values()), sum(counts.values())
    body = [
        [key, Bar([("n0", n), ("faint", most - n)] if most else [("faint", 1)], f"{n} {what}"), f"{n:,}"]
        for key, n in counts.items()
    ]
    return Table([unit, "", what], body, f"{title} ({total:,}).", left=(0, 1))


def trees(folder: Path) -> str:
    """Write the trees of a run's folder to open and read; empty where there are none."""
    path = folder / "trees.jsonl"
    if not path.exists():
        return ""
    rows = read_jsonl(path, torn="drop")
    rest = f" These are the first {SHOWN} of {len(rows):,}; all are in trees.jsonl." if len(rows) > SHOWN else ""
    words = (
        "Open a question, then a step. V is the value of the plan so far on [0, 1], n how often the search came by;"
        f" the plan that was taken is marked ●.{rest}"
    )
    return part("trees", words=words, questions=[question(row) for row in rows[:SHOWN]])


def question(row: Row) -> Row:
    """One question with its tree and what was written."""
    nodes, chosen = row["nodes"], row["chosen"]
    way: set[int] = set()
    at = chosen
    while at is not None:
        way.add(at)
        at = nodes[at]["parent"]
    verdicts = [s["verdict"] for s in row["solutions"] if s["verdict"] is not None]
    value = "no plan" if chosen is None or nodes[chosen]["score"] is None else f"V {nodes[chosen]['value']:.2f}"
    text = cut(row["question"])
    first = " ".join(text.split())
    return {
        "text": text,
        "short": first if len(first) <= 110 else first[:109] + "…",
        "about": f"{len(nodes) - 1} nodes · {value} · {row['end']}",
        "judged": 1.0 in verdicts if verdicts else None,
        "answer": None if row.get("answer") is None else cut(row["answer"]),
        "steps": [step(nodes, i, way) for i, _ in children_of(nodes, 0)],
        "solutions": [
            {**found, "text": cut(found["text"]), "cut": found["reason"] == "length"} for found in row["solutions"]
        ],
    }


def step(nodes: Sequence[Row], i: int, way: set[int]) -> Row:
    """A node with all below it; those on the way to the plan that was taken are open."""
    node = nodes[i]
    score = "" if node["score"] is None else f"V {node['value']:.2f} · n {node['visits']} · "
    notes = []
    if node["score"] is not None and node["score"] != node["value"]:
        notes.append(f"The critic's score: {node['score']:.1f}")
    if node["simulated"] is not None:
        notes.append(f"Best of the roll-out: {node['simulated']:.1f}")
    if node["reflection"]:
        notes.append(f"Reflection: {cut(node['reflection'])}")
    solved = " · solved" if node["solved"] and node["score"] is not None else ""
    return {
        "about": f"{score}depth {node['depth']}{solved}",
        "text": cut(node["step"], 2000),
        "taken": i in way,
        "notes": notes,
        "steps": [step(nodes, child, way) for child, _ in children_of(nodes, i)],
    }


def children_of(nodes: Sequence[Mapping[str, Any]], i: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, node) of the children in rows of `Tree.rows`, the highest value first."""
    for child in sorted(nodes[i]["children"], key=lambda c: (-nodes[c]["value"], c)):
        yield child, nodes[child]
