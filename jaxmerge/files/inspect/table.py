"""What `compare` found, as lines for a terminal: a row a layer, at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, NAME, COLUMN = 100, 24, 10
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOWN = 5  # of a list of tensors


def table(result: Mapping[str, Any]) -> str:
    """Write a result of `compare` for a terminal: layers, all together, then what is not in these rows."""
    rows = {**result["layers"], "all": result["overall"]}
    models = result["models"]
    lines = [f"base {short(result['base'], WIDTH - 5)}"]
    lines += [f"{_letter(i):4} {short(name, WIDTH - 5)}" for i, name in enumerate(models)]
    lines.append("")
    lines += _one(rows) if len(models) == 1 else _several(rows, len(models))
    if len(models) > 1:
        lines += [
            "",
            *aligned(["pair", "cosine", "overlap", "conflict"], [_pair(p) for p in result["overall"]["pairs"]]),
        ]
    lines += _notes(result)
    return "\n".join(lines)


def _letter(i: int) -> str:
    return LETTERS[i] if i < len(LETTERS) else f"#{i + 1}"


def _one(rows: Mapping[str, Any]) -> list[str]:
    head = ["layer", "‖W‖", "‖Δ‖", "‖Δ‖/‖W‖", "cosine", "max |Δ|", "changed", "flipped"]
    body = []
    for name, entry in rows.items():
        m = entry["models"][0]
        body.append([
            name, _number(entry["norm"]), _number(m["norm"]), _share(m["relative"]), _cosine(m["cosine"]),
            _number(m["largest"]), _share(m["changed"]), _share(m["flipped"]),
        ])  # fmt: skip
    return aligned(head, body)


def _several(rows: Mapping[str, Any], models: int) -> list[str]:
    """Relative change of each model while it fits; of the pairs the mean cosine and the pooled conflict."""
    fits = min(models, (WIDTH - NAME) // COLUMN - 2)
    head = ["layer", *(f"{_letter(i)} ‖Δ‖/‖W‖" for i in range(fits)), "cosine", "conflict"]
    body = []
    for name, entry in rows.items():
        cosines = [p["cosine"] for p in entry["pairs"] if p["cosine"] is not None]
        both = sum(p["overlap"] or 0.0 for p in entry["pairs"])
        opposed = sum((p["overlap"] or 0.0) * (p["conflict"] or 0.0) for p in entry["pairs"])
        body.append([
            name, *(_share(m["relative"]) for m in entry["models"][:fits]),
            _cosine(sum(cosines) / len(cosines) if cosines else None), _share(opposed / both if both else None),
        ])  # fmt: skip
    more = [f"({models - fits} more models: in the JSON)"] if models > fits else []
    return aligned(head, body) + more


def _pair(pair: Mapping[str, Any]) -> list[str]:
    i, j = pair["models"]
    return [f"{_letter(i)} · {_letter(j)}", _cosine(pair["cosine"]), _share(pair["overlap"]), _share(pair["conflict"])]


def _notes(result: Mapping[str, Any]) -> list[str]:
    called = {result["base"]: "base"} | {name: _letter(i) for i, name in enumerate(result["models"])}
    lines = []
    for what, key in (("lacks", "missing"), ("has besides", "extra")):
        for model, names in result[key].items():
            if names:
                lines += [f"{called.get(model, '?')} {what} {len(names)} tensors:", *_some(names)]
    if result["unlike"]:
        lines.append("not compared, for their shapes differ from the base's:")
        lines += _some(
            [
                f"{u['tensor']}: {u['found']} in {called.get(u['model'], '?')}, not {u['wanted']}"
                for u in result["unlike"]
            ]
        )
    if result["nonfinite"]:
        lines.append("not finite, taken as 0 above:")
        lines += _some(
            [
                f"{n['nan']} NaN, {n['infinite']} infinite in {called.get(n['model'], '?')} {n['tensor']}"
                for n in result["nonfinite"]
            ]
        )
    return ["", *lines] if lines else []


def _some(items: Sequence[str]) -> list[str]:
    more = [f"  … and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [f"  {short(item, WIDTH - 2)}" for item in items[:SHOWN]] + more


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], last: int = 0) -> list[str]:
    """Write rows in columns, names to the left, numbers to the right; `last`: width of a last column of words."""
    rows = [head, *body]
    first = min(NAME, max(len(row[0]) for row in rows))
    widths = [max(COLUMN, 1 + max(len(row[i]) for row in rows)) for i in range(1, len(head) - (last > 0))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths, strict=False)]
        words = [f"  {short(row[-1], last)}"] if last else []
        lines.append("".join([short(row[0], first).ljust(first), *cells, *words]).rstrip())
    return lines


def short(text: str, width: int) -> str:
    """Cut text to a width; the end of a path says more than its beginning. One line, whatever is in it."""
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 10:
        return f"× {value:.3g}"
    return f"{100 * value:.3g} %" if value >= 1e-5 or not value else f"{100 * value:.0e} %"


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"
