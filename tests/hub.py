"""A small Hugging Face Hub over HTTP, and GitHub's raw files beside it, for tests without network.

It speaks what huggingface_hub asks for: what a repository holds, its files, creating one, commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_writer"


@dataclass
class Repository:
    """Commits in order; each holds all files of the repository at that time."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    gated: bool = False

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit's id and files; `main` is the last."""
        ids = [hashlib.sha1(f"commit {n}".encode()).hexdigest() for n in range(len(self.commits))]
        if revision == "main":
            return ids[-1], self.commits[-1]
        return next(
            ((key, files) for key, files in zip(ids, self.commits, strict=True) if key == revision),
            None,
        )


@dataclass
class Hub:
    """The stand-in: its address, what it holds, and what was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)  # by path
    asked: list[str] = field(default_factory=list)
    status: int | None = None  # what every request gets instead of its answer

    def add(self, name: str, gated: bool = False, **files: bytes) -> Repository:
        """A repository with one commit; `__` in a file's name is a dot, `___` a slash."""
        held = {n.replace("___", "/").replace("__", "."): data for n, data in files.items()}
        self.repositories[name] = Repository([held], gated)
        return self.repositories[name]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve on 127.0.0.1 until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.state.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if self.path == "/api/validate-yaml":  # of a card's header
            return self._json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            self.state.repositories.setdefault(name, Repository())
            return self._json({"url": f"{self.state.url}/{name}"})
        name, _, rest = self.path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            files = json.loads(data)["files"]
            return self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        name, _, rest = self.path.removeprefix("/api/models/").partition("/commit/")
        if rest:
            return self._commit(name, data)
        return self._json({"error": "no such endpoint"}, 404)

    def _commit(self, name: str, data: bytes) -> None:
        held = self.state.repositories[name]
        files = dict(held.commits[-1])
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        held.commits.append(files)
        commit, _ = held.at("main") or ("", {})
        self._json({"commitOid": commit, "commitUrl": f"{self.state.url}/{name}/commit/{commit}"})

    def _get(self) -> None:
        self.state.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if self.state.status is not None:
            return self._send(self.state.status, b"", {})
        if path in self.state.raw:
            return self._send(200, self.state.raw[path], {})
        if path.startswith("/api/models/"):
            org, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._info(f"{org}/{name}", rest[1] if rest else "main")
        org, name, kind, *rest = [*path.lstrip("/").split("/"), "", "", ""][: path.count("/") + 3]
        rest = [part for part in rest if part]
        if kind == "resolve" and len(rest) > 1:
            return self._file(f"{org}/{name}", rest[0], "/".join(rest[1:]))
        return self._send(404, b"", {})

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        held = self.state.repositories.get(name)
        if held is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        found = held.at(revision)
        if found is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return found

    def _info(self, name: str, revision: str) -> None:
        found = self._found(name, revision)
        if found is not None:
            commit, files = found
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return None
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if self.state.repositories[name].gated and "Authorization" not in self.headers:
            return self._send(403, b"{}", {**headers, "X-Error-Code": "GatedRepo"})
        if path not in files:
            return self._send(404, b"{}", {**headers, "X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self._send(200, files[path], {**headers, "ETag": etag})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
