"""A Hugging Face hub for tests: models are folders below one, served as the hub serves them, and what is sent is kept.

with fake_hub(tmp_path / "models") as hub:
    ...  # HF_ENDPOINT=hub.address
    hub.sent  # (model, file) → bytes of its content that were sent
"""

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    address: str
    sent: collections.Counter[tuple[str, str]]


@contextlib.contextmanager
def fake_hub(root: pathlib.Path) -> Iterator[Hub]:
    """Serve the models below `root`, `org/name` each, at their one commit."""
    sent: collections.Counter[tuple[str, str]] = collections.Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, *, with_body: bool):
            parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                self.describe("/".join(parts[2:4]), parts[4:5])
            else:
                self.content("/".join(parts[:2]), "/".join(parts[4:]), with_body)

        def describe(self, model: str, what: list[str]):
            folder = root / model
            if not folder.is_dir():
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            tree = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": etag(path)}
                for path in files
            ]
            said = tree if what == ["tree"] else {"id": model, "sha": COMMIT, "siblings": []}
            return self.reply(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

        def content(self, model: str, file: str, with_body: bool):
            path = root / model / file
            if not path.is_file():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            data, status = path.read_bytes(), 200
            head = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if asked := self.headers.get("Range"):
                first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                head["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, status = data[first : last + 1], 206
            if with_body:
                sent[model, file] += len(data)
            return self.reply(status, data, head, with_body)

        def reply(self, status: int, body: bytes, head: dict[str, str], with_body: bool = True):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | head).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_address[1]}", sent)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
