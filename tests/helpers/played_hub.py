"""A server in this process that plays the Hugging Face hub: models and datasets, revisions, closed doors.

with played_hub(tmp_path / "cache") as hub:
    hub.add("datasets/org/name", {"data/train.jsonl": b"…"})
    …                                                   # what asks the hub asks this one
    hub.offline()                                       # from here on there is no network
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
from pyarrow import parquet

from helpers.served import Quiet, served


class PlayedHub:
    """What the server serves.

    Attributes:
      repos: `models/ORG/NAME` or `datasets/ORG/NAME` → revision → (commit, file → bytes); a commit is a revision too.
      closed: the same names → `gated` or `private`.
      asked: every request, as `METHOD path`.
      sent: (`ORG/NAME`, file) → bytes of its content that were sent.
    """

    def __init__(self):
        self.url = ""
        self.repos: dict[str, dict[str, tuple[str, Mapping[str, bytes]]]] = {}
        self.closed: dict[str, str] = {}
        self.asked: list[str] = []
        self.sent: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, name: str, files: Mapping[str, bytes | str], revision: str = "main") -> str:
        """Put files there as what `revision` now is; the commit. What it was before stays under its commit."""
        files = {".gitattributes": "", **files}  # every repository has it
        kept = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        total = hashlib.sha1(repr((name, sorted(kept.items()))).encode()).hexdigest()
        self.repos.setdefault(name, {})[revision] = self.repos[name][total] = (total, kept)
        return total

    def add_folder(self, name: str, folder: Path) -> str:
        """Put the files of a folder there."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.add(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def offline(self) -> None:
        """Take the network away, as HF_HUB_OFFLINE=1 does, and forget what this process has been told."""
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        forget()


def forget() -> None:
    from train.data import hub
    from train.tasks import code, local

    for remembered in (hub.dataset_of, code.read_mbpp, local.read):
        remembered.cache_clear()


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as a file of parquet, which has every key in every row."""
    buffer, keys = io.BytesIO(), dict.fromkeys(key for row in rows for key in row)
    parquet.write_table(pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows]), buffer)
    return buffer.getvalue()


def as_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@contextlib.contextmanager
def played_hub(cache: Path) -> Iterator[PlayedHub]:
    """Serve a hub to this process, with a cache of its own."""
    from huggingface_hub import constants

    playing = PlayedHub()
    with served(type("Playing", (Handler,), {"hub": playing})) as playing.url:
        template = playing.url + "/{repo_id}/resolve/{revision}/{filename}"
        places: dict[str, Any] = {
            "ENDPOINT": playing.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)
        }  # fmt: skip
        forget()
        try:
            with mock.patch.multiple(constants, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_PROGRESS_BARS=True, **places):
                yield playing
        finally:
            forget()


class Handler(Quiet):
    """The few addresses of the hub that its client asks for to download."""

    hub: PlayedHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = urllib.parse.urlsplit(self.path).path
        hub.asked.append(f"{self.command} {urllib.parse.unquote(path)}")
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        if api:
            parts = parts[1:]
        elif parts[0] != "datasets":
            parts = ["models", *parts]
        name, rest = "/".join(parts[:3]), [urllib.parse.unquote(part) for part in parts[3:]]
        repo = hub.repos.get(name)
        if hub.closed.get(name) == "private" or repo is None:
            return self.refuse(401, "RepoNotFound")
        if hub.closed.get(name) == "gated" and not (api and rest[:1] == ["revision"]):
            return self.refuse(403, "GatedRepo")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in repo:
            return self.refuse(404, "RevisionNotFound")
        commit, files = repo[revision]
        if api and rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": p, "size": len(d), "oid": digest(d)} for p, d in files.items()]
            return self.send(json.dumps(entries).encode(), commit)
        if api:
            about = {"id": "/".join(parts[1:3]), "sha": commit, "siblings": [{"rfilename": p} for p in files]}
            return self.send(json.dumps(about).encode(), commit)
        data = files.get("/".join(rest[2:]))
        if data is None:
            return self.refuse(404, "EntryNotFound", commit)
        head, status = {"ETag": f'"{digest(data)}"', "Accept-Ranges": "bytes"}, 200
        if part := self.headers.get("Range"):
            first, last = (int(number) for number in part.removeprefix("bytes=").split("-"))
            head["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command != "HEAD":
            hub.sent["/".join(parts[1:3]), "/".join(rest[2:])] += len(data)
        return self.send(data, commit, status, **head)

    def send(self, data: bytes, commit: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        told = {"Content-Length": str(len(data)), "X-Repo-Commit": commit, **headers}
        for key, value in told.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send(b"{}", commit, status, **{"X-Error-Code": code})


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
