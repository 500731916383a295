"""Tensors that adapters keep whole (`modules_to_save`, biases, an embedding that is adapted): copied, or merged.

Adapters that all keep the same bits keep them in the result, and nothing else is read. Where they differ, or some do
not keep the tensor, the rule merges what each changes of the base's, and one that does not keep it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.adapters.folder import Adapter
from jaxmerge.files.adapters.spaces import Rule
from jaxmerge.files.checkpoints.adapter import Names
from jaxmerge.files.checkpoints.heads import have_same_bits, tied_pair
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.safetensors import NotHere
from jaxmerge.files.checkpoints.source import Source, Tensor, read

Kept = Sequence[Tensor | None]  # one an adapter
_WRAPPED = re.compile(r"\.base_layer(?=\.)")


def kept_by(adapters: Sequence[Adapter]) -> dict[str, list[Tensor | None]]:
    """Return what adapters keep whole, by its name in the result."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.whole)
    return {name: [adapter.whole.get(name) for adapter in adapters] for name in names}


def is_copied(name: str, kept: Kept) -> bool:
    """Whether a tensor needs no base: all adapters have the same bits, or it is the base's own below an adapted one."""
    there = [tensor for tensor in kept if tensor is not None]
    try:
        alike = all(have_same_bits(there[0], other) for other in there[1:])
    except NotHere:  # a dry run believes it, and does not ask for a base that may not be needed
        alike = True
    return alike and (len(there) == len(kept) or name.endswith(".base_layer.weight"))


def open_base(base: str, names: Sequence[str], *, headers_only: bool) -> Source:
    """Open the base, of which the tensors `names` are needed."""
    try:
        return open_source(base, headers_only=headers_only)
    except ValueError as error:
        raise ValueError(
            f"the adapters keep {names[0]} whole and differ there, so that its change needs the base's weights; write "
            f"in the recipe where it is, base_model: FOLDER. {error}"
        ) from error


def base_tensors(base: Source, kept: Mapping[str, Kept]) -> dict[str, Tensor]:
    """Return the base's tensors by the names that adapters have for them.

    Raises:
      ValueError: it lacks one, or has another shape.
    """
    places, found = Names(base.tensors), {}
    for name, tensors in kept.items():
        target = places.find(_WRAPPED.sub("", name))
        if target is None and (pair := tied_pair(base)) is not None and name == pair[1]:
            target = pair[0]
        if target is None:
            raise ValueError(
                f"base {base.name!r} has no tensor {name}, which an adapter keeps whole; give its own base"
            )
        found[name] = places.tensors[target]
        for tensor in tensors:
            if tensor is not None and tuple(tensor.shape) != tuple(found[name].shape):
                raise ValueError(
                    f"{tensor.where}: {tensor.name} has shape {list(tensor.shape)}, the base's is "
                    f"{list(found[name].shape)}; bring base and adapters to one vocabulary first"
                )
    return found


def merge_whole(kept: Kept, base: Tensor, rule: Rule) -> np.ndarray:
    """Return the base's tensor with the merged change, in the dtype that the adapters keep it in."""
    dtype = next(tensor.dtype for tensor in kept if tensor is not None)
    if not jnp.issubdtype(dtype, jnp.floating):
        return read(base)
    start = read(base).astype(np.float32)
    changes = [np.zeros_like(start) if of is None else read(of).astype(np.float32) - start for of in kept]
    return (start + rule.merge(changes)).astype(dtype)
