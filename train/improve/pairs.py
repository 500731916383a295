"""A round's right and wrong samples as pairs: what iterative preference learns from.

References:
  Pang et al., "Iterative Reasoning Preference Optimization", https://arxiv.org/abs/2404.19733
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from ..runtime.jsonl import Row


def pair_up(
    right: Sequence[Row], wrong: Sequence[tuple[str, Sequence[int]]], most: int, earlier: Sequence[Row] = ()
) -> list[Row]:
    """Examples of pairs: `earlier` ones, then for each question at most `most` new ones.

    The k-th pair of a question has its k-th right and its k-th wrong sample, begun again where they end, so that each
    is used about as often as the others, and no pair twice.

    Args:
      right: examples of right samples, in the order of their questions.
      wrong: (question, tokens of its prompt and of a wrong sample), no sample twice.
    """
    rights, wrongs = defaultdict(list), defaultdict(list)
    for example in right:
        rights[example["question_id"]].append(example)
    for id, tokens in wrong:
        wrongs[id].append(list(tokens))
    pairs = {(e["question_id"], tuple(e["tokens"]), tuple(e["rejected"])): e for e in earlier}
    for id, better in rights.items():
        worse = wrongs[id]
        for k in range(min(most, math.lcm(len(better), len(worse)))):
            pair = {**better[k % len(better)], "rejected": worse[k % len(worse)]}
            pairs.setdefault((id, tuple(pair["tokens"]), tuple(pair["rejected"])), pair)
    return list(pairs.values())
