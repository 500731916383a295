"""`jaxmerge data`: what a file or a dataset would become, without a model being trained, and without one at all."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import hub, versions
from ..data.builders import read_folder, records_of
from ..data.formats import FORMATS, detect
from ..data.records import Record, digest, turns
from ..data.rows import is_rows, read_rows
from ..log import format_percent, say
from ..models.open import open_tokenizer
from ..models.tokenizer import DATE, Tokenizer
from ..runtime.jsonl import Row
from ..tasks.local import TASK_OF
from .batches import to_arrays
from .settings import Data, Part, Sft
from .sources import Example, is_samples, read_samples, tokenise, with_template

LONGEST = 1200
"""Characters of an example that are shown."""
Rows = Sequence[tuple[str, Row]]
"""Rows of a file or of a dataset on the hub, each with its place; a folder has none."""
OPEN, CLOSE = "⟦", "⟧"


def look(data: Data, sft: Sft, *, model: str | None, examples: int) -> None:
    """Say what is there, show some examples, then lengths and what is learnt and cut.

    Args:
      data: what is read, as `sft` reads it; one source.
      sft: its max_length and overlong decide what is cut.
      model: whose tokenizer counts; None counts characters.
      examples: this many are shown, from all over the file.
    """
    (part,) = data.sources
    rows = read_rows(part.path, part.split) if is_rows(part.path) else None
    records = read(part, rows)
    for line in describe(part, rows, records):
        say(line)
    tokenizer = None if model is None else with_template(open_tokenizer(model), data.chat_template)
    encoded = None if tokenizer is None else encode(part, records, tokenizer, data)
    shown: Sequence[Any] = records if encoded is None else encoded
    for index in spread(len(shown), examples):
        said = rendered(records[index]) if encoded is None else spelt(encoded[index], tokenizer)
        length = f"{len(text_of(records[index])):,} characters" if encoded is None else counted(encoded[index], sft)
        say(f"\n--- {index + 1:,} of {len(shown):,}: {length}")
        say(said if len(said) <= LONGEST else f"{said[:LONGEST]}… ({len(said) - LONGEST:,} characters more)")
    say("")
    for line in measured(records) if encoded is None else learnt(encoded, sft):
        say(line)


def read(part: Part, rows: Rows | None) -> list[Record]:
    """The records of a source; of a run's samples their texts."""
    if rows is not None:
        return records_of(rows, part.format, ignore=part.ignore, source=part.path)
    folder = Path(part.path)
    if is_samples(folder):
        samples, _ = versions.read_version(folder.parent.parent, folder.parent.name, folder.name)
        return [Record(turns(row["prompt"], row["completion"]), plain=True, id=row["question_id"]) for row in samples]
    return read_folder(folder, part.split)


def encode(part: Part, records: Sequence[Record], tokenizer: Tokenizer, data: Data) -> list[Example]:
    """Tokens, as `sft` makes them."""
    if not is_rows(part.path) and is_samples(Path(part.path)):
        return read_samples(Path(part.path), tokenizer)
    return tokenise(records, tokenizer, part.path, data, date_string=DATE)


def describe(part: Part, rows: Rows | None, records: Sequence[Record]) -> Iterator[str]:
    """Where the examples are from, their format, their number."""
    form = ""
    if hub.is_hub(part.path):
        name = hub.parse(part.path)
        found = hub.dataset_of(name.repo, name.revision)
        known = hub.splits(name, found)
        subsets = hub.shown(found.layout.subsets)
        yield f"{part.path}: commit {found.commit}; subsets {subsets}; splits {', '.join(known)}"
    if rows is not None:
        first = {key: value for key, value in rows[0][1].items() if key not in part.ignore}
        form = part.format or detect(first)
        told = "as data.format says" if part.format else f"told by the keys {', '.join(wanted_of(form, first))}"
        yield f"format {form}, {told}"
    else:
        yield f"{part.path}: the folder of a TFDS version"
    kinds = Counter("".join(m["role"][0] for m in record.messages) for record in records)
    several = sum(sum(m["role"] == "assistant" for m in record.messages) > 1 for record in records)
    parts = [f"{len(records):,} examples"]
    if several:
        parts.append(f"{several:,} with several turns of the assistant")
    if repeated := len(records) - len({digest(record) for record in records}):
        parts.append(f"{repeated:,} repeat another")
    if asked := sum(bool(record.answer or record.tests) for record in records):
        task = f": `jaxmerge evaluate` asks them as {TASK_OF[form]}" if form in TASK_OF else ""
        parts.append(f"{asked:,} with an answer or tests{task}")
    if system := sum(count for kind, count in kinds.items() if "s" in kind):
        parts.append(f"{system:,} with a system message")
    yield "; ".join(parts)


def wanted_of(form: str, row: dict[str, Any]) -> list[str]:
    names = [name for names in FORMATS[form].required for name in names.split("|")]
    return [name for name in names if name in row]


def spread(count: int, wanted: int) -> list[int]:
    """Indices from all over.

    Example:
      >>> spread(9, 5), spread(2, 5), spread(9, 0)
      ([0, 2, 4, 6, 8], [0, 1], [])
    """
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()})


def rendered(record: Record) -> str:
    """A conversation as it is kept; what is learnt stands in brackets, whatever the chat template will be."""
    lines = []
    for message in record.messages:
        text = message["content"]
        lines.append(f"{message['role']}: " + (f"{OPEN}{text}{CLOSE}" if message["role"] == "assistant" else text))
    lines += [f"rejected: {record.rejected}"] if record.rejected else []
    lines += [f"choices: {' | '.join(record.choices)}"] if record.choices else []
    lines += [f"answer: {record.answer}"] if record.answer else []
    return "\n".join(lines)


def text_of(record: Record) -> str:
    return "".join(message["content"] for message in record.messages)


def mask_of(example: Example) -> list[int]:
    """1 for each token that is learnt."""
    before = example.get("prompt_length", 0)
    return example.get("learnt") or [int(i >= before) for i in range(len(example["tokens"]))]


def spelt(example: Example, tokenizer: Tokenizer | None) -> str:
    """The text of an example with its special tokens; what is learnt stands in brackets."""
    assert tokenizer is not None, "tokens come from a tokenizer"
    said: list[str] = []
    runs = itertools.groupby(zip(example["tokens"], mask_of(example), strict=True), key=lambda pair: bool(pair[1]))
    for is_learnt, run in runs:
        ids = [token for token, _ in run]
        text = (tokenizer.decode_after if said else tokenizer.decode)(ids, special=True)
        said.append(f"{OPEN}{text}{CLOSE}" if is_learnt else text)
    if "rejected" in example:
        worse = tokenizer.decode_after(example["rejected"][example["prompt_length"] :], special=True)
        said.append(f"\n\nrejected: {OPEN}{worse}{CLOSE}")
    return "".join(said)


def counted(example: Example, sft: Sft) -> str:
    total = len(example["tokens"])
    words = f"{total:,} tokens, {sum(mask_of(example)):,} of them learnt"
    if total <= sft.max_length:
        return words
    return f"{words}; longer than sft.max_length, {'left out' if sft.overlong == 'drop' else 'cut'}"


def in_words(lengths: Sequence[int], what: str) -> str:
    """Lengths in one line."""
    mean, (half, most) = np.mean(lengths), np.percentile(lengths, (50, 95))
    return (
        f"{what}: {mean:,.0f} on average, half have at most {half:,.0f}, 95 % at most {most:,.0f}, the longest "
        f"{max(lengths):,}; {sum(lengths):,} in all"
    )


def measured(records: Sequence[Record]) -> Iterator[str]:
    """Lengths without a tokenizer."""
    yield in_words([len(text_of(record)) for record in records], "characters")
    answers = [len(m["content"]) for record in records for m in record.messages if m["role"] == "assistant"]
    if answers:
        yield in_words(answers, "characters of what the assistant says, which is learnt")
    yield "model=MODEL counts in tokens, shows the chat template, and says what is longer than sft.max_length"


def learnt(encoded: Sequence[Example], sft: Sft) -> Iterator[str]:
    """Lengths, and what a run would learn and cut."""
    lengths, targets = [len(e["tokens"]) for e in encoded], [sum(mask_of(e)) for e in encoded]
    yield in_words(lengths, "tokens")
    yield in_words(targets, "tokens learnt") + f", {format_percent(sum(targets) / sum(lengths))}"
    *_, dropped, truncated = to_arrays(encoded, sft)
    limit = f"sft.max_length={sft.max_length}, sft.overlong={sft.overlong}"
    if dropped or truncated:
        yield f"{limit}: {dropped:,} longer examples are left out, {truncated:,} are cut"
    else:
        yield f"{limit}: every example fits"
