"""The forms in which a merge is written: a folder of safetensors, and what such a folder is turned into."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmerge import install
from jaxmerge.contract import nearest
from jaxmerge.files.card import HERE
from jaxmerge.files.checkpoints import fp8, orbax
from jaxmerge.files.documents import read_json

Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the result.

    name: in records, and all that decides the bytes besides the merge. write: turns a finished folder of safetensors
    into a new one, with shards of so many bytes; None leaves it as it is. layout: dtypes and shapes of what is stored
    of the merge's tensors. check: raises before anything is merged where the form is not for such a model, and returns
    notes; it is given a folder with config.json and the tokenizer. usage: how the result is loaded, where transformers
    does not load it.
    """

    name: str
    write: Callable[[pathlib.Path, pathlib.Path, int], None] | None = None
    layout: Callable[[Tensors, Mapping[str, Any]], Tensors] = lambda tensors, config: tensors
    check: Callable[[pathlib.Path, Tensors], list[str]] | None = None
    usage: str | None = None


def _check_fp8(folder: pathlib.Path, tensors: Tensors) -> list[str]:
    return fp8.check(tensors, read_json(folder / "config.json"))


FORMS = {
    "safetensors": Form("safetensors"),
    "orbax": Form(
        "orbax",
        lambda folder, out, max_shard_bytes: orbax.write(folder, out),
        usage=f"```sh\njaxmerge export {HERE} hf    # as a Hugging Face folder\n```",
    ),
    "fp8": Form("fp8", fp8.write, fp8.layout, _check_fp8),
}
GIVEN = {"gguf": "the decoder of the extra 'train' writes it"}
"""Forms that a caller brings: `jaxmerge merge` does where the extra is installed."""


def form_of(format: str | Form) -> Form:
    """Return a form by its name.

    Raises:
      ValueError: there is none of that name, or one that a caller has to bring.
    """
    if isinstance(format, Form):
        return format
    if format in GIVEN:
        raise ValueError(f"format={format!r}: {GIVEN[format]}: {install.extra('train')}, then `jaxmerge merge`")
    if format not in FORMS:
        raise ValueError(
            f"format={format!r}, wanted one of {', '.join((*FORMS, *GIVEN))}; {nearest(format, FORMS)}"
            "there is no int8: no format of it loads in transformers without another package"
        )
    return FORMS[format]
