"""What a run came to, in sentences: which differences from the base are beyond chance, and which may be chance.

Beyond chance is what the run itself measured: a 95 % interval of the paired difference on the same questions that
leaves out 0. Nothing is estimated here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..runtime.jsonl import Row
from .rows import DOMAIN_NAMES

BASE = "base"
ASKED = ("id", "ood")
"""The domains that the sentences speak of: what was to be learnt, and what was not to be forgotten."""

Words = tuple[str, str | None]
"""A piece of a sentence, and the method that it names."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A few sentences, and what they rest on."""

    sentences: Sequence[Sequence[Words]]
    meaning: str = ""
    """What is called beyond chance; empty where nothing is compared."""

    @property
    def brackets(self) -> bool:
        """Whether there are intervals in the sentences."""
        return any("[" in words for sentence in self.sentences for words, method in sentence if method is None)


def format_points(value: float, digits: int = 1) -> str:
    """Write a difference of shares in percentage points, with its sign.

    Example:
      >>> format_points(0.078), format_points(-0.105), format_points(-0.0001)
      ('+7.8', '−10.5', '0.0')
    """
    rounded = round(100 * value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def format_interval_of(pair: Row) -> str:
    return f"[{format_points(pair['low'])},\u00a0{format_points(pair['high'])}]"


def is_beyond_chance(pair: Row) -> bool:
    """Whether the 95 % interval of a paired difference leaves out 0."""
    return pair["low"] > 0 or pair["high"] < 0


def last_pairs(pairs: Sequence[Row]) -> list[Row]:
    """Keep of each pair of models the last round's differences: a row a domain and split."""
    last: dict[tuple[str, str], int] = {}
    for p in pairs:
        key = (p["a"], p["b"])
        last[key] = max(last.get(key, 0), p.get("round") or 0)
    return [p for p in pairs if (p.get("round") or 0) == last[p["a"], p["b"]]]


def compared_at(pairs: Sequence[Row]) -> dict[tuple[str, int | None, str, str], Row]:
    """Return (method, round, domain, split) → its difference from the base."""
    return {(p["a"], p.get("round"), p["domain"], p.get("split", "test")): p for p in pairs if p["b"] == BASE}


def compared(pairs: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Return (a, b) → domain → the last round's difference, on test questions where there are any."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for p in last_pairs(pairs):
        cell = found.setdefault((p["a"], p["b"]), {})
        if p["domain"] in ASKED and (p["domain"] not in cell or p.get("split", "test") == "test"):
            cell[p["domain"]] = p
    return {pair: {domain: cell[domain] for domain in ASKED if domain in cell} for pair, cell in found.items() if cell}


def verdict(pairs: Sequence[Row], rows: Sequence[Row], *, finished: bool = True) -> Verdict:
    """Say what happened to each method's accuracy after its last round, and what of it is beyond chance.

    Args:
      pairs: the paired differences of the summary, {a, b, round, domain, split, difference, low, high, n}.
      rows: the accuracies, for a run in which nothing is compared.
      finished: whether more is to come.
    """
    found = compared(pairs)
    against_base = {a: cells for (a, b), cells in found.items() if b == BASE}
    if not against_base:
        return Verdict([[(_nothing_compared(rows), None)]])
    sure = {m: cells for m, cells in against_base.items() if any(map(is_beyond_chance, cells.values()))}
    unsure = {m: cells for m, cells in against_base.items() if m not in sure}
    # The round is said where it is not the same for all.
    rounds = {method: next(iter(cells.values())).get("round") for method, cells in against_base.items()}
    after = {m: f" after round {n}" if len(set(rounds.values())) > 1 else "" for m, n in rounds.items()}
    sentences = [sentence(method, cells, after[method]) for method, cells in sure.items()]
    if not sure:
        sentences.append([(_nothing_sure(against_base), None)])
    elif unsure:
        sentences.append([*named(unsure), (" changed nothing beyond chance.", None)])
    others = {(a, b): cells for (a, b), cells in found.items() if b != BASE}
    sentences += [
        above(a, b, domain, p) for (a, b), cells in others.items() for domain, p in cells.items() if is_beyond_chance(p)
    ]
    if not finished:
        sentences.insert(0, [("The run is not finished; so far:", None)])
    return Verdict(sentences, _meaning(found))


def sentence(method: str, cells: Mapping[str, Row], after: str = "") -> list[Words]:
    r"""Say what one method gained and lost against the base, and what may be chance.

    Example:
      >>> gain = {"difference": 0.078, "low": 0.032, "high": 0.122}
      >>> loss = {"difference": -0.105, "low": -0.15, "high": -0.06}
      >>> "".join(words for words, _ in sentence("imm", {"id": gain, "ood": loss})).replace("\u00a0", " ")
      'imm gained 7.8 points in domain [3.2, 12.2] and lost 10.5 points out of domain [6.0, 15.0].'
    """
    sure = [_changed(domain, p) for domain, p in cells.items() if is_beyond_chance(p)]
    unsure = [
        f"; {DOMAIN_NAMES[domain]} its change of {format_points(p['difference'])} {format_interval_of(p)} may be chance"
        for domain, p in cells.items()
        if not is_beyond_chance(p)
    ]
    return [(method, method), (f"{after} {' and '.join(sure)}{''.join(unsure)}.", None)]


def _changed(domain: str, p: Row) -> str:
    """`gained 7.8 points in domain [3.2, 12.2]`: the size without a sign, which the verb has."""
    up = p["low"] > 0
    low, high = sorted((abs(p["low"]), abs(p["high"])))
    size = f"{100 * abs(p['difference']):.1f} points {DOMAIN_NAMES[domain]} [{100 * low:.1f},\u00a0{100 * high:.1f}]"
    return f"{'gained' if up else 'lost'} {size}"


def above(a: str, b: str, domain: str, p: Row) -> list[Words]:
    """Say that one method ended above or below another."""
    low, high = sorted((abs(p["low"]), abs(p["high"])))
    where = "above" if p["low"] > 0 else "below"
    size = f"{100 * abs(p['difference']):.1f} points {where} "
    return [
        (a, a),
        (f" ended {size}", None),
        (b, b),
        (f" {DOMAIN_NAMES[domain]} [{100 * low:.1f},\u00a0{100 * high:.1f}].", None),
    ]


def named(methods: Mapping[str, object]) -> list[Words]:
    """List methods, each named as such: `a, b and c`."""
    names = list(methods)
    listed: list[Words] = []
    for i, name in enumerate(names):
        listed += [(" and " if i == len(names) - 1 else ", ", None)] if i else []
        listed.append((name, name))
    return listed


def _nothing_sure(found: Mapping[str, Mapping[str, Row]]) -> str:
    counts = {domain: p.get("n") for cells in found.values() for domain, p in cells.items()}
    asked = [f"{DOMAIN_NAMES[d]} ({n:,} questions)" if n is not None else DOMAIN_NAMES[d] for d, n in counts.items()]
    if len(found) == 1:
        (method,) = found
        return f"{method} does not differ from the base beyond chance {' or '.join(asked)}."
    return f"No method differs from the base beyond chance {' or '.join(asked)}."


def _nothing_compared(rows: Sequence[Row]) -> str:
    known = {row["method"] for row in rows}
    if not known:
        return "Nothing has been evaluated yet."
    if known == {BASE}:
        return "Only the base has been evaluated so far; there is nothing to compare it with."
    if BASE not in known:
        return "The base was not evaluated, so nothing is said here of what was gained or lost."
    return "This folder holds no paired differences, so nothing is said here of what is beyond chance."


def _meaning(found: Mapping[tuple[str, str], Mapping[str, Row]]) -> str:
    count = sum(len(cells) for cells in found.values())
    text = (
        "A difference is called beyond chance where the 95 % interval of the paired difference on the same questions"
        " leaves out 0. That speaks of other questions of this kind, not of other seeds of training."
    )
    if count > 1:
        text += (
            f" Each interval stands by itself: of {count} such comparisons between equal models, {count / 20:.2g} on"
            " average would be called so."
        )
    return text
