"""What models said: answers to the same test questions beside the expected ones, and samples taken or left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.jsonl import Row
from .html import cut, part
from .read import owners
from .rows import DOMAIN_NAMES

if TYPE_CHECKING:
    from .read import Run

OPEN = 3
"""Questions that are not folded."""
SHORT = 240
"""Characters of an answer that are shown at once: those at its end, where the result stands."""


def answers(run: Run) -> str:
    """Show what the base and each method after its last round said to the same questions."""
    last: dict[str, Row] = {}
    for p in run.of_kind("evaluate"):
        if p.get("examples"):
            for method in owners(p):
                last[method] = p
    # A sweep is many models under one name: none of them speaks for it.
    last = {method: p for method, p in last.items() if run.looks[method].fill != "soft"}
    asked: dict[str, Row] = {}
    for method, p in last.items():
        for e in p["examples"]:
            question = asked.setdefault(str(e["question_id"]), {**e, "said": []})
            title = method if method == "base" else f"{method} · {p.get('round', '?')}"
            question["said"].append({"title": title, "css": run.looks[method].css, **spoken(e)})
    shown = [
        {
            "about": f"{e['family']} · {DOMAIN_NAMES.get(e['domain'], e['domain'])}",
            "question": cut(e["question"]),
            "answer": cut(e["answer"]),
            "said": e["said"],
        }
        for e in asked.values()
    ]
    return part("answers", asked=shown, open=OPEN) if shown else ""


def spoken(e: Row) -> Row:
    """An answer as it is shown: right or not, its end, and the whole where that is longer."""
    text = cut(e.get("text", "")).strip()
    long = len(text) > SHORT
    return {
        "right": verdict_of(e.get("score")),
        "end": f"…{text[-SHORT:]}" if long else text or "(nothing)",
        "whole": text if long else None,
    }


def verdict_of(score: Any) -> bool | None:
    """True for right, False for wrong, None for an answer that could not be judged."""
    return None if score is None else score == 1.0


def samples_shown(run: Run) -> str:
    """Show some of the sampled solutions, folded, as text and nothing else."""
    groups = []
    for p in run.of_kind("select"):
        shown = [
            {
                "accepted": bool(e.get("accepted")),
                "question": (question := cut(e.get("question", ""))),
                "short": question if len(question) <= 110 else question[:109] + "…",
                "answer": cut(e.get("answer", "")),
                "reason": None if e.get("reason") in (None, "kept") else cut(e["reason"]),
                **spoken(e),
            }
            for e in p.get("examples") or ()
        ]
        if shown:
            groups.append((f"Round {p.get('round', '–')} · {', '.join(owners(p))}", shown))
    return part("examples", groups=groups) if groups else ""
