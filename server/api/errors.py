"""Errors as clients meet them: OpenAI's `{"error": {message, type, param, code}}`, for every failure there is.

Owns the mapping from exceptions to that object, its status and its headers. Knows nothing about what failed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.api.disconnect import ClientGone
from server.ground.errors import BadRequest, Conflict, GraftError, Overloaded, RequestTimedOut, StorageFull

MAX_ECHO_CHARS = 200  # of anything that the client sent and an error repeats
STATUS_CLIENT_GONE = 499  # nobody reads it; it is what metrics show

_HTTP_CODES = {401: "unauthorized", 404: "route_not_found", 405: "method_not_allowed", 413: "too_large"}


def error_object(error: GraftError) -> dict[str, Any]:
    param = None if error.param is None else _encodable(error.param)
    body = {"message": _encodable(error.message), "type": error.type, "param": param, "code": error.code}
    return {"error": body}


def error_response(error: GraftError) -> JSONResponse:
    return JSONResponse(error_object(error), error.status, headers=_headers(error))


def internal_error() -> GraftError:
    """What a client learns of a bug: nothing but that it happened (the log has the rest)."""
    return GraftError("The server failed while it answered this request. Its log has the details, by x-request-id.")


def echo(text: object) -> str:
    """Something the client sent, short enough to repeat."""
    shown = str(text)
    return shown if len(shown) <= MAX_ECHO_CHARS else f"{shown[:MAX_ECHO_CHARS]}..."


def _encodable(text: str) -> str:
    """JSON can escape half of a surrogate pair, which no answer in UTF-8 can repeat."""
    return text.encode(errors="replace").decode()


def install(app: FastAPI) -> None:
    """Have `app` answer each kind of failure with the error object."""
    app.add_exception_handler(GraftError, _answer_graft)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientGone, _answer_gone)


def _headers(error: GraftError) -> dict[str, str]:
    if isinstance(error, Overloaded):
        return {"retry-after": str(error.retry_after_s)}
    if isinstance(error, Conflict | RequestTimedOut | StorageFull):
        # OpenAI's clients send a 409, a 504 and a 507 again by themselves; these will not go away by waiting.
        return {"x-should-retry": "false"}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


async def _answer_graft(request: Request, error: Exception) -> Response:
    assert isinstance(error, GraftError)
    return error_response(error)


async def _answer_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=STATUS_CLIENT_GONE)


async def _answer_http(request: Request, error: Exception) -> Response:
    """The framework's own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {echo(request.scope['path'])}"
    shown = BadRequest(f"{where}: {echo(error.detail)}.", code=_HTTP_CODES.get(error.status_code, "http_error"))
    return JSONResponse(error_object(shown), error.status_code, headers=error.headers)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Of the alternatives of a union the deepest problem belongs to the one that was meant.
    return error_response(_from_validation(max(error.errors(), key=lambda problem: len(problem["loc"]))))


def _from_validation(problem: Mapping[str, Any]) -> BadRequest:
    """A problem that pydantic found, in words; the value itself is not repeated (it may be megabytes)."""
    if problem["type"] == "json_invalid":
        return BadRequest(f"The body is not valid JSON: {echo(problem['ctx']['error'])} (byte {problem['loc'][-1]}).")
    param = _field_path(problem["loc"])
    if problem["type"] == "string_unicode":
        where = "The name of a field" if param is None else f"'{param}'"
        return BadRequest(f"{where} has half of a surrogate pair; send whole characters.", param=param)
    if param is None:
        return BadRequest("Send the body as a JSON object, with the header Content-Type: application/json.")
    if problem["type"] == "missing":
        return BadRequest(f"'{param}' is required.", param=param, code="missing_field")
    if problem["type"] == "extra_forbidden":
        return BadRequest(f"'{param}' is not supported by this server; remove it.", param=param, code="unsupported")
    text = echo(problem["msg"].removeprefix("Value error, "))
    return BadRequest(f"'{param}': {text}.", param=param)


def _field_path(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "content", "str") -> "messages[0].content"; None for the body as a whole."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in {"str", "int"} and not part.startswith("list"):
            path += f".{part}" if path else part
    return echo(path) or None
