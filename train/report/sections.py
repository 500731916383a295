"""The words and tables of a report, from what the run has written; with nothing to say, a part is empty."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..log import format_percent, format_seconds
from ..runtime.jsonl import Row
from .html import Bar, Cell, Table, part
from .read import owners
from .rows import DOMAIN_NAMES, format_interval, method_label, pooled_rows
from .verdict import compared_at, format_interval_of, format_points, last_pairs

if TYPE_CHECKING:
    from .read import Run

PHASES = {
    "load": "loading", "sample": "sampling", "select": "selecting", "part": "splitting", "sft": "fine-tuning",
    "gate": "comparing teacher and student", "policy": "learning from fresh samples", "join": "merging branches",
    "merge": "merging",
    "evaluate": "evaluating", "probe": "probing", "rank": "ranking", "save": "saving",
}  # fmt: skip


def _number(value: Any, form: str = ",") -> str:
    return "–" if value is None or (isinstance(value, float) and not math.isfinite(value)) else format(value, form)


def last_rounds(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Return method → domain → row of the method's last round, sweeps left out."""
    last: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("coefficient") is None and row["method"] != "line" and row.get("accuracy") is not None:
            cell = last.setdefault(row["method"], {})
            if row["domain"] not in cell or row["round"] >= cell[row["domain"]]["round"]:
                cell[row["domain"]] = row
    return last


def headline(run: Run, meaning: str) -> str:
    """Show each method's last round, in and out of domain, beside the base; `meaning` says what is beyond chance."""
    last = last_rounds(pooled_rows(run.rows))
    if not last:
        return ""
    base = last.get("base", {})
    paired = compared_at(run.summary.get("paired") or ())
    cards = []
    for method, cells in last.items():
        lines = []
        for domain in ("id", "ood"):
            row = cells.get(domain)
            if row is None:
                continue
            small = format_interval(row)
            if method != "base" and domain in base:
                pair = paired.get((method, row["round"], domain, row.get("split", "test")))
                small = f"{format_points(row['accuracy'] - base[domain]['accuracy'])} points"
                if pair:
                    small = f"{format_points(pair['difference'])} {format_interval_of(pair)}"
            lines.append((DOMAIN_NAMES[domain], format_percent(row["accuracy"]), small))
        rounds = max(row["round"] for row in cells.values())
        title = method + ("" if method == "base" else f" after round {rounds}")
        cards.append({"css": run.looks[method].css, "title": title, "lines": lines})
    below = (
        "for the base its 95 % interval, for the others the change against the base in points, with the 95 % interval"
        " of the paired difference where it was measured"
    )
    note = f"Share of questions answered right. Below it: {below if base else 'its 95 % interval'}."
    return part("headline", cards=cards, note=note, meaning=meaning)


def _accuracy_cell(row: Row | None, n: int | None) -> str | Cell:
    if row is None:
        return "–"
    count = "" if row.get("n") == n else f" n {_number(row.get('n'))}"
    mark = "" if row.get("split", "test") == "test" else f" {row['split']}"
    return Cell(format_percent(row.get("accuracy")), f"{format_interval(row)}{count}{mark}")


def in_order(domains: Collection[str]) -> list[str]:
    """Order domains as tables show them: first the two that the claim is about."""
    known = [d for d in ("id", "ood", "harder", "unseen") if d in domains]
    return known + sorted(set(domains) - set(known))


def accuracy_table(run: Run) -> str:
    """Show method × round × domain, and every row as it was measured behind a fold."""
    rows = pooled_rows(run.rows)
    if not run.rows:
        return part("paragraph", text="Nothing has been evaluated yet.")
    domains = in_order({row["domain"] for row in rows})
    common: dict[str, int | None] = {}  # n, said once in the head where a domain has the same everywhere
    for domain in domains:
        counts = {row.get("n") for row in rows if row["domain"] == domain}
        common[domain] = counts.pop() if len(counts) == 1 else None
    lines: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((method_label(row), row["method"], row["round"]), {})[row["domain"]] = row
    body, firsts, before = [], [], None
    for (label, method, round_), cells in lines.items():
        if method != before:
            firsts.append(len(body))
        before = method
        seconds = sum(row.get("seconds") or 0.0 for row in cells.values())
        body.append(
            [
                label,
                str(round_),
                *(_accuracy_cell(cells.get(d), common[d]) for d in domains),
                f"{seconds:,.1f}",
            ]
        )
    names = [Cell(DOMAIN_NAMES.get(d, d), f"n {common[d]:,}" if common[d] else "") for d in domains]
    head = ["method", "round", *names, "seconds"]
    caption = "Share of questions answered right, families pooled, with 95 % intervals; seconds of evaluation."
    every = [
        [
            method_label(row),
            str(row["round"]),
            DOMAIN_NAMES.get(row["domain"], row["domain"]),
            row.get("family", "all"),
            row.get("split", "test"),
            format_percent(row.get("accuracy")),
            format_interval(row),
            _number(row.get("n")),
            _number(row.get("seconds"), ",.1f"),
        ]
        for row in run.rows
    ]
    names = ["method", "round", "domain", "family", "split", "accuracy", "95 % interval", "n", "seconds"]
    full = Table(names, every, "Every row of the evaluation.", left=(0, 2, 3, 4))
    return part("table", t=Table(head, body, caption, groups=firsts)) + part(
        "folded", summary=f"All {len(every)} rows", t=full
    )


def paired_table(run: Run) -> str:
    """Show differences between two models on the same questions: the last round's, and all behind a fold."""
    pairs = run.summary.get("paired") or []
    if not pairs:
        return ""
    last = last_pairs(pairs)
    caption = "Difference in percentage points on the same questions, with its 95 % interval"
    shown = part("table", t=differences(last, f"{caption}; last round."))
    if len(last) < len(pairs):
        every = differences(pairs, f"{caption}; every round.")
        shown += part("folded", summary=f"All {len(every.rows)} pairs of models", t=every)
    return shown


def gates(run: Run) -> str:
    """Show whether each teacher answered the validation questions better than its student before distillation."""
    body = [
        [
            ", ".join(owners(p)),
            ("its average" if p["average"] else "another model")
            + (", shown the worked solution" if p["demonstrates"] else ""),
            format_percent(p["teacher"]), format_percent(p["student"]),
            f"{format_points(p['difference'])} {format_interval_of(p)}", _number(p["n"]),
            "yes" if p["better"] else "no",
        ]
        for p in run.of_kind("gate")
    ]  # fmt: skip
    head = ["method", "teacher", "its accuracy", "the student's", "difference", "n", "better beyond chance"]
    caption = "Before distillation, on validation questions: the teacher as it will read them, and the student."
    return part("table", t=Table(head, body, caption, left=(0, 1))) if body else ""


def differences(pairs: Sequence[Row], caption: str) -> Table:
    """Make the table of some paired differences: a row a pair of models, a column a domain and split."""
    columns: dict[tuple[str, str], set[int | None]] = {}
    rows: dict[tuple[str, str, int | None], dict[tuple[str, str], Row]] = {}
    for p in pairs:
        column = p["domain"], p.get("split", "test")
        columns.setdefault(column, set()).add(p.get("n"))
        rows.setdefault((p["a"], p["b"], p.get("round")), {})[column] = p
    order = in_order({domain for domain, _ in columns})
    columns = dict(sorted(columns.items(), key=lambda item: order.index(item[0][0])))
    heads = []
    for (domain, split), counts in columns.items():
        word = DOMAIN_NAMES.get(domain, domain) + ("" if split == "test" else f" ({split})")
        heads.append(Cell(word, "n " + ", ".join(_number(n) for n in sorted(counts, key=lambda n: n or 0))))
    body = [
        [
            f"{a} − {b}",
            _number(number),
            *(
                Cell(format_points(p["difference"]), format_interval_of(p)) if (p := cells.get(column)) else "–"
                for column in columns
            ),
        ]
        for (a, b, number), cells in rows.items()
    ]
    return Table(["difference", "round", *heads], body, caption)


def pass_table(run: Run) -> str:
    """Show the chance that one of k samples is right, and that the one chosen of all samples is."""
    rows = [r for r in pooled_rows(run.rows) if r.get("pass_at")]
    if not rows:
        return ""
    ks = sorted({int(k) for r in rows for k in r["pass_at"]})
    chosen = [name for name in ("maj", "rank") if any(r.get(f"{name}_at") for r in rows)]
    body = [
        [
            r["method"], _number(r["round"]), DOMAIN_NAMES.get(r["domain"], r["domain"]),
            *(format_percent(r["pass_at"].get(str(k))) for k in ks),
            *(format_percent((r.get(f"{name}_at") or {}).get(str(ks[-1]))) for name in chosen), _number(r["n"]),
        ]
        for r in rows
    ]  # fmt: skip
    caption = "Share of questions that one of k samples answers, estimated without bias from all samples drawn."
    if chosen:
        caption += " One answer of k samples: the most frequent one (maj), that of the likeliest sample (rank)."
    head = ["method", "round", "domain", *(f"pass@{k}" for k in ks), *(f"{name}@{ks[-1]}" for name in chosen), "n"]
    return part("table", t=Table(head, body, caption, left=(0, 2)))


def samples(run: Run) -> str:
    """Show how many samples each round drew, and what became of them."""
    tokens = {(p.get("round"), p.get("method")): p for p in run.of_kind("sample")}
    body, shares = [], []
    for p in run.of_kind("select"):
        sampled, kept, correct = (int(p.get(key) or 0) for key in ("sampled", "kept", "correct"))
        unjudged = int(p.get("unjudged") or 0)
        wrong = max(sampled - correct - unjudged, 0)
        parts = [("n0", kept), ("n1", max(correct - kept, 0)), ("n2", unjudged), ("faint", wrong)]
        said = f"{kept} kept, {correct - kept} correct but not kept, {unjudged} not judged, {wrong} wrong"
        drawn = tokens.get((p.get("round"), p.get("method")), {})
        body.append(
            [
                ", ".join(owners(p)), _number(p.get("round")),
                Bar(parts, said), _number(sampled), _number(correct),
                _number(p.get("duplicates")), _number(p.get("unjudged")), _number(kept),
                _number(p.get("questions_solved")), _number(drawn.get("tokens_per_second"), ",.0f"),
            ]
        )  # fmt: skip
        shares += [
            [
                ", ".join(owners(p)), _number(p.get("round")), family,
                _number(counts.get("sampled")),
                _number(counts.get("correct")),
                format_percent(counts["correct"] / counts["sampled"] if counts.get("sampled") else None),
            ]
            for family, counts in (p.get("families") or {}).items()
        ]  # fmt: skip
    if not body:
        return ""
    key = (("n0", "kept"), ("n1", "correct, not kept"), ("n2", "not judged"), ("faint", "wrong"))
    head = ["method", "round", "share", "sampled", "correct", "duplicates", "not judged", "kept"]
    head += ["questions solved", "tokens/s"]
    caption = "Samples drawn for training, and what became of them:"
    result = part("table", t=Table(head, body, caption, left=(0, 2), key=key))
    if shares:
        columns = ["method", "round", "family", "sampled", "correct", "share"]
        result += part("folded", summary="By family", t=Table(columns, shares, "Samples by family.", left=(0, 2)))
    return result


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
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        share = format_percent(seconds / total)
        drawn = Bar([("n0", seconds), ("faint", total - seconds)], share)
        body.append([PHASES.get(kind, kind), drawn, share, format_seconds(seconds)])
    phases = [
        [
            p.get("phase", "?"), p.get("kind", "?"), _number(p.get("round")),
            ", ".join(owners(p)), _number(p.get("seconds"), ",.1f"),
        ]
        for p in run.phases
    ]  # fmt: skip
    caption = f"Wall-clock time by kind of phase; {format_seconds(total)} in all."
    result = part("table", t=Table(["phase", "", "share", "time"], body, caption, left=(0, 1)))
    if phases:
        head = ["phase", "kind", "round", "for", "seconds"]
        listed = Table(head, phases, "Phases in order.", left=(0, 1, 3))
        result += part("folded", summary=f"All {len(phases)} phases", t=listed)
    return result


def again(run: Run) -> str:
    """Give the command, the versions and the resolved config."""
    merges = [
        f"{p.get('phase', '')}: {p.get('rule', '')} {json.dumps(p.get('coefficients') or {}, ensure_ascii=False)}"
        + "".join(f"\n  {note}" for note in p.get("notes") or ())
        for p in run.of_kind("merge")
    ]
    versions = [[name, str(version)] for name, version in (run.summary.get("versions") or {}).items()]
    command = run.summary.get("command")
    if not (command or versions or run.config or merges):
        return ""
    return part(
        "again", command=command, config=run.config, merges="\n".join(merges),
        versions=Table(["package", "version"], versions, "Versions.", left=(0, 1)) if versions else None,
    )  # fmt: skip
