"""The OpenAPI document: what each route takes, and all that it can answer.

FastAPI knows paths, parameters and bodies; what it cannot know is written down here, by route: answers, errors,
streams, the key. Knows nothing about how the routes work.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from starlette.routing import BaseRoute

from server.api import answer_shapes as shapes
from server.api.fields import BOOKKEEPING, CHAT_NEUTRAL, COMPLETION_NEUTRAL
from server.api.keys.scopes import OPEN_PATHS
from server.api.unknown_fields import HEADER

_REF = "#/components/schemas/{model}"
_GOOD_WORDS = {200: "Done.", 201: "Done; the name means something new.", 202: "Begun."}
_STATUS_WORDS = {
    400: "A field is wrong, unsupported or out of range.",
    401: "The API key is missing or wrong.",
    403: "The key's scopes or the operator do not allow it, or a web page of another origin asks.",
    404: "There is no such adapter or model.",
    409: "The name is taken, or in use.",
    412: "The name exists, and the request is for a new one only.",
    413: "The body is larger than this server takes.",
    415: "The body is not of a type that the route reads.",
    424: "The adapter's weights make the output overflow, or have done so too often.",
    429: "The key has used what its limits allow.",
    431: "The path or the headers are larger than this server takes.",
    500: "The server failed.",
    502: "The place that an adapter is fetched from failed.",
    503: "The server is full, still fetching, or ending; Retry-After says when to come again.",
    504: "The request took longer than --request-timeout.",
    507: "The store has no room.",
}


@dataclass(frozen=True, slots=True)
class _Route:
    """What a route answers: a type per good status, the type of a stream's events, and its errors by status.

    401, 403, 413, 415, 429, 431 and 500, which may be answered before or beside any route's own work, need not be
    listed.
    """

    summary: str
    answers: Mapping[int, Any]
    errors: tuple[int, ...] = ()
    event: Any = None
    media_type: str = "application/json"
    error: Any = shapes.ErrorAnswer


_LORA_ERROR = shapes.LoraVerbError | shapes.ErrorAnswer
_NAMED = (400, 404, 503)  # of routes with an adapter in their path
_GENERATION = (400, 404, 409, 424, 503, 504)
_UPLOAD = (400, 409, 503, 507)
_ROUTES: Mapping[tuple[str, str], _Route] = {
    ("post", "/v1/completions"): _Route(
        "Complete a prompt, or score one", {200: shapes.Completion}, _GENERATION, shapes.CompletionChunk
    ),
    ("post", "/v1/chat/completions"): _Route(
        "Answer a conversation", {200: shapes.ChatCompletion}, _GENERATION, shapes.ChatCompletionChunk
    ),
    ("post", "/tokenize"): _Route("Text or messages to tokens", {200: shapes.Tokens}, _NAMED),
    ("post", "/detokenize"): _Route("Tokens to text", {200: shapes.DetokenizedText}, _NAMED),
    ("get", "/tokenizer_info"): _Route("The tokenizer's special tokens and template", {200: shapes.TokenizerInfo}),
    ("get", "/v1/models"): _Route("List the base and its adapters as models", {200: shapes.ModelList}),
    ("get", "/v1/models/{id}"): _Route("Look at one model", {200: shapes.Model}, _NAMED),
    ("get", "/v1/adapters"): _Route("List the adapters", {200: shapes.AdapterList}, (400, 503)),
    ("post", "/v1/adapters"): _Route(
        "Upload an adapter, or have one fetched",
        {200: shapes.Adapter, 201: shapes.Adapter, 202: shapes.Fetch},
        (*_UPLOAD, 404, 502),
    ),
    ("get", "/v1/adapters/{name}"): _Route(
        "Look at an adapter", {200: shapes.DescribedAdapter | shapes.FetchedAdapter}, _NAMED
    ),
    ("put", "/v1/adapters/{name}"): _Route(
        "Upload an adapter as a tar", {200: shapes.PutAdapter, 201: shapes.PutAdapter}, (*_UPLOAD, 412)
    ),
    ("delete", "/v1/adapters/{name}"): _Route("Delete an adapter", {200: shapes.Deleted}, (*_NAMED, 409)),
    ("get", "/v1/adapters/{name}/fetch"): _Route("Look at a fetch", {200: shapes.Fetch}, _NAMED),
    ("delete", "/v1/adapters/{name}/fetch"): _Route("Cancel a fetch", {200: shapes.Deleted}, _NAMED),
    ("post", "/v1/adapters/{name}/load"): _Route("Load an adapter", {200: shapes.LoadedAdapter}, (*_NAMED, 409)),
    ("post", "/v1/adapters/{name}/unload"): _Route("Unload an adapter", {200: shapes.UnloadedAdapter}, (*_NAMED, 409)),
    ("post", "/v1/adapters/{name}/pin"): _Route("Pin an adapter", {200: shapes.Adapter}, (*_NAMED, 409)),
    ("post", "/v1/adapters/{name}/unpin"): _Route("Unpin an adapter", {200: shapes.Adapter}, _NAMED),
    ("post", "/v1/adapters/{name}/lift_quarantine"): _Route(
        "Serve an adapter again that is quarantined", {200: shapes.Adapter}, _NAMED
    ),
    ("get", "/v1/adapters/{name}/versions"): _Route("List versions", {200: shapes.AdapterVersions}, _NAMED),
    ("post", "/v1/adapters/{name}/rollback"): _Route(
        "Make an earlier version current", {200: shapes.RolledBackAdapter}, (*_NAMED, 409, 507)
    ),
    ("post", "/v1/adapters/merge"): _Route(
        "Merge adapters into a new one", {200: shapes.MergedAdapter, 201: shapes.MergedAdapter}, (*_UPLOAD, 404)
    ),
    ("post", "/v1/load_lora_adapter"): _Route(
        "Load an adapter, as vLLM does", {200: str}, (400, 403, 404, 503, 507), None, "text/plain", _LORA_ERROR
    ),
    ("post", "/v1/unload_lora_adapter"): _Route(
        "Forget an adapter, as vLLM does", {200: str}, (400, 404, 503), None, "text/plain", _LORA_ERROR
    ),
    ("get", "/health"): _Route("Is it alive", {200: shapes.Status}, (503,)),
    ("get", "/ping"): _Route("Is it alive, for SageMaker", {200: shapes.Status}, (503,)),
    ("post", "/ping"): _Route("Is it alive, for SageMaker", {200: shapes.Status}, (503,)),
    ("get", "/v2/health/live"): _Route("Is it alive, for KServe", {200: shapes.Status}, (503,)),
    ("get", "/ready"): _Route("May requests be sent", {200: shapes.Status}, (503,)),
    ("get", "/v2/health/ready"): _Route("May requests be sent, for KServe", {200: shapes.Status}, (503,)),
    ("get", "/version"): _Route("The server's version", {200: shapes.ServerVersion}),
    ("get", "/load"): _Route("How many sequences are in flight", {200: shapes.ServerLoad}),
    ("get", "/metrics"): _Route("The metrics, for Prometheus", {200: str}, (), None, "text/plain"),
}
_OWN_BODIES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "CompletionBody": COMPLETION_NEUTRAL,
    "ChatBody": CHAT_NEUTRAL,
    "TokenizeChatBody": CHAT_NEUTRAL,
}
_ABOUT = """OpenAI's API, with one more field: `adapter`.

Every answer has the header `x-request-id`: the client's own where it sent one of at most 128 letters, digits, dots,
colons, dashes and underscores. HEAD is answered wherever GET is, and a slash behind a path changes nothing. Field names
that are twice in one JSON object are refused; null means the default.
"""
_HEADERS: Mapping[str, tuple[str, str]] = {
    "x-request-id": ("string", "Of this request, in the server's log too."),
    "retry-after": ("integer", "Seconds to wait before the request is sent again."),
    "retry-after-ms": ("integer", "The same in milliseconds, as OpenAI's clients read it."),
    "x-should-retry": ("string", "true or false: whether OpenAI's clients send the request again by themselves."),
    "www-authenticate": ("string", "Bearer."),
    "location": ("string", "Where the fetch can be looked at."),
    HEADER: ("string", "Fields of the request that were ignored, under --unknown-fields warn."),
}
_ALWAYS = ("x-request-id",)
_HEADERS_BY_STATUS: Mapping[int, tuple[str, ...]] = {
    200: (HEADER,),
    202: ("location",),
    401: ("www-authenticate",),
    409: ("x-should-retry",),
    412: ("x-should-retry",),
    429: ("x-should-retry", "retry-after", "retry-after-ms"),
    503: ("x-should-retry", "retry-after", "retry-after-ms"),
    504: ("x-should-retry",),
    507: ("x-should-retry",),
}


class DocumentedApp(FastAPI):
    """A FastAPI whose document says what the routes answer. Every route must be in the table above."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _Document(self.title, self.version, self.routes).made()
        return self.openapi_schema


class _NoTitles(GenerateJsonSchema):
    """A field's title would be its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Document:
    def __init__(self, title: str, version: str, routes: Sequence[BaseRoute]) -> None:
        self._document = get_openapi(title=title, version=version, description=_ABOUT, routes=routes)
        components = self._document["components"]
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        components["headers"] = {
            name: {"schema": {"type": kind}, "description": said} for name, (kind, said) in _HEADERS.items()
        }
        self._schemas: dict[str, Any] = components["schemas"]

    def made(self) -> dict[str, Any]:
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                self._complete(operation, _ROUTES[method, path], path, method)
        for name in ("HTTPValidationError", "ValidationError"):
            self._schemas.pop(name, None)
        for name, neutral in _OWN_BODIES.items():
            _close(self._schemas[name], neutral)
        _open(self._schemas["Message"])
        return self._document

    def _complete(self, operation: dict[str, Any], route: _Route, path: str, method: str) -> None:
        operation["summary"] = route.summary
        # A server without a key takes requests that have none.
        operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {}]
        errors = {*route.errors, 413, 431, 500}
        errors |= set() if path in OPEN_PATHS else {401, 403, 429}
        errors |= set() if method == "get" else {403}
        errors |= {400, 415} if "requestBody" in operation else set()
        good = {status: self._good(answer, route, status) for status, answer in route.answers.items()}
        bad = {status: self._bad(route, status) for status in sorted(errors)}
        operation["responses"] = {str(status): answer for status, answer in {**good, **bad}.items()}

    def _good(self, answer: Any, route: _Route, status: int) -> dict[str, Any]:
        content = {route.media_type: {"schema": self._schema(answer)}}
        if route.event is not None:
            said = "Server-sent events: `data: ` and an object of x-event-schema each, then `data: [DONE]`."
            content["text/event-stream"] = {
                "schema": {"type": "string", "description": said},
                "x-event-schema": self._schema(route.event),
            }
        return {"description": _GOOD_WORDS[status], "headers": _headers(status), "content": content}

    def _bad(self, route: _Route, status: int) -> dict[str, Any]:
        content = {"application/json": {"schema": self._schema(route.error)}}
        return {"description": _STATUS_WORDS[status], "headers": _headers(status), "content": content}

    def _schema(self, of: Any) -> dict[str, Any]:
        """The schema of a type: a reference, where the type has a name."""
        schema = TypeAdapter(of).json_schema(ref_template=_REF, schema_generator=_NoTitles, mode="serialization")
        named = schema.pop("$defs", {})
        shown = {"$ref": _REF.format(model=schema["title"])} if "title" in schema else schema
        if shown is not schema:
            named[schema["title"]] = schema
        for name, part in named.items():
            assert self._schemas.setdefault(name, part) == part, f"two types are called {name}"
        return shown


def _headers(status: int) -> dict[str, Any]:
    names = (*_ALWAYS, *_HEADERS_BY_STATUS.get(status, ()))
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _close(body: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Name the fields that pass although nothing is done with them; all others are refused."""
    properties = body["properties"]
    for name, values in sorted(neutral.items()):
        if name not in properties:
            off = list(dict.fromkeys(map(json.dumps, (*values, None))))
            properties[name] = {"enum": [json.loads(value) for value in off], "description": "Not supported but so."}
    for name in sorted(BOOKKEEPING):
        properties[name] = {"description": "Accepted, and of no effect on the answer."}
    body["additionalProperties"] = False


def _open(message: dict[str, Any]) -> None:
    """A turn's content may be missing where it is an assistant's, and what an answer had beside it if it is empty.

    Its reasoning has two names.
    """
    message["required"] = ["role"]
    message["properties"]["reasoning"] = message["properties"]["reasoning_content"]
    message["properties"]["content"]["anyOf"].append({"type": "null"})
    message["additionalProperties"] = {"enum": [None, "", [], {}, False, 0]}
