"""What stands under a report's title: which model did what, and how far the run is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..log import format_seconds
from .html import Bar, part
from .rows import DOMAIN_NAMES

if TYPE_CHECKING:
    from .read import Run


def facts(run: Run) -> list[tuple[str, str]]:
    """Name the model, the task, the methods and the machine: (term, words) of what is known."""
    rows = [
        ("Model", model(run)),
        ("Learns from", ", ".join(f"{name} ({count:,} questions)" for name, _, count in asked(run, "train"))),
        ("Tested on", tested(run)),
        ("Methods", trained(run)),
        ("Run", made(run)),
    ]
    return [(term, words) for term, words in rows if words]


def model(run: Run) -> str:
    """Name the model the run begins with, its size and its type."""
    block = run.setting("model")
    path = block if isinstance(block, str) else run.setting("model", "path")
    layers, width = (run.setting("model", "random", key) for key in ("num_hidden_layers", "hidden_size"))
    name = str(path) if path else f"random weights ({layers} layers, hidden size {width})" if layers else ""
    count = next((p["parameters"] for p in run.of_kind("load") if isinstance(p.get("parameters"), int)), None)
    size = "" if count is None else f"{format_count(count)} parameters"
    return " · ".join(str(word) for word in (name, size, run.setting("model", "dtype")) if word)


def format_count(count: int) -> str:
    """Write a number of parameters as people say it.

    Example:
      >>> format_count(1_240_000_000), format_count(134_515_008), format_count(32_480)
      ('1.24 B', '134.5 M', '32,480')
    """
    if count >= 10**9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 10**6 else f"{count:,}"


def asked(run: Run, split: str) -> Iterator[tuple[str, str, int]]:
    """Yield family, domain and number of questions of the families that have a split, as the config lists them."""
    for block in ("tasks", "questions"):
        families = run.setting(block, "families")
        for spec in families if isinstance(families, list) else ():
            count = spec.get(split) if isinstance(spec, dict) else None
            if isinstance(count, int) and count > 0:
                yield str(spec.get("family")), str(spec.get("domain")), count


def tested(run: Run) -> str:
    """List the families by domain with their test questions, or their validation questions where none is tested."""
    found = list(asked(run, "test")) or list(asked(run, "validation"))
    by_domain: dict[str, list[str]] = {}
    for family, domain, count in found:
        by_domain.setdefault(domain, []).append(f"{family} ({count:,})")
    return "; ".join(f"{DOMAIN_NAMES.get(domain, domain)}: {', '.join(names)}" for domain, names in by_domain.items())


def trained(run: Run) -> str:
    rounds: Any = run.setting("rounds") or max((row["round"] for row in run.rows), default=0)
    words = ", ".join(run.methods)
    return f"{words} · {rounds} round{'' if rounds == 1 else 's'}" if words and rounds else words


def made(run: Run) -> str:
    """Say how long the run took on what, and of which commit it is."""
    spent = sum(phase.get("seconds") or 0.0 for phase in run.phases)
    seconds = (run.summary.get("seconds") if run.finished else None) or spent
    parts = [
        format_seconds(seconds) + (f" on {run.summary['device']}" if "device" in run.summary else ""),
        f"commit {str(run.summary['commit'])[:12]}" if run.summary.get("commit") else "",
    ]
    return " · ".join(part for part in parts if part)


def whole(run: Run) -> str:
    """Draw the bar of the whole run: the phases that are done, of all that are planned."""
    planned = run.summary.get("planned") or []
    left = run.summary.get("left") or []
    if not planned:
        return ""
    done = len(planned) - len(left)
    words = f"{done} of {len(planned)} phases are done"
    if left:
        words += f"; next is {left[0]}"
    return part("whole", bar=Bar([("n0", done), ("faint", len(left))], words), words=f"{words}.")
