"""The parts of a report, each from what the run has written; a part with nothing to say is empty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .charts import Series, curves, family_dots, frontier, interval_bar, layer_series, looks, stacked_bar
from .figures import escape
from .log import (
    DOMAIN_NAMES,
    DOMAINS,
    format_interval,
    format_percent,
    format_seconds,
    method_label,
    pooled_rows,
)

if TYPE_CHECKING:
    from .report import Run

Row = Mapping[str, Any]
PHASES = {
    "load": "loading", "sample": "sampling", "select": "selecting", "sft": "fine-tuning", "merge": "merging",
    "evaluate": "evaluating", "save": "saving",
}  # fmt: skip


def table(
    head: Sequence[str], body: Sequence[Sequence[str]], *, caption: str, left: int = 1, firsts=()
) -> str:
    """Write a table whose cells are HTML already; `firsts` are the rows that open a group."""
    align = [' class="l"' if i < left else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{a}>{h}</th>' for h, a in zip(head, align, strict=True))
    lines = []
    for number, row in enumerate(body):
        cells = f'<th scope="row" class="l">{row[0]}</th>'
        cells += "".join(f"<td{a}>{cell}</td>" for cell, a in zip(row[1:], align[1:], strict=True))
        lines.append(f"<tr{' class=first' if number in firsts else ''}>{cells}</tr>")
    inside = f"<caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>{inside}</table></div>'


def details(summary: str, content: str) -> str:
    """Fold something away behind its one-line summary, both HTML already."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def _methods(run: Run) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in run.rows))


def _colour(run: Run, method: str) -> str:
    fill = looks(_methods(run))[method].fill
    return f"var(--s{fill[1:]})" if fill[1:].isdigit() else "var(--ink)" if fill == "fb" else "var(--soft)"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _number(value: Any, form: str = ",") -> str:
    return (
        "–"
        if value is None or (isinstance(value, float) and not math.isfinite(value))
        else format(value, form)
    )


def facts(run: Run) -> str:
    """Say in one line what ran where, and for how long."""
    seconds = run.summary.get("seconds") or sum(phase.get("seconds", 0.0) for phase in run.phases)
    rounds = max((row["round"] for row in run.rows), default=0)
    parts = [
        f"{rounds} round{'' if rounds == 1 else 's'}" if rounds else "",
        ", ".join(_methods(run)),
        f"{format_seconds(seconds)} on {run.summary['device']}"
        if "device" in run.summary
        else format_seconds(seconds),
        f"commit {str(run.summary['commit'])[:12]}" if run.summary.get("commit") else "",
    ]
    return f'<p class="quiet">{escape(" · ".join(part for part in parts if part))}</p>'


def _last_rounds(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Return method → domain → row of the method's last round, sweeps left out."""
    last: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("coefficient") is None and row["method"] != "line" and row.get("accuracy") is not None:
            cell = last.setdefault(row["method"], {})
            if row["domain"] not in cell or row["round"] >= cell[row["domain"]]["round"]:
                cell[row["domain"]] = row
    return last


def headline(run: Run) -> str:
    """Show each method's last round, in and out of domain, beside the base."""
    last = _last_rounds(pooled_rows(run.rows))
    if not last:
        return ""
    base = last.get("base", {})
    paired = {(p["a"], p["b"], p.get("round"), p["domain"]): p for p in run.summary.get("paired", ())}
    cards = []
    for method, cells in last.items():
        lines = []
        for domain in ("id", "ood"):
            row = cells.get(domain)
            if row is None:
                continue
            small = f"95 % {format_interval(row)}"
            if method != "base" and domain in base:
                pair = paired.get((method, "base", row["round"], domain))
                difference = pair["difference"] if pair else row["accuracy"] - base[domain]["accuracy"]
                small = f"{_points(difference)} points against the base"
                if pair:
                    small += f"<br>95 % [{_points(pair['low'])}, {_points(pair['high'])}]"
            lines.append(
                f"<dt>{DOMAIN_NAMES[domain]}</dt><dd>{format_percent(row['accuracy'])}<small>{small}</small></dd>"
            )
        rounds = max(row["round"] for row in cells.values())
        name = escape(method) + ("" if method == "base" else f" after round {rounds}")
        cards.append(
            f'<div class="card" style="--c:{_colour(run, method)}"><h3>{name}</h3><dl>{"".join(lines)}</dl></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def picture(run: Run) -> str:
    """Show accuracy in domain against out of domain, in a wide and a narrow drawing."""
    rows = pooled_rows(run.rows)
    wide = frontier(rows, width=1040, height=580, name="wide")
    if not wide:
        return ""
    narrow = frontier(rows, width=350, height=400, name="narrow")
    swept = any(row.get("coefficient") is not None or row["method"] == "line" for row in rows)
    curve = (
        " The dashed curve is base + λ · (tuned − base): one fine-tuned model, scaled between the base (λ 0), itself"
        " (λ 1) and beyond. A method above that curve does more than train less." if swept else ""
    )  # fmt: skip
    return (
        f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div><figcaption>Each method starts'
        " at the base and takes one numbered step a round; to the right it has learnt the trained family, downwards"
        " it has forgotten others. The tinted quarter is better than the base in both. Thin crosses are 95 %"
        f" intervals of each accuracy by itself.{curve} The same picture for a paper: <a"
        ' href="figures/frontier.svg">figures/frontier.svg</a>.</figcaption></figure>'
    )


def _accuracy_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    mark = "" if row.get("split", "test") == "test" else f" {escape(row['split'])}"
    return f"{format_percent(row.get('accuracy'))}<small>{format_interval(row)} n {_number(row.get('n'))}{mark}</small>"


def accuracy_table(run: Run) -> str:
    """Show method × round × domain, and every row as it was measured behind a fold."""
    rows = pooled_rows(run.rows)
    if not run.rows:
        return "<p>Nothing has been evaluated yet.</p>"
    domains = [d for d in DOMAINS if any(row["domain"] == d for row in rows)]
    domains += sorted({row["domain"] for row in rows} - set(domains))
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((method_label(row), row["method"], row["round"]), {})[row["domain"]] = row
    body, firsts, before = [], [], None
    for (label, method, round_), cells in lines.items():
        if method != before:
            firsts.append(len(body))
        before = method
        seconds = sum(row.get("seconds") or 0.0 for row in cells.values())
        body.append(
            [escape(label), str(round_), *(_accuracy_cell(cells.get(d)) for d in domains), f"{seconds:,.1f}"]
        )
    head = ["method", "round", *(escape(DOMAIN_NAMES.get(d, d)) for d in domains), "seconds"]
    caption = "Share of questions answered right, families pooled, with 95 % intervals, n, and seconds of evaluation."
    every = [
        [
            escape(method_label(row)), str(row["round"]), escape(DOMAIN_NAMES.get(row["domain"], row["domain"])),
            escape(row.get("family", "all")), escape(row.get("split", "test")), format_percent(row.get("accuracy")),
            format_interval(row), _number(row.get("n")), _number(row.get("seconds"), ",.1f"),
        ]
        for row in run.rows
    ]  # fmt: skip
    names = ["method", "round", "domain", "family", "split", "accuracy", "95 % interval", "n", "seconds"]
    full = table(names, every, caption="Every row of the evaluation.")
    return table(head, body, caption=caption, firsts=firsts) + details(f"All {len(every)} rows", full)


def paired_table(run: Run) -> str:
    """Show differences between two models on the same questions."""
    pairs = run.summary.get("paired") or []
    if not pairs:
        return ""
    reach = max(max(abs(p["low"]), abs(p["high"]), 0.01) for p in pairs)
    body = []
    for i, p in enumerate(pairs):
        said = f"{_points(p['difference'])} points, from {_points(p['low'])} to {_points(p['high'])}"
        bar = interval_bar(p["low"], p["difference"], p["high"], reach=reach, name=f"pair{i}", said=said)
        body.append(
            [
                f"{escape(p['a'])} − {escape(p['b'])}", _number(p.get("round")),
                escape(DOMAIN_NAMES.get(p["domain"], p["domain"])), _points(p["difference"]),
                f"[{_points(p['low'])}, {_points(p['high'])}]", bar, _number(p.get("n")),
            ]
        )  # fmt: skip
    caption = (
        f"Difference in percentage points on the same questions. The bars span ±{100 * reach:.0f} points around zero;"
        " green lies above zero, orange below, black may be either."
    )
    head = ["difference", "round", "domain", "points", "95 % interval", "", "n"]
    head[5] = '<span aria-hidden="true">−  0  +</span>'
    return table(head, body, caption=caption)


def families(run: Run) -> str:
    """Show each family by itself: a dot a method, after its last round."""
    single = [r for r in run.rows if r.get("family", "all") != "all" and r.get("accuracy") is not None]
    tested = {(r["domain"], r["family"]) for r in single if r.get("split", "test") == "test"}
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in single:
        key = (row["domain"], row["family"])
        if key not in tested or row.get("split", "test") == "test":
            panels.setdefault(key, []).append(row)
    drawn = []
    order = {d: i for i, d in enumerate(DOMAINS)}
    for domain, family in sorted(panels, key=lambda key: (order.get(key[0], 9), key[1])):
        last = _last_rounds(panels[domain, family])
        rows = [cells[domain] for cells in last.values()]
        if rows:
            title = f"{family} · {DOMAIN_NAMES.get(domain, domain)}"
            drawn.append(family_dots(rows, title=title, name=f"family{len(drawn)}", methods=_methods(run)))
    if not drawn:
        return ""
    note = "After each method's last round, with 95 % intervals; the dotted rule is the base. Numbers in percent."
    return f'<p class="quiet">{note}</p><div class="panels">{"".join(drawn)}</div>'


def _owners(phase: Row) -> list[str]:
    return [str(phase.get("method", "all")), *map(str, phase.get("shared_by") or ())]


def samples(run: Run) -> str:
    """Show how many samples each round drew, and what became of them."""
    tokens = {(p.get("round"), p.get("method")): p for p in run.of_kind("sample")}
    body, shares = [], []
    for i, p in enumerate(run.of_kind("select")):
        sampled, kept, correct = (int(p.get(key) or 0) for key in ("sampled", "kept", "correct"))
        unjudged = int(p.get("unjudged") or 0)
        wrong = max(sampled - correct - unjudged, 0)
        parts = [("f2", kept), ("f0", max(correct - kept, 0)), ("f4", unjudged), ("fx", wrong)]
        said = f"{kept} kept, {correct - kept} correct but not kept, {unjudged} not judged, {wrong} wrong"
        drawn = tokens.get((p.get("round"), p.get("method")), {})
        body.append(
            [
                escape(", ".join(_owners(p))), _number(p.get("round")),
                stacked_bar(parts, total=sampled, name=f"share{i}", said=said), _number(sampled), _number(correct),
                _number(p.get("duplicates")), _number(p.get("unjudged")), _number(kept),
                _number(p.get("questions_solved")), _number(drawn.get("tokens_per_second"), ",.0f"),
            ]
        )  # fmt: skip
        shares += [
            [
                escape(", ".join(_owners(p))), _number(p.get("round")), escape(family), _number(counts.get("sampled")),
                _number(counts.get("correct")),
                format_percent(counts["correct"] / counts["sampled"] if counts.get("sampled") else None),
            ]
            for family, counts in (p.get("families") or {}).items()
        ]  # fmt: skip
    if not body:
        return ""
    keys = (("--s2", "kept"), ("--s0", "correct, not kept"), ("--s4", "not judged"), ("--faint", "wrong"))
    key = "".join(f'<span class="key" style="background:var({c})"></span>{name}' for c, name in keys)
    head = ["method", "round", "", "sampled", "correct", "duplicates", "not judged", "kept"]
    head[2] = "share"
    head += ["questions solved", "tokens/s"]
    result = table(head, body, caption=f"Samples drawn for training, and what became of them:{key}")
    if shares:
        columns = ["method", "round", "family", "sampled", "correct", "share"]
        result += details("By family", table(columns, shares, caption="Samples by family."))
    return result


def examples(run: Run) -> str:
    """Show some of the sampled solutions, folded, as text and nothing else."""
    parts = []
    for p in run.of_kind("select"):
        shown = []
        for e in p.get("examples") or ():
            word = (
                '<span class="yes">accepted</span>'
                if e.get("accepted")
                else '<span class="no">rejected</span>'
            )
            score = "not judged" if e.get("score") is None else f"score {e['score']:g}"
            reason = f" · {escape(e['reason'])}" if e.get("reason") else ""
            question = str(e.get("question", ""))
            short = question if len(question) <= 110 else question[:109] + "…"
            shown.append(
                details(
                    f"{word} · {escape(short)}",
                    f"<pre>{escape(question)}</pre><pre>{escape(e.get('text', ''))}</pre>"
                    f'<p class="quiet">expected answer <code>{escape(e.get("answer", ""))}</code> · {score}{reason}</p>',
                )
            )
        if shown:
            parts.append(
                f"<h3>Round {_number(p.get('round'))} · {escape(', '.join(_owners(p)))}</h3>{''.join(shown)}"
            )
    return "".join(parts)


def _panels(
    run: Run, grouped: Mapping[str, list[Series]], draw: Callable[[str, list[Series], str], str]
) -> str:
    style = looks([*_methods(run), *(m for m in grouped if m not in _methods(run))])
    drawn = [draw(method, series, style[method].stroke) for method, series in grouped.items() if series]
    return f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""


def training(run: Run) -> str:
    """Show the loss of each fine-tuning, one panel a method, one line a round."""
    grouped: dict[str, list[Series]] = {}
    for p in run.of_kind("sft"):
        points = [(float(a), float(b)) for a, b in p.get("loss") or () if b is not None and math.isfinite(b)]
        if points:
            for method in _owners(p):
                grouped.setdefault(method, []).append(Series(f"round {p.get('round', '?')}", points))
    everything = [point for series in grouped.values() for s in series for point in s.points]
    if not everything:
        return ""
    x_high, y_high = max(a for a, _ in everything), 1.05 * max(b for _, b in everything)
    return _panels(
        run, grouped,
        lambda method, series, css: curves(
            series, title=method, name=f"loss-{_id(method)}", css=css, x_title="step →", y_title="loss",
            x_high=x_high, y_high=y_high,
        ),
    )  # fmt: skip


def _id(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text)


def layers(run: Run) -> str:
    """Show how far each layer has moved from the first model: after a merge whole, before it dotted."""
    merged = {(m, p.get("round")) for p in run.of_kind("merge") for m in _owners(p) if p.get("change")}
    grouped: dict[str, list[Series]] = {}
    for p in run.phases:
        if p.get("kind") in ("sft", "merge") and p.get("change"):
            change = {k: float(v) for k, v in p["change"].items() if v is not None and math.isfinite(v)}
            for method in _owners(p):
                before = p["kind"] == "sft" and (method, p.get("round")) in merged
                label = "" if before else f"round {p.get('round', '?')}"
                series = layer_series(change, label, faint=before)
                if series.points:
                    grouped.setdefault(method, []).append(series)
    everything = [s for series in grouped.values() for s in series]
    if not everything:
        return ""
    x_high = max(a for s in everything for a, _ in s.points)
    y_high = 1.05 * max(v for s in everything for v in (*(b for _, b in s.points), *s.loose.values()))
    note = (
        "‖θ − θ₀‖ / ‖θ₀‖ of each decoder layer after each round, θ₀ the weights the run began with; embedding, final"
        " norm and head apart. Dotted: before the merge of that round."
    )
    return f'<p class="quiet">{note}</p>' + _panels(
        run, grouped,
        lambda method, series, css: curves(
            series, title=method, name=f"layers-{_id(method)}", css=css, x_title="layer →", y_title="relative change",
            x_high=x_high, y_high=y_high, percent=True,
        ),
    )  # fmt: skip


def time(run: Run) -> str:
    """Show where the time went, by kind of phase, and each phase behind a fold."""
    spent: dict[str, float] = dict(run.summary.get("phase_seconds") or {})
    if not spent:
        for p in run.phases:
            spent[p.get("kind", "?")] = spent.get(p.get("kind", "?"), 0.0) + (p.get("seconds") or 0.0)
    total = sum(spent.values())
    if not total:
        return ""
    body = []
    for i, (kind, seconds) in enumerate(sorted(spent.items(), key=lambda item: -item[1])):
        share = format_percent(seconds / total)
        bar = stacked_bar(
            [("f0", seconds), ("fx", total - seconds)], total=total, name=f"time{i}", said=share
        )
        body.append([escape(PHASES.get(kind, kind)), bar, share, format_seconds(seconds)])
    phases = [
        [
            escape(p.get("phase", "?")), escape(p.get("kind", "?")), _number(p.get("round")),
            escape(", ".join(_owners(p))), _number(p.get("seconds"), ",.1f"),
        ]
        for p in run.phases
    ]  # fmt: skip
    caption = f"Wall-clock time by kind of phase; {format_seconds(total)} in all."
    result = table(["phase", "", "share", "time"], body, caption=caption)
    if phases:
        head = ["phase", "kind", "round", "for", "seconds"]
        result += details(f"All {len(phases)} phases", table(head, phases, caption="Phases in order."))
    return result


def again(run: Run) -> str:
    """Give the command, the versions and the resolved config."""
    parts = []
    if run.summary.get("command"):
        parts.append(f"<p>The command that made this run:</p><pre>{escape(run.summary['command'])}</pre>")
    versions = run.summary.get("versions") or {}
    if versions:
        body = [[escape(name), escape(version)] for name, version in versions.items()]
        parts.append(table(["package", "version"], body, caption="Versions."))
    if run.config:
        text = run.config
        parts.append(details("The resolved config", f"<pre>{escape(text)}</pre>"))
    merges = [
        f"{p.get('phase', '')}: {p.get('rule', '')} {json.dumps(p.get('coefficients') or {}, ensure_ascii=False)}"
        + "".join(f"\n  {note}" for note in p.get("notes") or ())
        for p in run.of_kind("merge")
    ]
    if merges:
        parts.append(details("The merges", f"<pre>{escape(chr(10).join(merges))}</pre>"))
    return "".join(parts)
