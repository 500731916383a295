"""How well the changes of a recipe's models agree, layer by layer, before anything is merged."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge.files import recipe as recipes
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.inspect.compare import Progress, compare
from jaxmerge.files.recipe import Recipe

WANTED = "wanted a base_model and two models or more, merged whole"


def conflict(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    compat: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the models of a recipe with its base; every weight is read once, and none is held.

    Args:
      recipe, compat: as for `jaxmerge.files.merge`.
      progress: called with bytes read so far, bytes to read, and a tensor's name.

    Returns:
      What `compare` returns.

    Raises:
      ValueError: the recipe is refused, or has no changes to compare: no base, one model, slices, or adapters.
    """
    documents = recipes.read(pathlib.Path(recipe) if isinstance(recipe, str | os.PathLike) else recipe, compat=compat)
    last = documents[-1]
    if len(documents) > 1 or not isinstance(last, Recipe):
        raise ValueError(f"conflict=true: the recipe has stages or makes a mixture of experts; {WANTED}")
    if last.adapter is not None:
        raise ValueError(f"conflict=true: the recipe merges adapters; {WANTED}")
    if not all(module.whole for module in last.modules):
        raise ValueError(f"conflict=true: the recipe merges slices; {WANTED}")
    models = [name for name in last.sources if name != last.base]
    if last.base is None or len(models) < 2:
        raise ValueError(
            f"conflict=true: found base_model {last.base!r} and {len(models)} model{'s' * (len(models) != 1)} beside "
            f"it; {WANTED}"
        )
    return compare(open_source(last.base), *map(open_source, models), progress=progress)
