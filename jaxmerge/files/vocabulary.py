r"""One vocabulary for models whose tokenizers differ: embeddings and heads with their rows in one order.

Row t of model m is its own row of the token with id t in the result. Where m has no such token, or `force` says so,
it is the row that the recipe's `tokens` names (see `tokens.py`); else the base's, if the base has the token; else the
mean over the models that have it; else zero. These are mergekit's rules (its `tokenizer` and `tokenizer_source`), so
a merge sees the same operands. In a union the base's ids stay, and what it lacks follows in the order of the models
and of their ids.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from jaxmerge.files import rows, tokenizer
from jaxmerge.files.checkpoints.beside import companions_of, is_tokenizer
from jaxmerge.files.checkpoints.open import find, open_source
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.documents import parse_json
from jaxmerge.files.tokenizer import TEXT_CONFIGS, Tokenizer, added_token
from jaxmerge.files.tokens import Options, Row, parse

GENERATION = "generation_config.json"
# How embeddings and heads are called, from the end of the name; what else has a row a token is told by its rows.
INPUTS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight",
)  # fmt: skip
OUTPUTS = (
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "embeddings.weight", "shared.weight", "output.weight",
    "output_layer.weight", "lm_head.decoder.weight", "lm_head.linear.weight", "lm_head.linear.bias",
    "predictions.bias", "predictions.decoder.weight", "vocab_projector.weight", "vocab_projector.bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a result, and how each model's rows get into its order.

    size: rows of the result's embedding, padding included. tokenizer: of the result. tokenizers: of the models. own:
    for each model and id of the result, the model's row of that token, −1 without one. given: for each id that
    `tokens` names a source of, the model and row (None: zero). forced: ids whose rows are given to all. used: ids that
    are tokens. dtype: of the tensors; by default what all models' dtypes are promoted to.
    """

    size: int
    tokenizer: Tokenizer
    base: str | None
    models: Mapping[str, Source]
    tokenizers: Mapping[str, Tokenizer]
    own: Mapping[str, np.ndarray]
    given: Mapping[int, tuple[str, int] | None]
    forced: np.ndarray
    used: np.ndarray
    dtype: np.dtype | None = None
    notes: tuple[str, ...] = ()

    def apply(self, source: Source, among: Iterable[str] | None = None) -> Source:
        """Return a model with its embedding and head in this vocabulary, the tokenizer and config.json with them.

        Args:
          source: one of the models this was built of.
          among: the models whose rows may fill those that others lack; all by default.
        """
        if source.name not in self.own:
            raise ValueError(f"the vocabulary was built of {', '.join(self.own)}; {source.name!r} is none of them")
        names = vocabulary_tensors(source)
        models = list(self.own if among is None else among)
        tensors = {
            name: self._tensor(source, name, models) if name in names else stored
            for name, stored in source.tensors.items()
        }

        old = self.tokenizers.get(source.name, self.tokenizer)
        config, _ = tokenizer.renumbered(with_size(source.config, self.size), old, self.tokenizer)

        def companions() -> Mapping[str, bytes]:
            files = {name: data for name, data in source.companions().items() if not is_tokenizer(name)}
            if GENERATION in files:
                settings, _ = tokenizer.renumbered(
                    parse_json(files[GENERATION], f"{source.name}: {GENERATION}"), old, self.tokenizer
                )
                files[GENERATION] = json.dumps(settings, indent=2).encode()
            return {**files, **self.tokenizer.files}

        return dataclasses.replace(source, tensors=tensors, config=config, companions=companions)

    @property
    def digest(self) -> str:
        """Digest of all that says which rows of which models make the rows of the result."""
        said = [self.size, self.base, list(self.own), sorted(self.given.items())]
        found = xxhash.xxh3_128(json.dumps(said).encode())
        for numbers in (*self.own.values(), self.forced, self.used):
            found.update(np.ascontiguousarray(numbers).data)
        return found.hexdigest()

    def _tensor(self, source: Source, name: str, among: Sequence[str]):
        models = [model for model in among if name in self.models[model].tensors]
        stored = {model: self.models[model].tensors[name] for model in self.own if name in self.models[model].tensors}
        shape = source.tensors[name].shape
        for model, tensor in stored.items():
            if tensor.shape[1:] != shape[1:]:
                raise ValueError(
                    f"tensor {name!r} of {model!r} has rows of shape {list(tensor.shape[1:])}, wanted "
                    f"{list(shape[1:])} as in {source.name!r}; merge models of one architecture"
                )
        dtype = self.dtype or _widest({stored[model].dtype for model in (source.name, *models)})
        mine = self.own[source.name]
        kept = (mine >= 0) & ~self.forced
        taken = {model: np.where(kept, -1, donors) for model, donors in self._donors(name, models, stored).items()}
        taken[source.name] = np.where(kept, mine, taken.get(source.name, np.full(self.size, -1)))
        identity = shape[0] == self.size and np.array_equal(taken[source.name], np.arange(self.size))
        if identity and dtype == source.tensors[name].dtype:
            return source.tensors[name]
        parts = tuple((stored[model], numbers) for model, numbers in taken.items() if (numbers >= 0).any())
        return rows.Gathered(name, dtype, (self.size, *shape[1:]), parts, self.used)

    def _donors(self, name: str, models: Sequence[str], stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """For each model, the rows it gives to those that lack them; several models of a row give their mean."""
        donors = {model: self.own[model].copy() for model in models}
        if self.base in donors:
            has = donors[self.base] >= 0
            for model in donors:
                if model != self.base:
                    donors[model][has] = -1
        for number, given in self.given.items():
            for donor in donors.values():
                donor[number] = -1
            if given is not None:
                model, row = given
                if model not in stored:
                    raise ValueError(f"{name!r}: a token's row is to come from {model!r}, which lacks that tensor")
                donors.setdefault(model, np.full(self.size, -1))[number] = row
        return donors


def build(
    options: Options | Mapping[str, Any] | str,
    models: Mapping[str, Source],
    base: str | None,
    *,
    dtype: np.dtype | None = None,
) -> Vocabulary:
    """Work out the vocabulary of a result.

    Args:
      options: the recipe's `tokenizer` or `tokenizer_source`.
      models: every model by its name in the recipe, in its order; the base among them.
      base: base_model, whose tokenizer is extended; the first model stands in for it, but fills no rows then.
      dtype: of the embeddings; what the recipe casts inputs to, so that means are not rounded before.
    """
    options = options if isinstance(options, Options) else parse(options)
    first = next(iter(models)) if base is None else base
    notes: list[str] = []
    tokenizers, limits = _tokenizers(models, first, notes)
    result = _result(options, models, tokenizers, limits, first)
    result = result.adding(added_token(token) for token in options.tokens if token not in result.vocabulary)
    ids = result.vocabulary
    size = max(ids.values()) + 1
    if len(ids) != len(set(ids.values())):
        twice = Counter(ids.values()).most_common(1)[0][0]
        pair = " and ".join(repr(token) for token, i in ids.items() if i == twice)
        raise ValueError(f"{result.where}: tokens {pair} have one id, {twice}; save the tokenizer with transformers")
    multiple = options.pad_to_multiple_of or 1
    used = np.zeros(-(-size // multiple) * multiple, bool)
    used[list(ids.values())] = True
    own = {
        model: _rows(ids, tokenizers.get(model, tokenizers[first]).vocabulary, limits[model], used.size)
        for model in models
    }
    given = {
        ids[token]: _given(token, setting.source, models, tokenizers, own, ids[token])
        for token, setting in options.tokens.items()
        if setting.source is not None
    }
    forced = np.zeros(used.size, bool)
    forced[[ids[token] for token, setting in options.tokens.items() if setting.force]] = True
    notes += _padding_notes(models, tokenizers, limits, used.size)
    nowhere = [t for t, i in ids.items() if i not in given and all(numbers[i] < 0 for numbers in own.values())]
    if nowhere:
        notes.append(f"{len(nowhere)} tokens are in no model, first {nowhere[0]!r}; their rows are zero")
    _, more = tokenizer.renumbered(models[first].config, tokenizers[first], result)
    notes += more
    return Vocabulary(used.size, result, base, models, tokenizers, own, given, forced, used, dtype, tuple(notes))


def _padding_notes(
    models: Mapping[str, Source], tokenizers: Mapping[str, Tokenizer], limits: Mapping[str, int], size: int
) -> list[str]:
    """Say which models have rows that belong to no token, where the result has fewer than they."""
    notes = []
    for name in models:
        spare = limits[name] - 1 - max(tokenizers[name].vocabulary.values(), default=-1) if name in tokenizers else 0
        if spare > 0 and size < limits[name]:
            notes.append(
                f"{name}: the last {spare} of {limits[name]} rows of its embedding belong to no token and are left "
                f"out; the result has {size} (pad_to_multiple_of in 'tokenizer' adds rows)"
            )
    return notes


def _tokenizers(
    models: Mapping[str, Source], first: str, notes: list[str]
) -> tuple[dict[str, Tokenizer], dict[str, int]]:
    """The tokenizers there are, the base's without tokens beyond its embedding; and each model's count of rows."""
    found = {name: tokenizer.from_files(source.companions(), name) for name, source in models.items()}
    for name in [name for name, own in found.items() if own is None and name != first]:
        notes.append(f"{name} has no tokenizer.json; its rows are taken to be those of {first}")
    tokenizers = {name: own for name, own in found.items() if own is not None}
    if first not in tokenizers:
        raise ValueError(
            f"model {first!r} has no tokenizer.json, which the vocabulary starts from; save its tokenizer there with "
            "transformers, or leave 'tokenizer' out"
        )
    limits = {}
    for name, source in models.items():
        names = vocabulary_tensors(source)
        limits[name] = min(source.tensors[tensor].shape[0] for tensor in names)
    beyond = {token for token, i in tokenizers[first].vocabulary.items() if i >= limits[first]}
    if beyond:
        notes.append(f"{first}: {len(beyond)} tokens have no row in its embedding; left out")
        tokenizers[first] = tokenizers[first].without(beyond)
    return tokenizers, limits


def _result(
    options: Options, models: Mapping[str, Source], tokenizers: Mapping[str, Tokenizer], limits: Mapping[str, int],
    first: str,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of the result, before what `tokens` adds."""
    if options.source == "base":
        return tokenizers[first]
    if options.source != "union":
        given = models[options.source].companions() if options.source in models else companions_at(options.source)
        found = tokenizer.from_files(given, options.source)
        if found is None:
            raise ValueError(f"tokenizer source {options.source!r} has no tokenizer.json; save its tokenizer there")
        return found
    plain: dict[str, Mapping[str, Any]] = {}
    special: dict[str, Mapping[str, Any]] = {}
    for name in (first, *(name for name in tokenizers if name != first)):
        of = tokenizers[name]
        known = [token for token, i in of.vocabulary.items() if i < limits[name]]
        plain |= {token: added_token(token) for token in known if token not in of.added and token not in plain}
        special |= {token: of.added[token] for token in known if token in of.added and token not in special}
    has = tokenizers[first].vocabulary
    fresh = [entry for token, entry in plain.items() if token not in has and token not in special]
    return tokenizers[first].adding([*fresh, *special.values()])


def companions_at(source: str) -> Mapping[str, bytes]:
    """Read the companions of a tokenizer's source that is none of the models: a folder of a tokenizer, or a model."""
    path = find(source, weights=False)
    if path is not None and (path / "tokenizer.json").exists():
        return companions_of(path)
    return open_source(source).companions()


def _rows(ids: Mapping[str, int], has: Mapping[str, int], limit: int, size: int) -> np.ndarray:
    """The row of each id's token in a model, −1 where it has none; a token beyond the embedding has none."""
    found = np.full(size, -1)
    for token, i in ids.items():
        row = has.get(token, -1)
        found[i] = row if row < limit else -1
    return found


def _given(
    token: str, source: Row, models: Mapping[str, Source], tokenizers: Mapping[str, Tokenizer],
    own: Mapping[str, np.ndarray], number: int,
) -> tuple[str, int] | None:  # fmt: skip
    """Model and row of the source of a token; None for zero."""
    if source.model is None:
        return None
    if source.model not in models:
        raise ValueError(
            f"token {token!r} takes its row from {source.model!r}, which is none of the models {', '.join(models)}"
        )
    row = source.token_id
    if source.token is not None:
        row = tokenizers[source.model].vocabulary.get(source.token) if source.model in tokenizers else None
    elif row is None:
        row = int(own[source.model][number])
    limit = min(models[source.model].tensors[name].shape[0] for name in vocabulary_tensors(models[source.model]))
    if row is None or not 0 <= row < limit:
        what = source.token or source.token_id or token
        raise ValueError(
            f"token {token!r} takes its row from {what!r} of {source.model!r}, which has no such row among {limit}"
        )
    return source.model, row


def vocabulary_tensors(source: Source) -> list[str]:
    """Names of the tensors with a row a token: embedding, head and their like.

    Raises:
      ValueError: there is none, or the embedding has other rows than config.json says.
    """
    found = [name for name in source.tensors if _ends(name, INPUTS)]
    size = source.config.get("vocab_size", _text_config(source.config)[1].get("vocab_size"))
    counts = {name: source.tensors[name].shape[0] for name in found}
    size = next(iter(counts.values()), None) if size is None else size
    for name, count in counts.items():
        if count != size:
            raise ValueError(f"{source.name}: {name!r} has {count} rows, but config.json says vocab_size {size}")
    for name, tensor in source.tensors.items():
        if _ends(name, OUTPUTS) and tensor.shape[:1] == (size,):
            found.append(name)
    if not found:
        raise ValueError(
            f"{source.name}: found no embedding, which 'tokenizer' works on; looked for names that end in "
            f"{', '.join(INPUTS)}"
        )
    return found


def with_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return config.json with another vocab_size, where it stands."""
    key, nested = _text_config(config)
    if "vocab_size" not in config and key:
        # Also where it is left out: a reader that finds none takes its own default.
        return {**config, key: {**nested, "vocab_size": size}}
    changed = {**config, "vocab_size": size} if config else {}
    return {**changed, key: {**nested, "vocab_size": size}} if "vocab_size" in nested else changed


def _text_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key under which a model of several parts describes its language model, and what is there; else nothing."""
    found = next((key for key in TEXT_CONFIGS if isinstance(config.get(key), Mapping)), "")
    return found, config.get(found, {})


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def _widest(dtypes: set[np.dtype]) -> np.dtype:
    """What holds the values of all: the dtype itself where it is one, else float32 or float64."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if max(dtype.itemsize for dtype in dtypes) > 4 else np.float32)
