"""Models of the Hugging Face hub by name: downloaded once, then read from the cache of the hub's own client.

Of a model that is only to be described (a dry run), what lies beside the weights is downloaded, and of the weights the
headers alone are fetched.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any, cast

from jaxmerge import install
from jaxmerge.files.checkpoints import shards
from jaxmerge.files.checkpoints.beside import CODE, COMPANIONS
from jaxmerge.files.checkpoints.safetensors import INDEX, SINGLE, Stored, entries_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
WEIGHTS = "*.safetensors"
# What stands beside weights (configs and modules among the *.json), and what a model card takes the licence from.
BESIDE = ("*.json", "*.jinja", CODE, *COMPANIONS, "README.md")
# Mistral's own form of the same weights, and copies for other programs.
UNWANTED = ("consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "coreml/*")
ASKED_AT_ONCE = 8  # headers


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form org/name or org/name@revision, and no GGUF file's."""
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(".gguf")


def fetch(name: str, *, weights: bool = True) -> pathlib.Path:
    """Return the folder of `org/name` or `org/name@revision`: downloaded with a bar, or as it lies in the cache.

    The client asks the hub whether its copy is the newest; where the hub cannot be reached, what is in the cache is
    taken. Without `weights`, what lies beside them is downloaded alone.

    Raises:
      ValueError: it is neither there nor in the cache, or may not be read; says what the client said.
    """
    with _asked(name):
        from huggingface_hub import snapshot_download

        model, _, revision = name.partition("@")
        wanted, unwanted = ((WEIGHTS, *BESIDE), UNWANTED) if weights else (BESIDE, (WEIGHTS, *UNWANTED))
        found = snapshot_download(
            model, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
        )
    return pathlib.Path(found)


def describe(name: str, single: str = SINGLE) -> tuple[pathlib.Path, shards.Weights | None]:
    """Return the folder of a hub's model without its weights, and the headers of these; None if they are in the folder.

    Args:
      name: `org/name` or `org/name@revision`.
      single: the file that has all weights where no index says otherwise; an adapter's is called otherwise.

    Raises:
      ValueError: as `fetch`.
    """
    folder = fetch(name, weights=False)
    here = shards.weights_in(folder)
    index = folder / INDEX
    named = sorted(set(shards.read_index(index).values())) if single == SINGLE and index.exists() else []
    if here.has(single) or (named and all(map(here.has, named))):
        return folder, None
    with _asked(name):
        from huggingface_hub import HfApi

        client, model = HfApi(), name.partition("@")[0]
        commit = folder.name  # so that all that is asked is of one state

        def header(file: str) -> dict[str, Stored] | None:
            if not client.file_exists(model, file, revision=commit):
                return None
            said = client.parse_safetensors_file_metadata(model, file, revision=commit).tensors
            entries = {
                tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
                for tensor, info in said.items()
            }
            # Where the data begin is not said; nothing is read from there.
            return {tensor.name: tensor for tensor in entries_of(folder / file, entries, None, 0)[0]}

        headers = {single: header(single)}
        if headers[single] is None:
            with concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
                headers |= dict(zip(named, pool.map(header, named), strict=True))
    found = {file: tensors for file, tensors in headers.items() if tensors is not None}
    return folder, shards.Weights(found.__contains__, found.__getitem__)


def connection_error(errors: Any) -> type[Exception]:
    """Return the error of the library that the client asks with, which was another one in each major version.

    Args:
      errors: the module `huggingface_hub.errors`.
    """
    return cast(type[Exception], errors.HfHubHTTPError.__mro__[1])


@contextlib.contextmanager
def _asked(name: str) -> Iterator[None]:
    """What the hub's client raises, in one line that says what the client said."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(
            f"{name}: no such folder here, and huggingface_hub is not installed, which downloads models; "
            f"{install.extra('files')}"
        ) from None
    try:
        yield
    except (OSError, connection_error(errors), errors.HFValidationError, errors.SafetensorsParsingError) as error:
        reason = " ".join(str(error).split())[:200]
        gated = "; log in first: hf auth login" if isinstance(error, errors.GatedRepoError) else ""
        raise ValueError(
            f"{name}: no such folder here, and it could not be fetched from the hub ({reason}){gated}; give the path "
            "of a model that is here, or download it where there is a network (`hf download`)"
        ) from error
