r"""Rules of task vectors: sparsify → rescale → consensus → add.

TIES, DARE, DELLA, breadcrumbs and SCE are all
:math:`\theta_b + \lambda\,\mathrm{consensus}_i(w_i, \mathrm{rescale}(\mathrm{sparsify}(\theta_i - \theta_b)))`.
`delta_rule` makes such a rule of three parts; the named ones below are made by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxmerge import consensus as agree
from jaxmerge.leafwise import Needs, Operands, Rule, check_inputs, leafwise
from jaxmerge.sparsify import (
    REQUIRED,
    Sparsifier,
    check_rescale,
    drop,
    expected,
    keep_all,
    l1_factor,
    rank_drop,
    trim,
    two_sided_trim,
    variance_select,
)
from jaxmerge.tree import Array, PyTree

Consensus = Callable[..., Array]


def _delta(x: Operands, *, weights, scale, sparsify, rescale, consensus, normalize, **coefficients) -> Array:
    # Weights that are computed are computed once: passes that repeat the computation could round it otherwise.
    x = x.after()
    keep = keep_all if sparsify is None else sparsify(x, **coefficients)
    factors = None
    if rescale == "l1":
        factors = [l1_factor(kept, delta) for (kept, _), delta in zip(keep(x), x.deltas, strict=True)]
        x = x.after(*factors)

    def scaled(x: Operands) -> tuple[Array, ...]:
        if factors is not None:
            return tuple(kept * factor for (kept, _), factor in zip(keep(x), factors, strict=True))
        return tuple(expected(kept, p) if rescale == "inverse" else kept for kept, p in keep(x))

    assert x.base is not None
    return x.base + scale * consensus(agree.Deltas(scaled, x), weights, normalize=normalize)


def delta_rule(
    sparsify: Sparsifier | None = None,
    rescale: str | None = None,
    consensus: Consensus = agree.weighted_sum,
    *,
    normalize: bool = False,
    name: str = "delta_rule",
    doc: str | None = None,
    compat_consensus: Consensus | None = None,
) -> Rule:
    r"""Make a rule :math:`\theta_b + \lambda\,\mathrm{consensus}_i(w_i, \mathrm{rescale}(\mathrm{sparsify}(\tau_i)))`.

    Args:
      sparsify: `trim`, `two_sided_trim`, `drop`, `rank_drop`, `variance_select`, or None to keep all.
      rescale: "inverse", "l1" or None; the default of the rule's `rescale=`.
      consensus: `weighted_sum`, `elect_sign`, …: see `jaxmerge.consensus`.
      normalize: the default of the rule's `normalize=`.
      name, doc: the rule's name in errors, and its docstring.
      compat_consensus: the consensus under `compat="mergekit"`, where it is another.

    Returns:
      A rule `(models, *, base, key=None, names=None, stacked=(), weights=1.0, scale=1.0, normalize=…,
      rescale=…, compat=None, **sparsifier's coefficients)`.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = delta_rule(sparsify=trim(0.5), rescale="l1", consensus=agree.elect_sign)
      >>> rule([{"w": jnp.array([3.0, 1.0])}], base={"w": jnp.zeros(2)})
      {'w': Array([4., 0.], dtype=float32)}
    """
    check_rescale(rescale, sparsify)
    needs = Needs(base="required", key="required" if sparsify and sparsify.random else "none", symmetric=True)
    defaults = {} if sparsify is None else dict(sparsify.coefficients)
    default_rescale, default_normalize = rescale, normalize

    def run(
        models: Sequence[PyTree],
        *,
        base: PyTree | None = None,
        key: Array | None = None,
        names: Sequence[str] | None = None,
        stacked: Sequence[str] = (),
        weights: Any = 1.0,
        scale: Any = 1.0,
        normalize: bool = default_normalize,
        rescale: str | None = default_rescale,
        compat: str | None = None,
        **coefficients: Any,
    ) -> PyTree:
        check_inputs(name, needs, models, base, key, names)
        check_rescale(rescale, sparsify)
        check_compat(compat)
        values = _with_defaults(name, defaults, coefficients)
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
            options={
                "sparsify": None if sparsify is None else sparsify.leaf,
                "rescale": rescale,
                "consensus": compat_consensus if compat and compat_consensus else consensus,
                "normalize": bool(normalize),
            },
        )

    run.__name__ = run.__qualname__ = name
    run.__doc__ = doc or f"A rule made by `delta_rule`; coefficients weights, scale, {', '.join(defaults)}."
    run.needs = needs  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def check_compat(compat: Any) -> None:
    """Raise unless `compat` is None or "mergekit"."""
    if compat not in (None, "mergekit"):
        raise ValueError(f"compat={compat!r}, wanted None or 'mergekit'")


def _with_defaults(name: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    for coefficient in given:
        if coefficient not in defaults:
            known = ["weights", "scale", "normalize", "rescale", *defaults]
            raise TypeError(f"{name}() has no coefficient {coefficient!r}; it takes {', '.join(known)}")
    values = defaults | given
    for coefficient, value in values.items():
        if value is REQUIRED:
            raise TypeError(f"{name}() needs {coefficient}=")
    return values


dare = delta_rule(
    drop(), "inverse", name="dare",
    doc=r"""Drop and rescale (DARE): :math:`\theta_b + \lambda \sum_i w_i\, m_i \odot \tau_i / q_i`, m ~ Bernoulli(q).

    In expectation this is task arithmetic. The mask of a leaf depends on the key, the leaf's path and the
    model's name, on nothing else; without `names` models are named by position, so that order matters.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key: PRNG key (threefry).
      names: N distinct names of the models.
      density: q = 1 − p, the keep probability, one a model or one for all; 1 keeps all.
      weights, scale, normalize: w, λ, and whether to divide by Σw (False).
      rescale: "inverse" (the paper's, 1/q), "l1" (keep the tensor's L1 norm: mergekit's), or None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tuned, base = {"w": jnp.array([3.0, 5.0])}, {"w": jnp.array([1.0, 1.0])}
      >>> dare([tuned], base=base, key=jax.random.key(0), density=1.0)
      {'w': Array([3., 5.], dtype=float32)}

    References:
      Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099
    """,
)  # fmt: skip

dare_ties = delta_rule(
    drop(), "inverse", agree.elect_sign, name="dare_ties",
    doc="""Drop and rescale (DARE), then sum the deltas that agree with the elected sign.

    As `dare`, with TIES' election; `normalize=True` averages those that agree.
    """,
)  # fmt: skip

ties = delta_rule(
    trim(), None, agree.elect_sign, normalize=True, name="ties",
    doc=r"""Trim, elect sign, disjoint mean (TIES).

    :math:`d_i` the k = max(1, ⌊density·n⌋) largest of :math:`\tau_i`, :math:`s = \mathrm{sign}\sum_i w_i d_i`,
    :math:`\theta_b + \lambda \sum_i M_i w_i d_i / \sum_i M_i w_i` with M where sign(w d) = s. The election is by
    weighted deltas, as mergekit's; the paper's is `delta_rule(trim(), None, elect_sign_unweighted, normalize=True)`.
    Equal magnitudes at the cut: the lower flat index is kept.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      density: share kept, one a model or one for all; the paper's 0.2.
      weights, scale: w and λ.
      normalize: False leaves the sum undivided.
      rescale: None, or "l1".

    Example:
      >>> import jax.numpy as jnp
      >>> one, two = {"w": jnp.array([3.0, 1.0, 0.1])}, {"w": jnp.array([1.0, -2.0, 0.1])}
      >>> ties([one, two], base={"w": jnp.zeros(3)}, density=0.7)
      {'w': Array([ 2., -2.,  0.], dtype=float32)}

    References:
      Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708
    """,
)  # fmt: skip

della = delta_rule(
    rank_drop(), "inverse", agree.elect_sign, normalize=True, name="della",
    doc=r"""Drop by rank, rescale, elect sign, average (DELLA).

    The keep probability of an element runs from density − epsilon (smallest magnitude of its row, the last
    axis) to density + epsilon (largest); kept ones are divided by it. Coefficients density, epsilon (0.15),
    weights, scale; normalize; rescale "inverse" (the paper's), "l1" (mergekit's) or None.

    References:
      Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617
    """,
)  # fmt: skip

della_linear = delta_rule(
    rank_drop(), "inverse", name="della_linear", doc="Drop by rank and rescale as `della`, then the weighted sum."
)

breadcrumbs = delta_rule(
    two_sided_trim(), name="breadcrumbs",
    doc=r"""Drop the largest and the smallest of each delta, then the weighted sum (model breadcrumbs).

    Of n elements the ⌊gamma·n⌋ largest magnitudes go, the next ⌊density·n⌋ stay (fewer outliers go where
    density + gamma > 1). Coefficients density, gamma (0.01), weights, scale.

    References:
      Davari and Belilovsky, "Model Breadcrumbs", https://arxiv.org/abs/2312.06795
    """,
)  # fmt: skip

breadcrumbs_ties = delta_rule(
    two_sided_trim(), None, agree.elect_sign, name="breadcrumbs_ties",
    doc="Drop the largest and the smallest as `breadcrumbs`, then sum the deltas that agree with the elected sign.",
)  # fmt: skip

sce = delta_rule(
    variance_select(1.0), None, agree.elect_sign_by_energy, normalize=True, name="sce",
    compat_consensus=agree.elect_sign_by_energy_mergekit,
    doc=r"""Select by variance, calculate weights, erase minorities (SCE).

    Keep the ⌊select_topk·m⌋ elements of largest variance over the models (m: of nonzero variance); weigh each
    model by its share of mean(d²); elect the sign by the unweighted deltas; average those that agree.
    `compat="mergekit"` brings back its absolute floors (uniform weights for small deltas).

    References:
      Wan et al., "FuseChat", https://arxiv.org/abs/2408.07990
    """,
)  # fmt: skip
