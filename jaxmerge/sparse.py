r"""The formula of the delta family, and rules made of parts: sparsify → rescale → consensus → add.

$\theta_b + \lambda\,\mathrm{consensus}_i(w_i, \mathrm{rescale}(\mathrm{sparsify}(\theta_i - \theta_b)))$.
The named rules of it are in `jaxmerge.delta`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxmerge.consensus import Deltas, weighted_sum
from jaxmerge.contract import EMPTY, INPUTS, Rule, requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.sparsify import REQUIRED, Sparsifier, check_rescale, expected, keep_all, l1_factors
from jaxmerge.tree import Array, PyTree
from jaxmerge.where import Coefficient, PerModel

Consensus = Callable[..., Array]
Rescale = Literal["inverse", "l1"] | None
PARTS = ("sparsify", "consensus")


def _delta(x: Operands, *, weights, scale, sparsify, rescale, consensus, normalize, **coefficients) -> Array:
    # Weights that are computed are computed once: passes that repeat the computation could round it otherwise.
    x = x.after()
    keep = keep_all if sparsify is None else sparsify(x, **coefficients)
    factors = None
    if rescale == "l1":
        factors = l1_factors([kept for kept, _ in keep(x)], x.deltas)
        x = x.after(*factors)

    def scaled(x: Operands) -> tuple[Array, ...]:
        if factors is not None:
            return tuple(kept * factor for (kept, _), factor in zip(keep(x), factors, strict=True))
        return tuple(expected(kept, p) if rescale == "inverse" else kept for kept, p in keep(x))

    assert x.base is not None
    return x.base + scale * consensus(Deltas(scaled, x), weights, normalize=normalize)


def merge_deltas(
    models: Sequence[PyTree],
    sparsify: Sparsifier | None,
    consensus: Consensus,
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
    rescale: Rescale = None,
) -> PyTree:
    """Compute the formula of this module with these parts; the sparsifier brings the values of its coefficients."""
    check_rescale(rescale, sparsify)
    values = {} if sparsify is None else sparsify.coefficients
    shared = () if sparsify is None else sparsify.shared
    return leafwise(
        _delta,
        models,
        base=base,
        key=key,
        names=names,
        stacked=stacked,
        shared={"scale": scale} | {c: v for c, v in values.items() if c in shared},
        each={"weights": weights} | {c: v for c, v in values.items() if c not in shared},
        convert={} if sparsify is None else sparsify.convert,
        aside=None if sparsify is None else sparsify.aside,
        options={
            "sparsify": None if sparsify is None else sparsify.leaf,
            "rescale": rescale,
            "consensus": consensus,
            "normalize": bool(normalize),
        },
    )


def delta_rule(
    sparsify: Sparsifier | None = None,
    rescale: Rescale = None,
    consensus: Consensus = weighted_sum,
    *,
    normalize: bool = False,
    name: str = "delta_rule",
    doc: str | None = None,
) -> Rule:
    r"""Make a rule $\theta_b + \lambda\,\mathrm{consensus}_i(w_i, \mathrm{rescale}(\mathrm{sparsify}(\tau_i)))$.

    Args:
      sparsify: `trim`, `two_sided_trim`, `drop`, `rank_drop`, `variance_select`, or None to keep all.
      rescale: "inverse", "l1" or None; the default of the rule's `rescale=`.
      consensus: `weighted_sum`, `elect_sign`, …: see `jaxmerge.consensus`.
      normalize: the default of the rule's `normalize=`.
      name, doc: the rule's name in errors, and its docstring.

    Returns:
      A rule `(models, *, base, key=None, names=None, stacked=(), donate=False, <the sparsifier's coefficients>,
      weights=1.0, scale=1.0, normalize=…, rescale=…)`. `help` of it shows them all.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmerge import elect_sign, trim
      >>> rule = delta_rule(sparsify=trim(0.5), rescale="l1", consensus=elect_sign)
      >>> rule([{"w": jnp.array([3.0, 1.0])}], base={"w": jnp.zeros(2)})
      {'w': Array([4., 0.], dtype=float32)}
    """
    check_rescale(rescale, sparsify)
    values = {} if sparsify is None else dict(sparsify.coefficients)

    def run(models, *, base=None, key=None, names=None, stacked=(), **given):
        mine = {c: given.pop(c, value) for c, value in values.items()}
        parts = None if sparsify is None else dataclasses.replace(sparsify, coefficients=mine)
        given = {"normalize": normalize, "rescale": rescale} | given
        return merge_deltas(models, parts, consensus, base=base, key=key, names=names, stacked=stacked, **given)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = doc or f"A rule made by `delta_rule`; coefficients {', '.join([*values, 'weights', 'scale'])}."
    run.__signature__ = _signature(sparsify, normalize=normalize, rescale=rescale)  # type: ignore[attr-defined]
    needed = "required" if sparsify and sparsify.random else "none"
    return requires(base="required", key=needed, symmetric=True)(run)


def _signature(sparsify: Sparsifier | None, **defaults: Any) -> inspect.Signature:
    """The signature of a composed rule: that of `merge_deltas`, its parts replaced by the sparsifier's coefficients."""
    known = dict(inspect.signature(merge_deltas).parameters)
    inputs = [known.pop(name) for name in INPUTS]
    shared, values = (sparsify.shared, sparsify.coefficients) if sparsify else ((), {})
    own = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=EMPTY if value is REQUIRED else value,
            annotation="Coefficient" if name in shared else "PerModel",
        )
        for name, value in values.items()
    ]  # fmt: skip
    rest = [p.replace(default=defaults.get(name, p.default)) for name, p in known.items() if name not in PARTS]
    return inspect.Signature([*inputs, *own, *rest], return_annotation="PyTree")
