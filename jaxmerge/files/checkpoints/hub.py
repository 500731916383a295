"""Models of the Hugging Face hub by name: downloaded once, then read from the cache of the hub's own client."""

from __future__ import annotations

import pathlib
import re
from typing import cast

from jaxmerge import install
from jaxmerge.files.checkpoints.beside import CODE, COMPANIONS

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Weights, what stands beside them (configs and modules among the *.json), and what a model card takes the licence from.
WANTED = ("*.safetensors", "*.json", "*.jinja", CODE, *COMPANIONS, "README.md")
# Mistral's own form of the same weights, and copies for other programs.
UNWANTED = ("consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "coreml/*")


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form org/name or org/name@revision, and no GGUF file's."""
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(".gguf")


def fetch(name: str) -> pathlib.Path:
    """Return the folder of `org/name` or `org/name@revision`: downloaded with a bar, or as it lies in the cache.

    The client asks the hub whether its copy is the newest; where the hub cannot be reached, what is in the cache is
    taken.

    Raises:
      ValueError: it is neither there nor in the cache, or may not be read; says what the client said.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ValueError(
            f"{name}: no such folder here, and huggingface_hub is not installed, which downloads models; "
            f"{install.extra('files')}"
        ) from None
    model, _, revision = name.partition("@")
    # The error of the library that the client asks with, which was another one in each of its major versions.
    connection = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    try:
        found = snapshot_download(
            model, revision=revision or None, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except (OSError, connection, errors.HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        gated = "; log in first: hf auth login" if isinstance(error, errors.GatedRepoError) else ""
        raise ValueError(
            f"{name}: no such folder here, and it could not be fetched from the hub ({reason}){gated}; give the path "
            "of a model that is here, or download it where there is a network (`hf download`)"
        ) from error
    return pathlib.Path(found)
