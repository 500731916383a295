"""The sections on losses along and around the models, and on samples: `sections.py` goes on here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .analysis_weights import Found, Section, domain_name, figure, percent, spell
from .html import Table
from .plots import Line, dots, lines, short, terrain


def line(found: Found) -> Section:
    data = found["line"]
    lambdas = data["coefficients"]
    drawn = [
        Line(domain_name(domain), list(zip(lambdas, values, strict=True))) for domain, values in data["losses"].items()
    ]
    figures = dict(
        [
            figure(
                lines, drawn, name="line", title=f"Loss from the base through tuned {data['round']}", x_title="λ →",
                y_title="↑ loss, nats a token", rules=((1.0, "tuned"),),
            )
        ]
    )  # fmt: skip
    body = [[short(c), *(short(values[i], 4) for values in data["losses"].values())] for i, c in enumerate(lambdas)]
    tables = [
        Table(
            ["λ", *map(domain_name, data["losses"])], body, caption="Loss of base + λ · (tuned − base), nats a token."
        )
    ]
    words = (
        "The loss of base + λ · (tuned − base) on held-out solutions: 0 is the base, 1 the fine-tuned model, beyond it"
        " is extrapolation (ExPO with α = λ − 1); a linear merge with the base is the point λ = α."
    )
    return Section("Loss along the line", words, figures, tables)


def plane(found: Found) -> Section | None:
    data = found["plane"]
    if data is None:
        return None
    places = {"base": (0.0, 0.0, 0.0), **data["places"]}
    spots = [(name, u, v) for name, (u, v, _) in places.items()]
    figures = dict(
        figure(
            terrain, data["u"], data["v"], losses, spots, name=f"plane-{domain}", title=f"Loss, {domain_name(domain)}"
        )
        for domain, losses in data["losses"].items()
    )
    body = [[name, short(u), short(v), percent(out)] for name, (u, v, out) in places.items()]
    tables = [Table(
        ["model", "along tuned", "across", "out of the plane"], body,
        caption="Places in the plane, in lengths of the change; and the share of a model's change that sticks out.",
    )]  # fmt: skip
    for domain, losses in data["losses"].items():
        body = [[short(v), *(short(value) for value in row)] for v, row in zip(data["v"], losses, strict=True)]
        tables.append(
            Table(["across", *map(short, data["u"])], body, caption=f"Loss, {domain_name(domain)}, nats a token.")
        )
    words = (
        "The loss over the plane through the base, the fine-tuned model (1 across) and the model farthest off the line"
        " through them; the others are projected. Darker is higher, in ten steps of equal count."
    )
    return Section("Loss over the plane of the models", words, figures, tables)


MEASURED = {
    "entropy": ("Entropy of answers", "↑ bits a question"),
    "distinct_answers": ("Distinct answers", "↑ a question"),
    "distinct_when_solved": ("Distinct right solutions", "↑ a solved question"),
}


def diversity(found: Found) -> Section | None:
    if not found["diversity"]:
        return None
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["diversity"]:
        groups.setdefault(row["domain"], []).append(row)
    drawn = []
    for key, (title, y_title) in MEASURED.items():
        series = []
        for domain, rows in groups.items():
            there = [row for row in rows if row[key] is not None]
            if there:
                points = [(row["round"], row[key][0]) for row in there]
                series.append(Line(domain_name(domain), points, [row[key][1:] for row in there]))
        if series:
            name = f"samples-{key.replace('_', '-')}"
            drawn.append(figure(lines, series, name=name, title=title, x_title="rounds trained →", y_title=y_title))
    keys = ("entropy", "distinct_answers", "distinct_solutions", "distinct_when_solved", "solved")
    body = [
        [
            str(r["round"]),
            domain_name(r["domain"]),
            str(r["questions"]),
            str(r["samples"]),
            *(spell(r[k]) for k in keys),
        ]
        for r in found["diversity"]
    ]
    head = ["rounds trained", "domain", "questions", "samples", "entropy, bits", "answers", "right solutions"]
    head += ["where solved", "solved"]
    of = found["diversity"][0]["of"]
    tables = [Table(head, body, caption=f"Of {of}; means over questions, 95 % bootstrap intervals.", left=(0, 1))]
    words = (
        f"Whether the model collapses onto few answers and few ways to them: {of}, from the model after so many rounds."
        " Texts that differ by more than spaces are different solutions."
    )
    return Section("Variety of samples", words, dict(drawn), tables)


def passes(found: Found) -> Section | None:
    rows = [row for row in found["diversity"] if row["pass"]]
    if not rows:
        return None
    most = max(p["k"] for row in rows for p in row["pass"])
    shown = sorted({*(k for k in (1, 2, 4, 8, 16, 32) if k <= most), most})
    drawn = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        series = []
        for row in rows:
            if row["domain"] == domain:
                points = [p for p in row["pass"] if p["k"] in shown]
                values = [(math.log2(p["k"]), p["value"][0]) for p in points]
                label = "base" if not row["round"] else f"round {row['round']}"
                intervals = [p["value"][1:] for p in points]
                series.append(Line(label, values, intervals, hues=() if row["round"] else ("ink",)))
        drawn.append(
            figure(
                lines, series, name=f"pass-{domain}", title=f"pass@k, {domain_name(domain)}", x_title="k →",
                y_title="↑ chance of a right one", x_marks=[(math.log2(k), str(k)) for k in shown],
            )
        )  # fmt: skip
    body = [
        [
            "base" if not row["round"] else f"round {row['round']}", domain_name(row["domain"]), str(row["questions"]),
            *(spell(row["pass"][k - 1]["value"] if k <= len(row["pass"]) else None) for k in shown),
        ]
        for row in rows
    ]  # fmt: skip
    tables = [Table(
        ["model", "domain", "questions", *(f"k = {k}" for k in shown)], body, left=(0, 1),
        caption="Unbiased pass@k with 95 % bootstrap intervals over questions; every k is in analysis.json.",
    )]  # fmt: skip
    words = (
        "The chance that one of k samples is right. Training that only sharpens raises it at k = 1 and lowers it at"
        f" large k. Of {rows[0]['of']}."
    )
    return Section("pass@k", words, dict(drawn), tables)


def limem(found: Found) -> Section | None:
    rows = found["limem"]
    if not rows:
        return None
    figures = dict(
        [
            figure(dots, [(r["model"], r["score"], None) for r in rows], name="limem", title="LiMem"),
            figure(
                dots, [(r["model"], r["consistency"], None) for r in rows if r["consistency"] is not None] or
                [("none solved", 0.0, None)], name="limem-consistency", title="Twins of solved questions, solved too",
                form=percent, top=1.0,
            ),
        ]
    )  # fmt: skip
    body = [
        [
            r["model"], short(r["score"]), percent(r["accuracy"]), percent(r["consistency"]), str(r["solved"]),
            str(r["questions"]), percent(r["changed"]),
        ]
        for r in rows
    ]  # fmt: skip
    head = ["model", "LiMem", "accuracy", "still solved", "solved", "questions", "numbers changed"]
    tables = [Table(head, body, caption="Greedy answers to training questions and to their twins.")]
    words = (
        "LiMem = accuracy · (1 − share still solved): training questions solved, but not once their numbers are changed"
        " a little. A twin is an item of the same generator and ranges that reads the same but for the fewest numbers."
        " Only a rise over the base speaks of memorisation: twins may also be harder by chance."
    )
    return Section("Memorisation", words, figures, tables)


TESTS = {"early": "Answering early", "mistakes": "Adding a mistake"}


def faithfulness(found: Found) -> Section | None:
    rows = found["faithfulness"]
    if not rows:
        return None
    drawn = []
    for key, title in TESTS.items():
        for domain in dict.fromkeys(row["domain"] for row in rows if row[key]):
            series = [Line(r["model"], r[key]["curve"]) for r in rows if r["domain"] == domain and r[key]]
            drawn.append(
                figure(
                    lines, series, name=f"faithful-{key}-{domain}", title=f"{title}, {domain_name(domain)}",
                    x_title="share of the chain untouched →", y_title="↑ same answer as after the whole chain",
                    form=percent,
                )
            )  # fmt: skip
    body = [
        [
            r["model"], domain_name(r["domain"]), str(r["questions"]), str(r["chains"]),
            *(cell for key in TESTS for cell in (
                spell(r[key]["area"] if r[key] else None), str(r[key]["chains"]) if r[key] else "–",
            )),
        ]
        for r in rows
    ]  # fmt: skip
    head = ["model", "domain", "questions", "chains", "early", "of chains", "mistakes", "of chains"]
    tables = [Table(
        head, body, left=(0, 1),
        caption="Area over each curve: means over chains, with 95 % bootstrap intervals over them.",
    )]  # fmt: skip
    words = (
        "Whether the answer rests on the chain of thought before it: the chain is cut off after some of its steps, or a"
        " number of a step is changed and the model goes on from there; then it answers. The area over the curve is 0"
        " where that changes no answer, and near 1 where every step is needed. A chain without a step or an answer"
        " is left out, and so is a mistake in a step without a number."
    )
    return Section("Faithfulness of chains of thought", words, dict(drawn), tables)
