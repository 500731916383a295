"""A model made from a round's checkpoints beside the rounds, as configured (`probe` of a method)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jaxmerge

from ..log import UserError
from ..resolve import at_least
from .graft import Graft

PROBE_READS = {
    "expo": ("alphas",),
    "exme": ("best", "search", "alphas", "weights"),
    "line": ("coefficients",),
    "best": (),
    "merge": ("rule", "parameters"),
    "graft": ("graft",),
}
"""Fields that each kind of probe reads besides of, kind and rounds."""


def check_probe(probe: Probe) -> None:
    """Refuse fields that differ from their defaults and that a probe of this kind does not read."""
    reads = PROBE_READS[probe.kind]
    if probe.kind == "exme" and probe.search is not None:
        reads = tuple(name for name in reads if name not in ("alphas", "weights"))
    for field in dataclasses.fields(probe):
        if field.name in ("of", "kind", "rounds", *reads):
            continue
        value, made = getattr(probe, field.name), field.default_factory
        if value != (field.default if made is dataclasses.MISSING else made()):
            searched = " with a search" if probe.kind == "exme" and probe.search is not None else ""
            raise UserError(
                f"probe.{field.name} is {value!r}, and a probe of kind {probe.kind}{searched} does not read it; "
                f"it reads {', '.join(reads) or 'none of these'}: leave it out, or choose another kind"
            )


@dataclasses.dataclass(frozen=True)
class Probe:
    """A model made from a round's checkpoints without training, evaluated and not fed back."""

    of: str
    """The probe is made from the checkpoints of this method."""
    kind: Literal["expo", "exme", "line", "best", "merge", "graft"] = "expo"
    """The probe is made in this way. expo: θ_t + α(θ_t − θ_b). exme: the best snapshots on validation are each
    extrapolated, then merged. line: base + λ·change for each λ in `coefficients`. best: the best snapshot is taken.
    merge: all snapshots are merged by `rule`. graft: base + mask·change, the mask learned."""
    alphas: tuple[float, ...] = (0.3,)
    """The models are extrapolated this far: one α for expo, one for each snapshot for exme."""
    weights: tuple[float, ...] = (0.5, 0.5)
    """exme: the extrapolated snapshots are merged with these weights, one for each."""
    search: Literal["staged", "grid", "coordinate", "golden", "cma_es"] | None = None
    """exme: this strategy chooses alphas and weights on validation questions; null takes those given."""
    best: int = 2
    """exme: this many snapshots are taken, the best on validation first."""
    rule: str = ""
    """merge: the snapshots are merged by this rule, any of `jaxmerge.RULES` that needs no data: average, ties
    or model_stock."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """merge: the rule takes these coefficients."""
    coefficients: tuple[float, ...] = ()
    """line: a model is made for each of these λ."""
    graft: Graft = dataclasses.field(default_factory=Graft)
    rounds: tuple[int, ...] = ()
    """These rounds are probed; () is the last one."""

    def __post_init__(self):
        if self.kind == "expo" and len(self.alphas) != 1:
            raise UserError(f"an expo probe needs one alpha, found {list(self.alphas)}; add a method for each")
        if self.kind == "line" and not self.coefficients:
            raise UserError("a probe of kind line needs coefficients: [λ, …]")
        at_least(self, "probe", best=1)
        fixed = self.kind == "exme" and self.search is None
        if fixed and (len(self.alphas) != self.best or len(self.weights) != self.best):
            raise UserError(
                f"an exme probe of {self.best} snapshots needs as many alphas and weights, found {self.alphas}, "
                f"{self.weights}; or a search"
            )
        if (self.kind == "merge") != bool(self.rule) or (self.rule and self.rule not in jaxmerge.RULES):
            raise UserError(f"probe.rule is {self.rule!r}; kind: merge takes one of {', '.join(jaxmerge.RULES)}")
        check_probe(self)
