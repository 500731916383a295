"""How well the changes of several rounds agree: cosines, and shares of elements that move in opposite directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmerge.files.inspect.moments import Moments, Workspace, summarise
from jaxmerge.tree import named_leaves

from ..models.decoder import Params

Matrix = list[list[float | None]]


def agreement(deltas: Sequence[Params]) -> tuple[Matrix, Matrix]:
    r"""Compare task vectors $\tau_i$ pairwise, over all parameters together.

    Args:
      deltas: N trees of one structure, $\tau_i = \theta_i - \theta_0$ or what one round added.

    Returns:
      (cosine, conflict), N × N each. cosine is $\tau_i \cdot \tau_j / (\|\tau_i\| \|\tau_j\|)$; conflict is
      the share of opposite signs among the elements that both change, TIES's reason to elect signs (Yadav et al.,
      https://arxiv.org/abs/2306.01708). None where one is not defined.
    """
    total, work = Moments.zero(len(deltas)), Workspace(len(deltas), np.dtype(np.float32))
    trees = [named_leaves(delta) for delta in deltas]
    for path in trees[0]:
        flat = [np.asarray(tree[path], np.float32).reshape(-1) for tree in trees]
        total += work.measure([np.zeros_like(flat[0]), *flat])
    return matrices(summarise(total), len(deltas))


def matrices(described: dict[str, Any], n: int) -> tuple[Matrix, Matrix]:
    """Lay the pairs of `moments.summarise` out as symmetric matrices."""
    cosine: Matrix = [[1.0 if i == j else None for j in range(n)] for i in range(n)]
    conflict: Matrix = [[0.0 if i == j else None for j in range(n)] for i in range(n)]
    for pair in described["pairs"]:
        i, j = pair["models"]
        cosine[i][j] = cosine[j][i] = pair["cosine"]
        conflict[i][j] = conflict[j][i] = pair["conflict"]
    return cosine, conflict
