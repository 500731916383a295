"""Rows of examples that are pairs of answers, or answers with labels: from a record to what a batch holds.

An example of a pair is one of its better answer, {tokens, prompt_length}, and beside it `rejected`, the tokens of the
same prompt and the worse answer. A row of a batch is then two sequences: `tokens` is [B, 2, T].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.records import Record
from ..log import UserError
from ..models.tokenizer import Tokenizer
from .batches import Batch, Rows, RowSource, row_length, to_rows
from .chat import Encoded, encode
from .packing import fill
from .settings import Sft

Example = Mapping[str, Any]


def encode_pair(tokenizer: Tokenizer, record: Record, **variables: Any) -> dict[str, Any]:
    """The example of a pair; the last turn of each answer is learnt, and nothing before it.

    Args:
      variables: further names the chat template reads.
    """
    (better,) = encode(tokenizer, dataclasses.replace(record, rejected=""), learn="last", **variables)
    answer = {"role": "assistant", "content": record.rejected}
    other = dataclasses.replace(record, messages=(*record.messages[:-1], answer), rejected="")
    (worse,) = encode(tokenizer, other, learn="last", **variables)
    (tokens, start), (rejected, begin) = map(answered, (better, worse))
    if tokens[:start] != rejected[:begin]:
        raise UserError(
            "the chat template renders the prompt otherwise before the other answer; set data.chat_template"
        )
    return {"tokens": tokens, "prompt_length": start, "rejected": rejected, "reward": record.reward}


def answered(encoded: Encoded) -> tuple[list[int], int]:
    """Tokens up to the last that is learnt, and where the answer begins."""
    learnt = [i for i, one in enumerate(encoded.learnt) if one]
    return encoded.tokens[: learnt[-1] + 1], learnt[0]


@dataclasses.dataclass(frozen=True)
class Groups(Rows):
    """Rows of G sequences: tokens, weights [n, G, T], lengths [n, G].

    Attributes:
      beside: other arrays of n rows, which a batch holds too: `reference` [n, G, T], `label` [n].
      starts: [n] where the answers of a row begin.
    """

    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    starts: np.ndarray | None = None

    def take(self, chosen: np.ndarray, epoch: int) -> Batch:
        return super().take(chosen, epoch) | {name: values[chosen] for name, values in self.beside.items()}


def rows_of(examples: Sequence[Example], config: Sft, pad_id: int = 0, *, seed: int = 0) -> RowSource:
    """Rows of examples as the objective of `config` learns from them; `to_rows` for objectives of single answers."""
    wants = config.objective.learns
    check(examples, wants, config.objective.name)
    return BUILDERS[wants](examples, config, pad_id, seed=seed)


def check(examples: Sequence[Example], wants: str, name: str) -> None:
    """Refuse examples that an objective does not learn from."""
    paired = {"rejected" in e for e in examples}
    if wants == "answers" and True in paired:
        raise UserError(
            f"the examples are pairs of a chosen and a rejected answer, and sft.objective {name} learns from single "
            "ones; set sft.objective={name: dpo} (or ipo, orpo, cpo, aft, kto, fait), or data.format=chosen to learn "
            "the chosen answers alone"
        )
    if wants in ("pairs", "better") and False in paired:
        raise UserError(
            f"sft.objective {name} compares answers, and there are examples without a rejected one; give lines with "
            "the keys prompt, chosen, rejected (docs/data.md), or take another sft.objective"
        )
    if wants == "labels" and any("rejected" not in e and not e.get("reward") for e in examples):
        raise UserError(
            f"sft.objective {name} learns from good and bad answers, and there are examples that do not say which they "
            "are; give lines with the keys prompt, completion, label, or pairs (docs/data.md)"
        )


def to_pairs(examples: Sequence[Example], config: Sft, pad_id: int = 0, *, seed: int = 0) -> Groups:
    """Two sequences a row: the chosen, the rejected."""
    del seed
    both = [((e["tokens"], start_of(e)), (e["rejected"], start_of(e))) for e in examples]
    return grouped(both, [float(e.get("weight", 1.0)) for e in examples], config, pad_id)


def to_labels(examples: Sequence[Example], config: Sft, pad_id: int = 0, *, seed: int = 0) -> Groups:
    """Two sequences a row: an answer and, after its prompt, that of another prompt. A pair is two such rows.

    The other answer is that of the next example whose prompt differs, so that it is the same in every epoch.
    """
    del seed
    singles = []
    for e in examples:
        start = start_of(e)
        singles.append((list(e["tokens"]), start, 1.0 if "rejected" in e or e["reward"] > 0 else -1.0))
        if "rejected" in e:
            singles.append((list(e["rejected"]), start, -1.0))
    prompts = [tuple(tokens[:start]) for tokens, start, _ in singles]
    both, count = [], len(singles)
    for i, (tokens, start, _) in enumerate(singles):
        j = next((k % count for k in range(i + 1, i + count) if prompts[k % count] != prompts[i]), None)
        if j is None:
            raise UserError("sft.objective: kto needs answers to two prompts or more, to estimate its divergence")
        other = tokens[:start] + singles[j][0][singles[j][1] :]
        both.append(((tokens, start), (other, start)))
    labels = np.array([label for *_, label in singles], np.float32)
    return grouped(both, [1.0] * count, config, pad_id, label=labels)


def start_of(example: Example) -> int:
    """Where the answer begins; refused where several turns are learnt."""
    if "learnt" not in example:
        return example["prompt_length"]
    learnt = np.flatnonzero(example["learnt"])
    if len(learnt) != learnt[-1] - learnt[0] + 1:
        raise UserError(
            "an example has several turns of the assistant that are learnt, and the objective compares single answers; "
            "set data.learn=last"
        )
    return int(learnt[0])


def grouped(
    groups: Sequence[Sequence[tuple[Sequence[int], int]]],
    weights: Sequence[float],
    config: Sft,
    pad_id: int,
    **beside: np.ndarray,
) -> Groups:
    """Arrays of groups of (tokens, where the answer begins); a group one of whose members is too long goes or is cut.

    Args:
      weights: of each group. beside: other arrays, a row for each group.
    """
    if not groups:
        raise UserError("sft: there is no example to train on")
    kept, truncated = [], 0
    for number, group in enumerate(groups):
        over = max(len(tokens) for tokens, _ in group) > config.max_length
        if over and (config.overlong == "drop" or max(start for _, start in group) >= config.max_length):
            continue
        truncated += over
        kept.append(number)
    if not kept:
        raise UserError(
            f"sft: none of {len(groups)} pairs is at most sft.max_length={config.max_length} tokens long; raise it"
        )
    width = row_length(min(config.max_length, max(len(tokens) for n in kept for tokens, _ in groups[n])))
    shape = (len(kept), len(groups[0]))
    tokens, learnt = np.zeros((*shape, width), np.int32), np.zeros((*shape, width), np.float32)
    lengths = np.zeros(shape, np.int64)
    for at, number in enumerate(kept):
        for member, (ids, start) in enumerate(groups[number]):
            row = np.asarray(ids[: config.max_length], np.int32)
            weight = np.where(np.arange(len(row)) >= start, np.float32(weights[number]), np.float32(0))
            tokens[at, member], learnt[at, member], _ = fill([row], [weight], width, pad_id)
            lengths[at, member] = len(row)
    rows = {name: values[kept] for name, values in beside.items()}
    starts = np.array([groups[number][0][1] for number in kept])
    return Groups(tokens, learnt, len(groups) - len(kept), truncated, lengths, rows, starts)


def good(examples: Sequence[Example]) -> list[Example]:
    """Those of held-out examples whose plain loss is measured: no bad answers."""
    return [e for e in examples if e.get("reward", 0.0) >= 0 or "rejected" in e]


BUILDERS: dict[str, Callable[..., RowSource]] = {
    "answers": to_rows,
    "better": to_rows,  # of the chosen answers; the objective weighs tokens by the rejected ones
    "pairs": to_pairs,
    "labels": to_labels,
}
"""What an objective `learns` from: examples to rows."""
