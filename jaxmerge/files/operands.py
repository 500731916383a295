"""The operands of a tensor of the result: found in every source, alike in shape, or listed and refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.checkpoints.heads import is_head, tied_pair
from jaxmerge.files.checkpoints.source import Source, Tensor
from jaxmerge.files.methods import Method
from jaxmerge.files.recipe import Entry, Module, Slice
from jaxmerge.files.vocabulary import INPUTS, OUTPUTS
from jaxmerge.rules import RULES

LISTED = 4  # names in a message, before the count of the rest


@dataclasses.dataclass(frozen=True)
class Operand:
    """A source of a slice and its tensor of that name, None where the model has none."""

    entry: Entry
    name: str
    tensor: Tensor | None

    @property
    def stored(self) -> Tensor:
        """The tensor of an operand that has one."""
        assert self.tensor is not None
        return self.tensor


@dataclasses.dataclass(frozen=True)
class Draft:
    """A tensor of the result, at depth `t`, before its operands are checked. copied: the reference's, unmerged."""

    name: str
    t: float
    module: Module
    part: Slice
    operands: Sequence[Operand]
    copied: bool = False

    @property
    def first(self) -> Operand:
        """The operand that others are compared with, and whose tensor is copied where no rule applies."""
        wanted = self.part.sources[reference(self.part)]
        return next((o for o in self.operands if o.entry is wanted), self.operands[0])

    def roles(self, method: Method) -> tuple[list[Operand], Operand | None]:
        """Return the rule's inputs in order, and its base."""
        inputs, base = self.part.roles(method)
        by_entry = {id(o.entry): o for o in self.operands}
        found = [by_entry[id(entry)] for entry in inputs if id(entry) in by_entry]
        return found, None if base is None else by_entry.get(id(base))

    def labels(self) -> dict[int, str]:
        """Name each operand for its random masks: its model; of a model's second layer in one tensor `model#2`."""
        seen: dict[str, int] = {}
        labels = {}
        for o in self.operands:
            count = seen[o.entry.model] = seen.get(o.entry.model, 0) + 1
            labels[id(o)] = o.entry.model if count == 1 else f"{o.entry.model}#{count}"
        return labels


def reference(part: Slice) -> int:
    """Return which source decides what tensors there are: the base, else the first."""
    return next((i for i, entry in enumerate(part.sources) if entry.model == part.base), 0)


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """The first `rows` rows of a tensor."""

    tensor: Tensor
    rows: int

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.tensor.shape[1:])

    @property
    def size(self) -> int:
        return self.tensor.size // self.tensor.shape[0] * self.rows

    @property
    def where(self) -> str:
        return self.tensor.where

    @property
    def chunked(self) -> bool:
        return self.tensor.chunked

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        self.tensor.read_into(buffer, start)


def with_heads(sources: Mapping[str, Source], donor: str, notes: list[str], *, compat: str | None) -> dict[str, Source]:
    """Give models with a tied head the embedding as their head, where the result has a head of its own.

    The result has one if the donor of its config has; under compat="mergekit" if any model has.
    """
    found = dict(sources)
    for name, source in sources.items():
        pair = tied_pair(source)
        if pair is None:
            continue
        embedding, head = pair
        if head in sources[donor].tensors or (compat and any(head in other.tensors for other in sources.values())):
            found[name] = dataclasses.replace(source, tensors={**source.tensors, head: source.tensors[embedding]})
            notes.append(f"{name} ties its head to its embedding, which is merged as its head")
    return found


class Matching:
    """Collects what does not match, to be raised together or, where allowed, noted."""

    def __init__(self, allow: frozenset[str], compat: str | None, notes: list[str]):
        # mergekit leaves out in silence what its tables of architectures do not name.
        self.allow = allow | {"unused"} if compat else allow
        self.compat, self.notes = compat, notes
        self.lacks: dict[tuple[str, str], list[str]] = {}
        self.extra: dict[tuple[str, str], list[str]] = {}
        self.unlike: list[str] = []
        self.rows_differ: list[str] = []  # embeddings and heads of other vocabularies, among the unlike
        self.in_common: dict[tuple[str, str], int] = {}  # tensors of a model that are as the reference's
        self.copied: list[str] = []
        self.left_out: list[str] = []
        self.loose: dict[str, list[str]] = {}
        self.rows: int | None = None  # of an embedding that was cut

    def unclaimed(self, model: str, names: list[str]) -> None:
        """Take down the tensors of a model that no module claims."""
        if names:
            self.loose[model] = names

    def unused(self, part: Slice, names: Sequence[Sequence[str]], prefixes: Sequence[str] | None = None) -> None:
        """Take down what sources have and the reference lacks; in full, names begin with the prefixes."""
        first = reference(part)
        known = set(names[first])
        for entry, own, head in zip(part.sources, names, prefixes or [""] * len(names), strict=True):
            extra = [head + rest for rest in own if rest not in known]
            if extra:
                self.extra.setdefault((entry.model, part.sources[first].model), []).extend(extra)

    def matched(self, draft: Draft, method: Method) -> Draft | None:
        """Return the draft with operands that are all there and alike, or None if there is no such."""
        ref = draft.first.entry.model
        for o in draft.operands:
            if o.tensor is None:
                self.lacks.setdefault((o.entry.model, ref), []).append(o.name)
        present = [o for o in draft.operands if o.tensor is not None]
        for o in present:
            self.in_common[o.entry.model, ref] = self.in_common.get((o.entry.model, ref), 0) + (
                draft.first.tensor is not None and _is_like(o.stored, draft.first.stored)
            )
        if len(present) < len(draft.operands):
            if "missing" not in self.allow:
                return None
            thinned = self._thinned(dataclasses.replace(draft, operands=present), method)
            if thinned is None:
                return None
            draft = thinned
        return self._alike(draft)

    def _thinned(self, draft: Draft, method: Method) -> Draft | None:
        """Say what becomes of a tensor that some models lack."""
        inputs, base = draft.roles(method)
        needs = RULES[method.rule].needs
        enough = len(inputs) >= needs.least or (method.base_alone and not inputs)
        if enough and not (needs.base == "required" and base is None):
            return draft
        if needs.base == "required" and base is None:
            raise ValueError(f"tensor {draft.name!r}: the base lacks it, which the method takes deltas from")
        if self.compat and method.rule == "model_stock" and inputs:
            self.left_out.append(draft.name)
            return None
        self.copied.append(draft.name)
        return dataclasses.replace(draft, copied=True)

    def _alike(self, draft: Draft) -> Draft:
        """Compare shapes and kinds of dtype with the reference's."""
        first = draft.first
        unlike = False
        for o in draft.operands:
            if _is_like(o.stored, first.stored):
                continue
            unlike = True
            found, wanted = f"has shape {list(o.stored.shape)}", str(list(first.stored.shape))
            if _kind(o.stored) != _kind(first.stored):
                found, wanted = f"is {o.stored.dtype}", str(first.stored.dtype)
            said = f"tensor {o.name!r} of {o.entry.model!r} {found}, wanted {wanted} as in {first.entry.model!r}"
            self.unlike.append(said)
            if _other_rows(o.stored, first.stored) and draft.name.endswith((*INPUTS, *OUTPUTS)):
                self.rows_differ.append(said)
        if not unlike or "shapes" not in self.allow:
            return draft
        tails = {o.stored.shape[1:] for o in draft.operands if o.stored.shape}
        if self.compat and len(tails) == 1 and draft.name.endswith((*INPUTS, *OUTPUTS)):
            self.rows = min(o.stored.shape[0] for o in draft.operands)
            cut = [dataclasses.replace(o, tensor=FirstRows(o.stored, self.rows)) for o in draft.operands]
            return dataclasses.replace(draft, operands=cut)
        self.copied.append(draft.name)
        return dataclasses.replace(draft, copied=True)

    def check(self) -> None:
        """Raise for all that is not allowed, in one line; note the rest."""
        problems, flags = [], []
        refused: dict[tuple[str, str], list[str]] = {}
        for kind, found in (("missing", self.lacks), ("unused", self.extra)):
            for pair, names in found.items():
                what = f"lacks {listed(names)}" if kind == "missing" else f"has {listed(names, 'that it lacks ')}"
                if kind in self.allow:
                    end = "left out" if kind == "unused" else "merged from those that have them"
                    self.notes.append(f"{pair[0]}, beside {pair[1]}, {what}; {end}")
                else:
                    refused.setdefault(pair, []).append(what)
                    flags.append(kind)
        for (model, ref), whats in refused.items():
            problems.append(f"model {model!r} does not match {ref!r}: {' and '.join(whats)}")
            if any(is_head(name) for name in self.extra.get((model, ref), [])):
                problems.append(f"{ref!r} ties its head to its embedding, {model!r} does not")
        for model, loose in self.loose.items():
            what = f"{listed(loose)} of {model!r} are of no module of the recipe"
            if "unused" in self.allow:
                self.notes.append(f"{what}; left out")
            else:
                problems.append(f"{what}; add a module 'default' for the rest")
                flags.append("unused")
        if self.unlike and "shapes" not in self.allow:
            # The vocabulary first: it is why their rows differ, and it has a remedy of its own.
            ordered = list(dict.fromkeys([*self.rows_differ, *self.unlike]))
            more = len(ordered) - LISTED
            problems += [*ordered[:LISTED], *([f"and {more} tensors more are unlike"] if more > 0 else [])]
            flags.append("shapes")
        elif self.unlike:
            self.notes.append(f"{len(self.unlike)} tensors are unlike the reference's: {self.unlike[0]}")
        if problems:
            raise ValueError("; ".join([*self._vocabularies(), *problems, self._way_out(list(dict.fromkeys(flags)))]))
        if self.copied:
            self.notes.append(f"copied, not merged: {listed(self.copied)}")
        if self.left_out:
            self.notes.append(f"too few models have {listed(self.left_out)}; left out, as mergekit does")

    def _vocabularies(self) -> list[str]:
        """Name the vocabulary, where the rows of embeddings or heads differ and that is refused."""
        if not self.rows_differ or "shapes" in self.allow:
            return []
        return ["the vocabularies differ"]

    def _way_out(self, flags: Sequence[str]) -> str:
        """What to do about tensors that do not match: nothing may be allowed where a model has nothing in common."""
        for model, ref in (*self.in_common, *self.lacks):
            if not self.in_common.get((model, ref)):
                return f"no tensor of {model!r} is as in {ref!r}: merge models of one architecture"
        allow = f"allow it: allow={','.join(flags)}"
        if self._vocabularies():
            return f"give the result one vocabulary, tokenizer_source: union (or base) in the recipe, or {allow}"
        return f"merge models of one architecture, or {allow}"


def _is_like(one: Tensor, other: Tensor) -> bool:
    return _kind(one) == _kind(other) and one.shape == other.shape


def _other_rows(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ in how many rows they have, and in nothing else."""
    return one.shape[:1] != other.shape[:1] and one.shape[1:] == other.shape[1:] and _kind(one) == _kind(other)


def listed(names: Sequence[str], which: str = "") -> str:
    """Write names as `2 tensors (a, b)`, with a count where there are many."""
    names = list(dict.fromkeys(names))
    more = f", … {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {which or 'tensors '}({', '.join(names[:LISTED])}{more})"


def _kind(tensor: Tensor) -> bool:
    return bool(jnp.issubdtype(tensor.dtype, jnp.floating))
