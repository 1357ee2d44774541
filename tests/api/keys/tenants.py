"""A file of keys for tests, and requests in the name of each of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.api.keys.key import digest_of
from server.api.keys.key_file import hash_text
from tests.api.adapter_files import AdapterFiles
from tests.api.conftest import Live

ALL = ("infer", "adapters")


def entry(name: str, scopes: Sequence[str] = ALL, **fields: Any) -> dict[str, Any]:
    """A key whose secret is `secret-of-NAME`."""
    return {"name": name, "hash": hash_text(digest_of(secret_of(name))), "scopes": [*scopes], **fields}


def secret_of(name: str) -> str:
    return f"secret-of-{name}"


def write_keys(path: Path, *entries: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Tenant:
    """What one key of a live server may do and see."""

    live: Live
    name: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {secret_of(self.name)}"}

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        headers = self.headers | options.pop("headers", {})
        if body is not None:
            headers["content-type"] = "application/json"
            options["content"] = json.dumps(body)
        return self.live.http.request(method, path, headers=headers, **options)

    def upload(self, name: str, files: AdapterFiles, **query: str) -> httpx.Response:
        return self.ask("POST", "/v1/adapters", data={"name": name}, files=files.parts(), params=query)

    def complete(self, **body: Any) -> httpx.Response:
        return self.ask("POST", "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4, **body})

    def models(self) -> list[str]:
        return [card["id"] for card in self.ask("GET", "/v1/models").json()["data"]]

    def adapters(self) -> list[str]:
        return [card["name"] for card in self.ask("GET", "/v1/adapters").json()["data"]]
