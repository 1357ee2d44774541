"""The OpenAPI document: committed as it is served, and true of what the server answers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from server.api.keys.scopes import OPEN_PATHS
from server.api.openapi import _STATUS_WORDS
from server.api.schemas import ChatBody, CompletionBody
from server.ground.config import Settings
from tests.api import openapi_file
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, event_data, eventually, serving

HERE = Path(__file__).parent
# An adapter may be called "merge" or "fetch", so that two routes may take a path; test_paths.py has the header.
LEFT_OUT = "allow_header_conformance"
COMMAND = "python -m tests.api.openapi_file"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "Hi"}]
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}


@pytest.fixture(scope="module")
def document(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = live.http.get("/openapi.json").json()
    return found


def answer_of(document: dict[str, Any], method: str, template: str, answer: httpx.Response) -> dict[str, Any]:
    """What the document says of this answer, having checked that it says something."""
    operation = document["paths"][template][method.lower()]
    assert str(answer.status_code) in operation["responses"], f"{method} {template} answered {answer.status_code}"
    described: dict[str, Any] = operation["responses"][str(answer.status_code)]
    return described


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def check_answer(document: dict[str, Any], method: str, template: str, answer: httpx.Response) -> None:
    described = answer_of(document, method, template, answer)
    kind = answer.headers["content-type"].partition(";")[0]
    media = described["content"][kind]
    optional = {"x-ignored-fields"}
    assert described["headers"].keys() - optional <= answer.headers.keys()
    if kind == "text/event-stream":
        *events, last = event_data(answer)
        assert last == "[DONE]"
        for event in events:
            check(document, media["x-event-schema"], json.loads(event))
    else:
        check(document, media["schema"], answer.json() if kind == "application/json" else answer.text)


def test_it_is_committed(document: dict[str, Any]) -> None:
    assert openapi_file.FILE.read_text(encoding="utf-8") == openapi_file.text(document), f"write it anew: {COMMAND}"


def test_it_is_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_it_says_what_a_route_is_for_and_whether_it_needs_the_key(document: dict[str, Any]) -> None:
    summaries = [operation["summary"] for operations in document["paths"].values() for operation in operations.values()]
    assert all(re.fullmatch(r"[A-Z].*[^.]", summary) for summary in summaries)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path in OPEN_PATHS else [{"key": []}, {}])
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)


def test_it_says_with_which_statuses_clients_are_told_whether_to_come_again(document: dict[str, Any]) -> None:
    answers = [
        (int(status), answer["headers"])
        for operations in document["paths"].values()
        for operation in operations.values()
        for status, answer in operation["responses"].items()
    ]
    assert {status for status, headers in answers if "x-should-retry" in headers} == {409, 412, 429, 503, 504, 507}
    assert {status for status, _ in answers if status >= 400} == set(_STATUS_WORDS)


def test_nothing_is_said_that_no_route_answers(document: dict[str, Any]) -> None:
    """FastAPI's own 422 above all: it is a 400 here."""
    text = json.dumps(document)
    assert '"422"' not in text
    assert "HTTPValidationError" not in text
    for name in document["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text


@pytest.mark.parametrize(("name", "model"), [("CompletionBody", CompletionBody), ("ChatBody", ChatBody)])
def test_every_field_is_in_it_and_may_be_null(document: dict[str, Any], name: str, model: Any) -> None:
    body = document["components"]["schemas"][name]
    assert model.model_fields.keys() <= body["properties"].keys()
    assert body["additionalProperties"] is False
    required = {"prompt"} if model is CompletionBody else {"messages"}
    assert set(body["required"]) == required
    for field, schema in body["properties"].items():
        if field not in required:
            check(document, schema, None)


GENERATIONS = [
    ("/v1/completions", {**TEXT, "logprobs": 2, "echo": True, "n": 2, "adapter": "first"}),
    ("/v1/completions", {**TEXT, "prompt": ["Hi", "Ho"], "return_token_ids": True, "max_tokens": 0, "echo": True}),
    ("/v1/completions", {**TEXT, "adapter": [{"name": "first", "weight": 0.5}, "second"]}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2, "model": "first"}),
    ("/v1/chat/completions", {**CHAT, "return_token_ids": True}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required", "max_tokens": 60}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}, "max_tokens": 20}),
    ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/detokenize", {"tokens": [65]}),
    ("/v1/completions", {**TEXT, "temperature": 9}),
    ("/v1/completions", {**TEXT, "adapter": "nobody"}),
    ("/v1/chat/completions", {**CHAT, "model": "nobody"}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}),
    ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    ("/v1/adapters/merge", {"name": "mixed", "adapters": [{"name": "first"}, {"name": "second"}], "replace": True}),
    ("/v1/adapters/merge", {"name": "mixed", "adapters": []}),
]


@pytest.mark.parametrize(("path", "body"), GENERATIONS, ids=range(len(GENERATIONS)))
def test_what_is_answered_is_what_it_says(
    live: Live, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    check_answer(document, "POST", path, live.post(path, **body))
    if path in ("/v1/completions", "/v1/chat/completions"):
        options = {"include_usage": True, "continuous_usage_stats": True}
        streamed = live.post(path, **body, stream=True, stream_options=options)
        check_answer(document, "POST", path, streamed)


def test_the_life_of_an_adapter_is_what_it_says(live: Live, document: dict[str, Any]) -> None:
    def ask(method: str, path: str, **more: Any) -> None:
        template = path.replace("documented", "{name}").replace("org/tiny", "{id}")
        check_answer(document, method, template, live.http.request(method, path, **more))

    for seed in (11, 12):
        check_answer(document, "POST", "/v1/adapters", live.upload("documented", lora_files(seed), replace="true"))
    check_answer(document, "POST", "/v1/adapters", live.upload("documented", lora_files(13)))  # the name is taken
    for path in ("/v1/adapters", "/v1/adapters/documented", "/v1/adapters/documented/versions"):
        ask("GET", path)
    for verb in ("load", "pin", "unpin", "unload", "rollback"):
        ask("POST", f"/v1/adapters/documented/{verb}")
    ask("GET", "/v1/adapters/documented/fetch")
    ask("PUT", "/v1/adapters/documented", content=b"no tar")
    ask("DELETE", "/v1/adapters/documented")
    ask("DELETE", "/v1/adapters/documented")
    for path in ("/v1/models", "/v1/models/org/tiny", "/tokenizer_info", "/load", "/metrics", *sorted(OPEN_PATHS)):
        ask("GET", path)
    ask("POST", "/ping")


def ask_schemathesis(live: Live, folder: Path, *flags: str) -> int:
    """The number of cases that it has sent, none of which failed. A process of its own, as users run it."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run"]
    checks = ["--checks", "all", "--exclude-checks", LEFT_OUT]
    run = subprocess.run(
        [*command, f"{live.url}/openapi.json", *checks, "--seed", "1", "--request-timeout", "300", *flags],
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.api.schemathesis_hooks", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) generated", run.stdout)
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def questioned(settings: Callable[..., Settings]) -> Iterator[Live]:
    """A server of schemathesis' own: it deletes and replaces what it finds."""
    with serving(settings()) as live:
        for seed, name in enumerate(("first", "second"), 1):
            assert live.upload(name, lora_files(seed)).status_code == 201
        yield live


def test_schemathesis_finds_nothing_at_first_sight(questioned: Live, tmp_path: Path) -> None:
    assert ask_schemathesis(questioned, tmp_path, "--phases", "fuzzing", "-n", "2") > 40


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_schemathesis_finds_nothing(questioned: Live, tmp_path: Path) -> None:
    assert ask_schemathesis(questioned, tmp_path, "--phases", "coverage,fuzzing", "-n", "25") > 2000
    assert questioned.server.engine.is_alive
    eventually(lambda: questioned.server.engine.stats().num_in_flight == 0)
    assert questioned.server.registry.stats().num_leases == 0
