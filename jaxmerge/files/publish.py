"""Folders put on the Hugging Face hub: one commit with weights, tokenizer and card, by the hub's own client."""

from __future__ import annotations

import pathlib
from typing import Any, cast

from jaxmerge import install
from jaxmerge.files.card import HERE
from jaxmerge.files.checkpoints.hub import connection_error, is_hub_name
from jaxmerge.files.model_card import FILE

STALE = (".safetensors", ".safetensors.index.json")
"""Files of an older push with which weights of this one would be mixed."""
TOKENS = "https://huggingface.co/settings/tokens"


def check(name: str) -> None:
    """Raise unless something could be pushed to `name`: asked before the work it is for, without the network.

    Raises:
      ValueError: it is no `org/name`, or there is no token.
    """
    if not is_hub_name(name) or "@" in name:
        raise ValueError(f"push={name!r}: expected ORG/NAME, the name of a model of the hub without a revision")
    _client(name)


def push(folder: pathlib.Path, name: str, *, private: bool = False) -> str:
    """Put all files of a folder on the hub in one commit; the repository is made if there is none.

    What was sent by an attempt that failed is not sent again. Weights of an older commit that this folder does not
    have are deleted; any other file stays.

    Args:
      folder: with a model card, in which the folder is called by its hub name once it is there.
      name: `org/name`.
      private: of a repository that is made; one that is there stays as it is.

    Returns:
      The address of the commit.

    Raises:
      ValueError: the token is missing or wrong, may not write there, or the hub cannot be reached.
    """
    check(name)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"{folder}: no such folder with a model; nothing to push to {name}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    here = {path.relative_to(folder).as_posix(): path for path in files}
    api = _client(name)
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        weights = any(path.endswith(STALE) for path in here)
        there = api.list_repo_files(name) if weights else []
        stale = [path for path in there if path.endswith(STALE) and path not in here]
        operations: list[Any] = [CommitOperationDelete(path) for path in stale]
        for path, file in here.items():
            content = card(folder, name) if path == FILE else str(file)
            operations.append(CommitOperationAdd(path, content))
        return str(api.create_commit(name, operations, commit_message="Upload by jaxmerge").commit_url)
    except (OSError, RuntimeError, ValueError, connection_error(errors)) as error:
        raise ValueError(f"{folder} could not be pushed to {name}: {_reason(error, name)}") from error


def card(folder: pathlib.Path, name: str) -> bytes:
    """The model card of a folder, which calls the model by its hub name."""
    text = (folder / FILE).read_text(encoding="utf-8")
    return text.replace(HERE, name).replace(f'from_pretrained("{folder.name}"', f'from_pretrained("{name}"').encode()


def _client(name: str) -> Any:
    """The hub's client with the token of the environment, or of `hf auth login`."""
    try:
        from huggingface_hub import HfApi, constants, get_token
    except ImportError:
        raise ValueError(
            f"push={name}: huggingface_hub is not installed, which talks to the hub; {install.extra('files')}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push={name}: HF_HUB_OFFLINE is set, which keeps the hub's client from the network; unset it")
    token = get_token()
    if token is None:
        raise ValueError(f"push={name}: no token of the hub; set HF_TOKEN, or log in: hf auth login ({TOKENS})")
    return HfApi(token=token)


def _reason(error: Exception, name: str) -> str:
    """Say in one line why the hub refused, and the way out."""
    causes: list[BaseException] = [error]
    while (below := causes[-1].__cause__) is not None:
        causes.append(below)
    said = ": ".join(" ".join(str(cause).split())[:160] for cause in causes[:2])
    cause = next((cause for cause in causes if getattr(cause, "response", None) is not None), None)
    if cause is None:
        return f"{said}; try again when the hub can be reached, what was sent is not sent twice"
    code = cast(Any, cause).response.status_code
    return {
        401: f"the hub does not know this token (401); make one with the right to write at {TOKENS}",
        403: f"this token may not write there (403): {name.partition('/')[0]!r} is of others, or the token can only "
        f"read; name an account or organisation of yours, or make a token at {TOKENS}",
        404: f"the hub has no {name} that this token may see (404); the name may be of others",
    }.get(code, said)
