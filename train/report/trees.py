"""What a report shows of a search: what it came to in numbers, and its trees to open and read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..log import format_percent
from ..runtime.jsonl import Row, read_jsonl
from .html import SHOWN as SHOWN_OF_TEXT
from .html import Bar, Cell, Table, cut, part

SHOWN = 40
"""Trees on the page; all are in trees.jsonl."""
NODES = 4000
"""Nodes and solutions on the page: what comes after them is in trees.jsonl alone."""
CHARACTERS = 4_000_000
"""Characters of all texts of the trees on the page: the more texts, the less is shown of each."""


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
    shown = first(rows)
    rest = ""
    if len(rows) > len(shown):
        rest = f" The first {len(shown):,} of {len(rows):,} are shown; all are in trees.jsonl."
    if any(size(row) > NODES for row in shown):
        rest += f" Of a large tree the first {NODES:,} nodes and the plan that was taken are shown."
    words = (
        "Open a question, then a step. V is the value of the plan so far on [0, 1], n how often the search came by;"
        f" the plan that was taken is marked ●.{rest}"
    )
    most = CHARACTERS // max(2 * sum(map(size, shown)), 1)  # a node has a step and a reflection
    return part("trees", words=words, questions=[question(row, most) for row in shown])


def size(row: Row) -> int:
    """Nodes and solutions of a tree."""
    return len(row["nodes"]) + len(row["solutions"])


def first(rows: Sequence[Row]) -> Sequence[Row]:
    """The first trees, as many as a page has room for; one at least."""
    counts = itertools.accumulate(map(size, rows[:SHOWN]))
    return rows[: max(1, sum(count <= NODES for count in counts))]


def question(row: Row, most: int) -> Row:
    """One question with its tree and what was written; of a node's texts at most so many characters each."""
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
        "steps": [step(nodes, i, way, most) for i in children_of(nodes, 0, way)],
        "solutions": [
            {**found, "text": cut(found["text"], min(most, SHOWN_OF_TEXT)), "cut": found["reason"] == "length"}
            for found in row["solutions"][:NODES]
        ],
    }


def step(nodes: Sequence[Row], i: int, way: set[int], most: int) -> Row:
    """A node with all below it; those on the way to the plan that was taken are open."""
    node = nodes[i]
    score = "" if node["score"] is None else f"V {node['value']:.2f} · n {node['visits']} · "
    notes = []
    if node["score"] is not None and node["score"] != node["value"]:
        notes.append(f"The critic's score: {node['score']:.1f}")
    if node["simulated"] is not None:
        notes.append(f"Best of the roll-out: {node['simulated']:.1f}")
    if node["reflection"]:
        notes.append(f"Reflection: {cut(node['reflection'], min(most, SHOWN_OF_TEXT))}")
    solved = " · solved" if node["solved"] and node["score"] is not None else ""
    return {
        "about": f"{score}depth {node['depth']}{solved}",
        "text": cut(node["step"], min(most, 2000)),
        "taken": i in way,
        "notes": notes,
        "steps": [step(nodes, child, way, most) for child in children_of(nodes, i, way)],
    }


def children_of(nodes: Sequence[Mapping[str, Any]], i: int, way: set[int]) -> list[int]:
    """Numbers of the children that are shown, in rows of `Tree.rows`, the highest value first."""
    shown = [c for c in nodes[i]["children"] if c < NODES or c in way]
    return sorted(shown, key=lambda c: (-nodes[c]["value"], c))
