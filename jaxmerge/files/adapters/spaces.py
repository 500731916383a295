r"""SPACES: where the factors of adapters are merged by a rule.

An adapter changes a matrix by $\Delta_i = B_i A_i$, its scale in both factors. A space writes the changes of all
adapters as leaves of one shape, hands them to the rule, and turns what the rule returns into the change of the result:

  core      $\Delta_i = U M_i V^\top$, U and V the left singular vectors of $[B_1 … B_N]$ and of
            $[A_1^\top … A_N^\top]$; leaves $M_i = U^\top \Delta_i V$, result $U M V^\top$
  knots     $[\Delta_1 … \Delta_N] = U S\,[V_1^\top … V_N^\top]$; leaves $S V_i^\top$, result $U L$
  products  leaves $\Delta_i$ themselves, one matrix of the model at a time
  factors   leaves $A_i$ and $B_i$, merged apart; weights and scale go into both by their roots

A rule that is linear in the changes gives the same in the first three, and without the matrix in the first two: what
PEFT calls cat, and, cut to a rank, svd. Core and knots lose nothing, because U and V span all that the adapters change.
Decompositions are in float64; rules see float32. Signs of singular vectors are any, and do not matter: a rule that
treats both signs alike gives the same change.

KnOTS' paper merges the V_i; every configuration of its release merges S V_i, and so does this. The two differ only
where a rule compares rows, as a trim does. Core Space's release keeps directions that no adapter uses; here they are
left out, so that a density counts the others alone.

References:
  Stoica et al., "Model merging with SVD to tie the Knots", https://arxiv.org/abs/2410.19735
  Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", https://arxiv.org/abs/2509.17786
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.files.factors import Cut, factor
from jaxmerge.rules import RULES

NOISE = 1e-6  # singular values up to this share of the largest are of rounding
ROOTED = ("weights", "scale")  # coefficients that the change is proportional to


@dataclasses.dataclass(frozen=True)
class Pair:
    """What an adapter changes of a matrix: B [out, r] and A [r, in], its scale in both; float64."""

    b: np.ndarray
    a: np.ndarray

    @classmethod
    def of(cls, b: np.ndarray, a: np.ndarray, scale: float) -> Pair:
        """Put the scale of a product into its factors."""
        root = math.sqrt(abs(scale))
        return cls(b.astype(np.float64) * root, a.astype(np.float64) * math.copysign(root, scale))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule with its coefficients for one matrix: leaves of all adapters in, one leaf out.

    key: of random masks, with the leaf's path and the adapters' names.
    """

    name: str
    path: str
    coefficients: Mapping[str, Any]
    names: Sequence[str]
    seed: int

    def merge(self, leaves: Sequence[np.ndarray], path: str = "", coefficients: Mapping[str, Any] | None = None) -> Any:
        """Merge leaves [a, b] in float32; where a rule takes changes from a base, the base is zero."""
        rule, path = RULES[self.name], path or self.path
        given = dict(self.coefficients if coefficients is None else coefficients)
        if rule.needs.base == "required":
            given["base"] = {path: np.zeros(leaves[0].shape, np.float32)}
        if rule.needs.key != "none":
            given |= {"key": jax.random.key(self.seed, impl="threefry2x32"), "names": list(self.names)}
        try:
            merged = np.asarray(rule([{path: leaf.astype(np.float32)} for leaf in leaves], **given)[path])
        except ValueError as error:
            raise ValueError(f"module {self.path!r}: {error}") from error
        if not np.isfinite(merged).all():
            raise ValueError(
                f"module {self.path!r}: {self.name} makes NaN or infinities of it; look at its coefficients"
            )
        return merged


@dataclasses.dataclass(frozen=True)
class Made:
    """The change of the result, B·A, and the share of the merged change's squared norm that it holds."""

    b: np.ndarray
    a: np.ndarray
    explained: float


def _basis(columns: np.ndarray) -> np.ndarray:
    """The left singular vectors of a tall matrix, but for those of rounding noise; one at least."""
    q, r = np.linalg.qr(columns)
    u, s, _ = np.linalg.svd(r)
    return q @ u[:, : max(1, _count(s))]


def _count(values: np.ndarray) -> int:
    return int(np.sum(values > NOISE * max(values[0], np.finfo(np.float64).tiny))) if values.size else 0


def _cut(left: np.ndarray, middle: np.ndarray, right: np.ndarray | None, cut: Cut) -> Made:
    """Factor left·middle·right, left with orthonormal columns, right with orthonormal rows (None: the identity)."""
    u, s, v = np.linalg.svd(middle.astype(np.float64), full_matrices=False)
    square = float(np.sum(np.square(s)))
    count = cut.count(s, square)
    root = np.sqrt(s[:count])
    b, a = (left @ u[:, :count]) * root, root[:, None] * (v[:count] if right is None else v[:count] @ right)
    return Made(b, a, float(np.sum(np.square(s[:count]))) / square if square else 1.0)


def _core(pairs: Sequence[Pair], rule: Rule, cut: Cut) -> Made:
    left = _basis(np.concatenate([pair.b for pair in pairs], axis=1))
    right = _basis(np.concatenate([pair.a for pair in pairs]).T)
    merged = rule.merge([(left.T @ pair.b) @ (pair.a @ right) for pair in pairs])
    return _cut(left, merged, right.T, cut)


def _knots(pairs: Sequence[Pair], rule: Rule, cut: Cut) -> Made:
    q, r = np.linalg.qr(np.concatenate([pair.b for pair in pairs], axis=1))
    ends = np.cumsum([pair.b.shape[1] for pair in pairs])[:-1]
    rows, small = zip(*(np.linalg.qr(pair.a.T) for pair in pairs), strict=True)
    # [Δ_1 … Δ_N] is q·[C_1 … C_N], but for orthonormal columns on the right of each.
    cores = [block @ part.T for block, part in zip(np.split(r, ends, axis=1), small, strict=True)]
    u, s, _ = np.linalg.svd(np.concatenate(cores, axis=1), full_matrices=False)
    u = u[:, : max(1, _count(s))]
    merged = rule.merge([(u.T @ core) @ row.T for core, row in zip(cores, rows, strict=True)])
    return _cut(q @ u, merged, None, cut)


def _products(pairs: Sequence[Pair], rule: Rule, cut: Cut) -> Made:
    merged = rule.merge([pair.b.astype(np.float32) @ pair.a.astype(np.float32) for pair in pairs])
    a, b, facts = factor(merged, cut.rank, cut=cut)
    return Made(b, a, facts["explained"])


def _factors(pairs: Sequence[Pair], rule: Rule, cut: Cut) -> Made:
    del cut  # the rank is that of the adapters
    sides = {}
    for side, rooted in (("a", _signed_root), ("b", _root)):
        given = {name: rooted(value) if name in ROOTED else value for name, value in rule.coefficients.items()}
        sides[side] = rule.merge([getattr(pair, side) for pair in pairs], f"{rule.path}/lora_{side.upper()}", given)
    return Made(sides["b"], sides["a"], 1.0)


def _root(value: Any) -> Any:
    return [math.sqrt(abs(one)) for one in value] if isinstance(value, list) else math.sqrt(abs(value))


def _signed_root(value: Any) -> Any:
    if isinstance(value, list):
        return [_signed_root(one) for one in value]
    return math.copysign(math.sqrt(abs(value)), value)


@dataclasses.dataclass(frozen=True)
class Space:
    """How the changes of a matrix are merged.

    elements: of a leaf, for the shape [out, in] of the matrix and the sum of the adapters' ranks. spans: the result
    changes only what the adapters change, so that its rank is at most their sum. one_rank: leaves are alike only if the
    adapters have one rank, which the result has too.
    """

    merge: Callable[[Sequence[Pair], Rule, Cut], Made]
    elements: Callable[[tuple[int, int], int], int]
    spans: bool = True
    one_rank: bool = False


SPACES: dict[str, Space] = {
    "core": Space(_core, lambda shape, rank: rank * rank),
    "knots": Space(_knots, lambda shape, rank: rank * shape[1]),
    "products": Space(_products, lambda shape, rank: shape[0] * shape[1], spans=False),
    "factors": Space(_factors, lambda shape, rank: rank * max(shape), one_rank=True),
}
