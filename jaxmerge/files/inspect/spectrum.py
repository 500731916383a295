r"""Singular values and vectors of what training changed: effective ranks, and how far two changes share directions.

Of a matrix Δ with singular values σ, $p_i = \sigma_i / \sum_j \sigma_j$, the effective rank is
$\exp(-\sum_i p_i \log p_i)$: r for r equal values, 1 for one direction. With $U_1, U_2$ the leading k singular vectors
of two changes, on the shorter side of the matrix, their overlap is $\|U_1^\top U_2\|_F^2 / k$: 1 where they span the
same space, 0 where the spaces are orthogonal, and k/n by chance for a side of n. A change of fewer than k directions
brings directions of rounding noise along: choose k no larger than its effective rank.

References:
  Roy and Vetterli, "The effective rank: A measure of effective dimensionality", 2007
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge import where
from jaxmerge.files.checkpoints.source import Source, Tensor, read
from jaxmerge.files.experts.layout import unstacked
from jaxmerge.files.inspect.table import aligned, short

Progress = Callable[[int, int, str], None]


def spectra(base: Source, *others: Source, rank: int = 16, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every matrix that all have in one shape; one of each model is in memory at a time.

    Args:
      rank: k, of the overlaps; less where a matrix is smaller.
      progress: called with bytes read so far, bytes to read, and a tensor's name.

    Returns:
      {"rank", "models", "tensors": {name: {"effective_rank": one a model, "overlap": one a pair, "chance"}}, "layers":
      the means by layer, "all": their means}. A model that did not change a matrix has the effective rank 0 there, and
      its overlaps are None, which no mean counts.

    Raises:
      ValueError: rank is below 1, or there is no matrix in common.
    """
    if rank < 1:
        raise ValueError(f"inspect: the rank of the overlaps is {rank}, wanted at least 1")
    sources = tuple(unstacked(source, []) for source in (base, *others))  # as `compare` sees them
    base, others = sources[0], sources[1:]
    shared = {
        name: [source.tensors[name] for source in sources]
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2 and min(tensor.shape) > 1
        and all(name in s.tensors and s.tensors[name].shape == tensor.shape for s in others)
    }  # fmt: skip
    if not shared:
        raise ValueError(f"{base.name!r} has no matrix in common with the other models, so there is no spectrum")
    total, done = sum(tensor.size for tensors in shared.values() for tensor in tensors), 0
    found: dict[str, dict[str, Any]] = {}
    for name, tensors in shared.items():
        found[name] = _measure(tensors, rank)
        done += sum(tensor.size for tensor in tensors)
        if progress is not None:
            progress(done, total, name)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in found.items():
        groups.setdefault(where.layer_group(name.replace(".", "/")), []).append(entry)
    return {
        "rank": rank, "models": [source.name for source in others], "tensors": found,
        "layers": {group: _means(entries) for group, entries in groups.items()}, "all": _means(list(found.values())),
    }  # fmt: skip


def _measure(tensors: Sequence[Tensor], rank: int) -> dict[str, Any]:
    first = read(tensors[0]).astype(np.float64)
    ranks, leading = [], []
    count = min(rank, *first.shape)
    for tensor in tensors[1:]:
        delta = read(tensor).astype(np.float64) - first
        values, vectors = decompose(delta)
        ranks.append(effective_rank(values))
        leading.append(vectors[:, :count] if values[0] > 0 else None)
    overlaps = [
        None if one is None or two is None else float(np.sum((one.T @ two) ** 2) / count)
        for one, two in itertools.combinations(leading, 2)
    ]
    return {"effective_rank": ranks, "overlap": overlaps, "chance": count / min(first.shape)}


def decompose(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values, descending, and singular vectors [n, n] on the shorter side, through its Gram matrix.

    Values below 1e-8 of the largest are lost in rounding, and count for nothing in an effective rank.
    """
    scale = float(np.abs(delta).max()) or 1.0
    delta = delta / scale
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    squares, vectors = np.linalg.eigh(gram)
    return scale * np.sqrt(np.clip(squares[::-1], 0, None)), vectors[:, ::-1]


def effective_rank(values: np.ndarray) -> float:
    """The exponential of the entropy of singular values; 0 of none.

    Example:
      >>> round(effective_rank(np.array([2.0, 2.0, 0.0])), 6), effective_rank(np.zeros(3))
      (2.0, 0.0)
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values[values > 1e-8 * values[0]] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _means(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(numbers: Sequence[float | None]) -> float | None:
        there = [number for number in numbers if number is not None]
        return float(np.mean(there)) if there else None

    return {
        key: [mean(column) for column in zip(*(entry[key] for entry in entries), strict=True)]
        for key in ("effective_rank", "overlap")
    } | {"chance": mean([entry["chance"] for entry in entries])}


def spectrum_table(result: Mapping[str, Any]) -> str:
    """Write what `spectra` found for a terminal: effective ranks of each model, overlaps of each pair, by layer."""
    letters = [chr(ord("A") + i) for i in range(min(len(result["models"]), 4))]
    pairs = list(itertools.combinations(range(len(result["models"])), 2))
    shown = [i for i, (a, b) in enumerate(pairs) if max(a, b) < min(len(letters), 3)]
    head = ["layer", *(f"{letter} rank" for letter in letters)]
    head += [f"{letters[pairs[i][0]]} · {letters[pairs[i][1]]}" for i in shown] + (["chance"] if shown else [])
    body = []
    for name, entry in {**result["layers"], "all": result["all"]}.items():
        cells = [short(name, 40), *(f"{value:.1f}" for value in entry["effective_rank"][: len(letters)])]
        cells += ["–" if entry["overlap"][i] is None else f"{100 * entry['overlap'][i]:.1f} %" for i in shown]
        body.append(cells + ([f"{100 * entry['chance']:.1f} %"] if shown else []))
    said = (
        f"effective ranks of the changes, and overlaps of their {result['rank']} leading directions (means of matrices)"
    )
    return "\n".join([said, *aligned(head, body)])
