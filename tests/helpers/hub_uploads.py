"""The Hugging Face hub, played by a server of this process: what its own client asks of it to make and fill a model.

Models are made, files are sent by git or by LFS, commits are kept; tokens and names have owners, as on the hub.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from helpers.served import Quiet, served

SMALL = 10  # bytes above which a file goes by LFS, whatever its name


@dataclasses.dataclass
class Repository:
    """One model: whether it is private, its files at the newest commit, and what each commit said."""

    private: bool
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    commits: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Hub:
    """tokens: token → the names it may write to. stored: objects sent by LFS. broken: LFS uploads fail."""

    tokens: dict[str, tuple[str, ...]]
    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    stored: dict[str, bytes] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)
    broken: bool = False
    url: str = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON of a request."""
        self.asked.append(f"{method} {path}")
        if method == "PUT":
            return self._store(path, body)
        if token not in self.tokens:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?/(.*)", path)
        name, rest = (found[1], found[2]) if found else ("", "")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if rest.startswith("tree/"):
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in self._of(name).items()]
        if name.partition("/")[0] not in self.tokens[token]:
            return 403, {"error": "Forbidden: you must have write access"}
        if rest.startswith("preupload/"):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self._mode(f), "shouldIgnore": False} for f in files]
            return 200, {"files": modes}
        if rest == "info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]}
        if rest.startswith("commit/"):
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"the played hub has no {path}"}

    def _of(self, name: str) -> dict[str, bytes]:
        return self.repositories[name].files

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        if asked["organization"] not in self.tokens[token]:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}", "name": name}

    @staticmethod
    def _mode(file: dict[str, Any]) -> str:
        return "lfs" if file["path"].endswith((".safetensors", ".gguf")) and file["size"] > SMALL else "regular"

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        there = {"oid": asked["oid"], "size": asked["size"]}
        upload = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}}
        return there if asked["oid"] in self.stored else {**there, "actions": upload}

    def _store(self, path: str, body: bytes) -> tuple[int, Any]:
        oid = path.rpartition("/")[2]
        if self.broken:
            return 400, {"error": "the store is closed today"}
        if hashlib.sha256(body).hexdigest() != oid:
            return 422, {"error": "another content than was announced"}
        self.stored[oid] = body
        return 200, {}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(lines)
        oid = f"{len(repository.commits):040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


@contextlib.contextmanager
def receiving_hub(**tokens: tuple[str, ...]) -> Iterator[Hub]:
    """A hub at a port of this machine; tokens: token → the names it may write to."""
    hub = Hub(tokens)

    class Handler(Quiet):
        def _any(self) -> None:
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, answer = hub.answer(self.command, self.path.partition("?")[0], token, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = _any

    with served(Handler) as hub.url:
        yield hub
