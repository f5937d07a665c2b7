"""A hub on this machine: what huggingface_hub asks for, answered in the shape of the real one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder` as acme/open and acme/gated (the files of the latter are refused); anything else is not found."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if found := re.fullmatch(r"/api/models/acme/(open|gated)/revision/(.+)", path):
            if found[2] not in ("main", COMMIT):
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            siblings = [{"rfilename": p.name} for p in sorted(self.server.folder.iterdir())]
            return self._json({"id": f"acme/{found[1]}", "sha": COMMIT, "siblings": siblings})
        if re.fullmatch(rf"/api/models/acme/(open|gated)/tree/{COMMIT}", path):
            return self._json(
                [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": self._etag(p)}
                    for p in sorted(self.server.folder.iterdir())
                ]
            )
        if found := re.fullmatch(rf"/acme/(open|gated)/resolve/{COMMIT}/([^/]+)", path):
            if found[1] == "gated":
                return self._error(403, "GatedRepo", "Access to model acme/gated is restricted")
            return self._file(self.server.folder / found[2])
        if path == "/api/models/acme/missing/revision/main":
            return self._error(404, "RepoNotFound", "Repository not found")
        if path == "/api/models/acme/broken/revision/main":
            return self._error(500, None, "Internal error")
        # Without a login the real hub does not say whether a repository is private or not there.
        return self._error(401, "RepoNotFound", "Invalid username or password.")

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _etag(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, headers, b"")

    def _file(self, path: Path) -> None:
        if self.command == "GET":
            self.server.fetched.append(path.name)
        self._send(200, {"ETag": f'"{self._etag(path)}"', "X-Repo-Commit": COMMIT}, path.read_bytes())


@contextlib.contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    """A running `Hub` for the files in `folder`."""
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
