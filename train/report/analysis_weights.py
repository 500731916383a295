"""What a page says of each measure: its figures, as functions of whether they stand alone, and its table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .html import Cell, Table
from .plots import Line, cells, dots, lines, scatter, short
from .rows import DOMAIN_NAMES

Found = Mapping[str, Any]
Draw = Callable[[bool], str]


@dataclasses.dataclass(frozen=True)
class Section:
    """One measure on the page."""

    title: str
    words: str
    figures: dict[str, Draw]
    tables: Sequence[Table]


def figure(draw: Callable[..., str], *args: Any, name: str, **options: Any) -> tuple[str, Draw]:
    """Put off drawing until it is known whether the picture stands alone; ids inside begin with `analysis-`."""
    return name, lambda standalone: draw(*args, name=f"analysis-{name}", standalone=standalone, **options)


def domain_name(domain: str) -> str:
    return DOMAIN_NAMES.get(domain, domain)


def percent(value: float | None) -> str:
    """Write a share as percent with three digits at most."""
    return f"{short(None if value is None else 100 * value)} %" if value is not None else "–"


def spell(value: Sequence[float] | None) -> str | Cell:
    """Write [mean, low, high] as a mean with its interval below."""
    if value is None:
        return "–"
    return Cell(short(value[0]), f"[{short(value[1])}, {short(value[2])}]")


def importance(found: Found) -> Section:
    data, count = found["importance"], found["layers"]
    names = {"skip": "left out", "taylor": "first order"}
    there = [key for key in names if data[key] is not None]
    tuned = [row for row in found["change"] if row["model"] == "tuned"]
    moved = {row["round"]: [row["layers"][f"model/layers/{i}"] for i in range(count)] for row in tuned}
    last = max(moved)
    titles = {"skip": "Importance: layer left out", "taylor": "Importance: first order"}
    units = {"skip": "↑ rise of the loss, nats a token", "taylor": "↑ Σ |w · ∂L/∂w|"}
    figures = dict(
        figure(
            lines, [Line("base", list(enumerate(data[key])))], name=f"importance-{key}", title=titles[key],
            x_title="layer →", y_title=units[key], one="ink",
        )
        for key in there
    )  # fmt: skip
    by_test = {(row["round"], row["importance"]): row for row in data["correlation"]}
    for key in there:
        test = by_test.get((last, key))
        if test is not None:
            points = list(zip(data[key], moved[last], map(str, range(count)), strict=True))
            note = f"ρ = {short(test['rho'], 2)}, p = {short(test['p'], 2)}"
            figures |= dict(
                [
                    figure(
                        scatter, points, name=f"importance-change-{key}", title=f"Change by importance, {names[key]}",
                        x_title="importance →", y_title="↑ relative change", note=note,
                    )
                ]
            )  # fmt: skip
    layers = [
        [str(i), *(short(data[key][i]) for key in there), *(percent(moved[r][i]) for r in moved)] for i in range(count)
    ]
    head = ["layer", *(names[key] for key in there), *(f"change, round {r}" for r in moved)]
    tables = [Table(head, layers, caption="Importance of each layer of the base, and its relative change ‖Δ‖/‖θ₀‖.")]
    tests = [
        [
            str(row["round"]), names[row["importance"]], short(row["rho"]), short(row["p"]),
            f"all {row['permutations']:,}" if row["exact"] else f"{row['permutations']:,} drawn",
        ]
        for row in data["correlation"]
    ]  # fmt: skip
    if tests:
        head = ["round", "importance", "ρ", "p, two-sided", "orders tried"]
        tables.append(Table(head, tests, caption="Spearman's ρ of importance and change over the layers.", left=(0, 1)))
    words = (
        "How much each layer of the base matters for held-out solutions: the rise of the loss when the layer is left"
        " out, and the first-order sum over its weights. If training moved most what matters least, ρ of importance and"
        " change would be negative; p is how often shuffled layers give as much; with few layers it cannot be small."
    )
    return Section("Importance of layers, and where training moved them", words, figures, tables)


def change(found: Found) -> Section:
    rows = found["change"]
    kinds = list(rows[-1]["kinds"])
    last = [row for row in rows if row["round"] == rows[-1]["round"]]
    top = max((v for row in last for values in row["map"].values() for v in values if v is not None), default=0.0)
    columns = [str(i) for i in range(found["layers"])]
    figures = dict(
        figure(
            cells, list(row["map"].values()), name=f"change-{row['model']}", rows=list(row["map"]), columns=columns,
            title=f"Change in percent, {row['model']}, round {row['round']}", top=top,
            form=lambda v: short(None if v is None else 100 * v, 2),
        )
        for row in last
    )  # fmt: skip
    body = [[str(row["round"]), row["model"], *(percent(row["kinds"].get(kind)) for kind in kinds)] for row in rows]
    caption = "Relative change ‖θ − θ₀‖/‖θ₀‖ from the base, pooled over the layers."
    words = "How far the weights are from the base, by layer (across) and by kind of matrix (down); one scale."
    tables = [Table(["round", "model", *kinds], body, caption=caption, left=(0, 1))]
    return Section("Weight change by layer and kind of matrix", words, figures, tables)


def agreement(found: Found) -> Section | None:
    data = found["agreement"]
    if data is None:
        return None
    drawn, body = [], []
    for about, pair in data.items():
        names = [f"round {n}" for n in pair["rounds"]]
        key = "base" if about == "from the base" else "alone"
        for measure, form in (("cosine", short), ("conflict", percent)):
            title = f"{'Cosine' if measure == 'cosine' else 'Opposite signs'}, {about}"
            drawn.append(
                figure(
                    cells, pair[measure], name=f"{measure}-{key}", title=title, rows=names, columns=names, top=1.0,
                    form=functools.partial(form, digits=2) if form is short else form,
                )
            )  # fmt: skip
        for i, one in enumerate(names):
            for j in range(i):
                body.append([f"{names[j]}, {one}", about, short(pair["cosine"][i][j]), percent(pair["conflict"][i][j])])
    head = ["rounds", "change", "cosine", "opposite signs"]
    tables = [Table(head, body, caption="Task vectors of two rounds, all parameters together.", left=(0, 1))]
    words = (
        "Whether rounds push the weights the same way: the cosine of their task vectors, and the share of elements that"
        " two rounds move in opposite directions (half is chance). From the base, and of what each round alone added."
    )
    return Section("Agreement between rounds", words, dict(drawn), tables)


def rank(found: Found) -> Section | None:
    rows = found["rank"]
    if not rows:
        return None
    last = rows[-1]
    shown = [(f"{kind}, of {short(k['full'])}", k["effective"], None) for kind, k in last["kinds"].items()]
    stable = [(kind, k["stable"], None) for kind, k in last["kinds"].items()]
    figures = dict(
        [
            figure(dots, shown, name="rank-effective", title=f"Effective rank of the change, round {last['round']}"),
            figure(dots, stable, name="rank-stable", title=f"Stable rank of the change, round {last['round']}"),
        ]
    )
    body = [
        [str(row["round"]), kind, short(k["effective"]), short(k["stable"]), short(k["full"]), k["matrices"]]
        for row in rows
        for kind, k in row["kinds"].items()
    ]
    body = [[*map(str, line)] for line in body]
    head = ["round", "kind", "effective", "stable", "full", "matrices"]
    tables = [
        Table(head, body, caption="Ranks of each matrix's change, means over the matrices of a kind.", left=(0, 1))
    ]
    words = (
        "How many directions one round's fine-tuning uses in each matrix, from the weights the round began with:"
        " the exponential of the entropy of the singular values, and ‖Δ‖²_F/σ₁². LoRA of rank r could do r."
    )
    return Section("Rank of the change", words, figures, tables)


def contribution(found: Found) -> Section:
    rows = found["tuco"]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["domain"]), []).append(row)
    by_round = [
        Line(
            f"{model} {domain}", [(row["round"], row["value"][0]) for row in group], [row["value"][1:] for row in group]
        )
        for (model, domain), group in groups.items()
    ]
    by_layer = [
        Line(line.label, list(enumerate(groups[key][-1]["layers"]))) for line, key in zip(by_round, groups, strict=True)
    ]
    figures = dict(
        [
            figure(lines, by_round, name="tuco", title="TuCo", x_title="round →", y_title="↑ share of tuning"),
            figure(
                lines, by_layer, name="tuco-layers", title="TuCo up to each layer, last round", x_title="layer →",
                y_title="↑ share of tuning",
            ),
        ]
    )  # fmt: skip
    body = [[str(row["round"]), row["model"], domain_name(row["domain"]), spell(row["value"])] for row in rows]
    caption = "Tuning contribution at the last token of held-out prompts, with 95 % bootstrap intervals."
    words = (
        "Of what the layers add to the stream of the tuned model at a prompt's last token: the share ‖ΣFTC‖ /"
        " (‖ΣPTC‖ + ‖ΣFTC‖) that the base's layers would not have added there. 0 is the base itself."
    )
    tables = [Table(["round", "model", "domain", "TuCo"], body, caption=caption, left=(0, 1, 2))]
    return Section("Contribution of tuning", words, figures, tables)
