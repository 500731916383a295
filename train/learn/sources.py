"""From what `jaxmerge sft` is told to learn from to tokenised examples: one list for each source."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmerge.files import documents

from ..data import hub
from ..data import versions as dataset
from ..data.builders import HubRows, JsonLines, Records, fingerprint, prepare, read_folder
from ..data.records import Record, turns
from ..log import UserError
from ..models.tokenizer import Tokenizer
from ..tasks.settings import FamilySpec
from .chat import encode
from .pairs import encode_pair
from .settings import Data, Part

Example = dict[str, Any]


def load_sources(
    data: Data, tokenizer: Tokenizer, *, home: Path, seed: int, **variables: Any
) -> tuple[list[list[Example]], list[dict[str, Any]]]:
    """Tokenised examples {tokens, learnt or prompt_length} of each source of `data`.

    Files and suites are first written as TFDS versions under `home`, which then are what is read: a run that goes on
    after its file was changed is refused, because the changed file makes another dataset.

    Args:
      variables: further names the chat template reads.

    Returns:
      (examples of each source, {source, dataset, examples, tokens, learnt} of each).
    """
    examples, notes = [], []
    for number, part in enumerate(data.sources):
        records, folder = open_part(part, home / f"part-{number}", seed)
        if isinstance(records, Path):
            found = read_samples(records, tokenizer)
        else:
            found = tokenise(records, tokenizer, str(part.path or "suite"), data, **variables)
        if not found:
            raise UserError(f"{part.path or 'suite'}: no examples in its split {part.split!r}")
        examples.append(found)
        notes.append(
            {
                "source": part.path or ", ".join(f.family for f in part.families),
                "dataset": str(folder),
                "examples": len(found),
                "tokens": sum(len(e["tokens"]) for e in found),
                "rate": part.rate,
            }
        )
    return examples, notes


def open_part(part: Part, home: Path, seed: int) -> tuple[list[Record] | Path, Path]:
    """Records of a source, or the folder of a run's samples; and the TFDS version they stand in."""
    if part.families:
        builder = ReasoningGym(families=part.families, seed=seed, data_dir=home)
        folder = prepare_once(builder, home)
        return read_folder(folder, part.split), folder
    if hub.is_hub(part.path):
        of = {"format": part.format, "ignore": part.ignore, "split": part.split}
        folder = prepare_once(HubRows(path=part.path, data_dir=home, **of), home)
        return read_folder(folder), folder
    path = Path(part.path)
    if not path.is_dir():
        if part.split != "train":
            raise UserError(f"{path}: a file has no split {part.split!r}; leave split out")
        folder = prepare_once(JsonLines(path=path, data_dir=home, format=part.format, ignore=part.ignore), home)
        return read_folder(folder), folder
    if part.format is not None or part.ignore:
        raise UserError(f"{path}: a TFDS version has neither format nor ignored keys; leave them out")
    if is_samples(path):
        if part.split != "train":
            raise UserError(f"{path}: a run's samples have no split {part.split!r}; leave split out")
        return path, path
    return read_folder(path, part.split), path


def prepare_once(builder: Records, home: Path) -> Path:
    """Write the dataset; refused if `home` holds one made from something else."""
    folder = Path(builder.data_dir)
    # Without checksums it is what a killed writer left.
    others = [p for p in home.glob(f"*/*/*/{dataset.CHECKSUMS}") if p.parent != folder]
    if others:
        raise UserError(
            f"{others[0].parent} was made from other contents than are there now ({folder.parent.name});"
            " put the data back as it was, or choose another out folder"
        )
    return prepare(builder)


def is_samples(folder: Path) -> bool:
    """Whether a folder is a version that a self-improvement run wrote (train/data/versions.py)."""
    return (folder / dataset.CHECKSUMS).exists() and "prompt_length" in (folder / "features.json").read_text()


def read_samples(folder: Path, tokenizer: Tokenizer) -> list[Example]:
    """Examples that a run wrote, tokens and all; refused where they are another tokenizer's."""
    examples, _ = dataset.read_version(folder.parent.parent, folder.parent.name, folder.name)
    for e in examples:
        tail = e["tokens"][e["prompt_length"] :]
        known = max(e["tokens"]) < tokenizer.vocab_size
        spelt = (tokenizer.decode_after(tail), tokenizer.decode(tail)) if known else ()
        if not any(text.startswith(e["completion"]) for text in spelt):
            raise UserError(
                f"{folder}: the tokens of {e['question_id']} do not spell its text with this model's tokenizer; they"
                " were sampled from another family of models"
            )
    return examples


def tokenise(
    records: Sequence[Record], tokenizer: Tokenizer, where: str, data: Data, **variables: Any
) -> list[Example]:
    """Tokens of records; an error names which."""
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            if record.rejected:
                examples.append(encode_pair(tokenizer, record, **variables))
                continue
            for e in encode(tokenizer, record, learn=data.learn, **variables):
                examples.append({"tokens": e.tokens, "learnt": e.learnt, "reward": record.reward, **record.scores})
        except UserError as error:
            raise UserError(f"{where}, example {number}: {error}") from error
    return examples


def with_template(tokenizer: Tokenizer, path: str) -> Tokenizer:
    """The tokenizer with the chat template of a file; the file's text replaces its own."""
    if not path:
        return tokenizer
    try:
        text = documents.read_text(Path(path))
    except ValueError as error:
        raise UserError(f"data.chat_template: {error}") from error
    return dataclasses.replace(tokenizer, chat_template=text)


class ReasoningGym(Records, skip_registration=True):
    """Questions of reasoning-gym families with their worked solutions, split so that none is in two places."""

    def __init__(self, *, families: Sequence[FamilySpec], seed: int, data_dir: str | os.PathLike[str]):
        self._families, self._seed = tuple(families), seed
        drawn = [
            {"family": f.family, "domain": f.domain, "args": dict(f.args)}
            | {split: f.count(split) for split in ("train", "validation", "test")}
            for f in families
        ]
        self.origin = {"families": json.dumps(drawn, sort_keys=True), "seed": seed}
        super().__init__(f"suite_{fingerprint(self.origin)}", data_dir)

    def records(self) -> dict[str, Sequence[Record]]:
        from ..tasks.suite import build_suite

        suite = build_suite(self._families, seed=self._seed, style="instruct")
        splits: dict[str, Sequence[Record]] = {}
        for split in ("train", "validation", "test"):
            if questions := suite.questions(split):
                splits[split] = [
                    Record(turns(q.text, worked(q.solution, q.answer)), answer=q.answer, id=q.id) for q in questions
                ]
        return splits


def worked(solution: str | None, answer: str) -> str:
    """A solution that ends in the line `Answer: …`, where the answer is looked for."""
    head = (solution or "").strip()
    return f"{head}\nAnswer: {answer}" if head else f"Answer: {answer}"
