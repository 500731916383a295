"""Rules from rules: `masked` restricts a rule to some leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax

from jaxmerge import tree, where
from jaxmerge.contract import Needs, P, Rule, check_inputs
from jaxmerge.leaves import settle
from jaxmerge.tree import PyTree


class _Aside:
    """A leaf set aside: no pytree and no array, so a rule passes it through and never looks inside."""

    def __init__(self, leaf: Any):
        self.leaf = leaf
        if tree.is_array(leaf):
            self.shape = leaf.shape  # so that a stacked one still counts as layers


def masked(rule: Rule[P], where_: where.Where, otherwise: str = "base") -> Rule[P]:
    """Restrict `rule` to the leaves that a path filter selects.

    Args:
      rule: any rule.
      where_: pattern, patterns or predicate on the path (see `jaxmerge.where`). One that selects nothing is
        an error when the rule runs.
      otherwise: where the other leaves come from: "base", or "first" (models[0]).

    Returns:
      A rule of the same signature and needs. Layers are counted over the whole tree, so a gradient over
      depth means the same with and without the mask.

    Example:
      >>> from jaxmerge.arithmetic import extrapolate
      >>> import jax.numpy as jnp
      >>> base, tuned = ({"mlp": jnp.array([v]), "norm": jnp.array([v])} for v in (1.0, 2.0))
      >>> masked(extrapolate, "mlp")([tuned], base=base, alpha=1.0)
      {'mlp': Array([3.], dtype=float32), 'norm': Array([1.], dtype=float32)}
    """
    if otherwise not in ("base", "first"):
        raise ValueError(f"masked: otherwise={otherwise!r}, wanted 'base' or 'first'")
    if otherwise == "base" and rule.needs.base == "none":
        raise ValueError(f"masked: {rule.__name__} takes no base; pass otherwise='first'")

    @functools.wraps(rule)
    def run(models: Sequence[PyTree], *, base=None, **rest: Any) -> PyTree:
        check_inputs(rule.__name__, rule.needs, models, base, rest.get("key", ...), rest.get("names"))
        if otherwise == "base" and base is None:
            raise ValueError(f"masked({rule.__name__}) keeps the base's other leaves; pass base=, or otherwise='first'")
        trees = tree.align(models, base)
        chosen = set(where.select(models[0], where_))

        def keep(path: str, leaf: Any) -> Any:
            return leaf if path in chosen else _Aside(leaf)

        def aside(leaves: Sequence[Any]) -> PyTree:
            return jax.tree.unflatten(trees.treedef, list(map(keep, trees.paths, leaves)))

        def aside_if_alike(value: Any) -> Any:
            # Statistics and references are trees like the models: what is set aside there is set aside here.
            if isinstance(value, list | tuple) and value and all(alike(entry) for entry in value):
                return [aside_if_alike(entry) for entry in value]
            if not alike(value):
                return value
            if isinstance(value, Mapping) and value.keys() == ranks.keys():
                return {path: keep(path, leaf) for path, leaf in value.items()}  # flat, as Gram matrices must be
            named = tree.named_leaves(value)
            return aside([named[path] for path in trees.paths])

        def alike(value: Any) -> bool:
            """A coefficient may have the models' paths, by chance or a number a leaf; its entries are other leaves."""
            # Ranks and not shapes: a tree of wrong shapes is for the rule to refuse.
            return not tree.is_array(value) and {p: rank(leaf) for p, leaf in tree.named_leaves(value).items()} == ranks

        def rank(leaf: Any) -> int | None:
            return len(leaf.shape) if tree.is_array(leaf) else None

        ranks = {path: rank(leaf) for path, leaf in zip(trees.paths, trees.models[0], strict=True)}

        merged = cast(Callable[..., PyTree], rule)(  # which coefficients it has, its own signature knows
            [aside(model) for model in trees.models],
            base=None if trees.base is None else aside(trees.base),
            **{name: aside_if_alike(value) for name, value in rest.items()},
        )
        rest_of = trees.base if otherwise == "base" else trees.models[0]
        assert rest_of is not None
        leaves = [
            settle(old, first) if isinstance(new, _Aside) else new
            for new, old, first in zip(jax.tree.leaves(merged), rest_of, trees.models[0], strict=True)
        ]
        return jax.tree.unflatten(trees.treedef, leaves)

    run.needs = rule.needs if otherwise == "first" else _with_base(rule.needs)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _with_base(needs: Needs) -> Needs:
    return Needs(needs.least, needs.most, "required", needs.key, needs.symmetric)
