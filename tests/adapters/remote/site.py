"""A web server on a free port that serves what a test puts there, as slowly and as badly as the test wants.

It is also a hub: the two endpoints of one that a fetch from hf:// asks.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from tests.api.adapter_files import AdapterFiles


@dataclass
class Page:
    """What is answered at one path."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Event | None = None  # waited for when half of the content is out
    announced: int | None = -1  # bytes in Content-Length; -1: as many as there are; None: not announced


@dataclass
class Repository:
    """A model repository: its branches, and the files of each commit. `name` is the one that it has now."""

    name: str
    branches: dict[str, str]
    commits: dict[str, dict[str, bytes]]


class Site:
    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                site.answer(self)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, folder: str, files: AdapterFiles, gate: threading.Event | None = None, **others: bytes) -> str:
        """Serves an adapter in a folder, its weights behind a gate; the source to fetch it from."""
        self.pages[f"/{folder}/adapter_config.json"] = Page(files.config)
        self.pages[f"/{folder}/adapter_model.safetensors"] = Page(files.weights, headers={"ETag": '"w1"'}, gate=gate)
        for name, content in others.items():
            self.pages[f"/{folder}/{name}.json"] = Page(content)
        return f"{self.url}/{folder}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        page = self.pages.get(request.path) or self._of_hub(request.path) or Page(status=404)
        request.send_response(page.status)
        for name, value in page.headers.items():
            request.send_header(name, value)
        announced = len(page.content) if page.announced == -1 else page.announced
        if announced is not None:
            request.send_header("Content-Length", str(announced))
        request.end_headers()
        half = len(page.content) // 2
        try:
            request.wfile.write(page.content[:half])
            if page.gate is not None:
                page.gate.wait(120)
            request.wfile.write(page.content[half:])
        except OSError:  # who asked has left
            request.close_connection = True

    def _of_hub(self, path: str) -> Page | None:
        if (found := re.match(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^?]+))?(?:\?.*)?$", path)) is not None:
            return self._info(found[1], unquote(found[2] or "main"))
        if (found := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)) is not None:
            repository = next((r for r in self.repositories.values() if r.name == found[1]), None)
            files = repository.commits.get(found[2], {}) if repository else {}
            return Page(files[found[3]]) if found[3] in files else None
        return None

    def _info(self, name: str, revision: str) -> Page:
        repository = self.repositories.get(name)
        if repository is None:
            return Page(status=401, headers={"X-Error-Code": "RepoNotFound"})
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return Page(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path, "size": len(content)} for path, content in repository.commits[commit].items()]
        info = {"_id": "1", "id": repository.name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        return Page(json.dumps(info).encode(), headers={"Content-Type": "application/json"})

    def __enter__(self) -> "Site":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        for page in self.pages.values():
            if page.gate is not None:
                page.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def opened(gate: threading.Event) -> Iterator[threading.Event]:
    """A gate that does not outlive its test closed."""
    try:
        yield gate
    finally:
        gate.set()
