"""A test double of a Hugging Face hub: what of its HTTP interface huggingface_hub's own client asks for when models are pushed and pulled.

It keeps every commit, takes every file in the commit itself ("regular"; the real hub has large ones sent apart), and fails when told to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_double"
GIT = {".gitattributes": b"*.safetensors filter=lfs\n"}


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    refuses: int | None = None
    """Answers everything with this status."""
    cuts: str = ""
    """Sends half of this file and hangs up."""
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        found = self.repositories[name] = Repository(private)
        found.commit("main", GIT | files)
        return found


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._begin()
        if path is None:
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if (at := self._at(found[1], found[2] or "main")) is not None:
                repository, sha = at
                siblings = [{"rfilename": name} for name in repository.commits[sha]]
                if "blobs=" in self.path:
                    siblings = [{"rfilename": name, "size": len(each)} for name, each in repository.commits[sha].items()]
                self._json({"id": found[1], "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (at := self._at(found[1], found[2])) is not None:
                self._file(*at, found[3])
        else:
            self._answer(404, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._begin()
        if path is None:
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path):
            repository = self.hub.repositories[found[1]]
            if found[2] == "branch":
                repository.branches.setdefault(found[3], repository.branches["main"])
                self._json({})
            elif found[2] == "preupload":
                asked = json.loads(body)["files"]
                self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
            else:
                self._commit(found[1], repository, found[3], body)
        else:
            self._answer(404, b"")

    def _begin(self) -> str | None:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.refuses is not None:
            self._answer(self.hub.refuses, b'{"error": "refused"}')
            return None
        return unquote(self.path.partition("?")[0])

    def _at(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif (sha := repository.at(revision)) is None:
            self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository, sha
        return None

    def _file(self, repository: Repository, sha: str, name: str) -> None:
        content = repository.commits[sha].get(name)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        cut = self.command == "GET" and name == self.hub.cuts
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        self._answer(200, content, headers, sent=content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name.startswith("others/"):
            self._answer(403, b'{"error": "You do not have the rights to create a model under this namespace"}')
        elif name in self.hub.repositories:
            self._answer(409, b'{"error": "You already created this model repo"}')
        else:
            self.hub.add(name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.files(branch))
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repository.branches[branch]):
                self._answer(412, b'{"error": "A commit has happened since. Please refresh and try again."}')
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None, *, sent: bytes | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)
