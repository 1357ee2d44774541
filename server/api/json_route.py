"""Routes that take JSON, read strictly: the media type they need, and what JSON's grammar leaves open.

Refuses what two readers could understand in two ways (a field that is there twice, NaN) and what no route could use
(endless nesting, numbers of thousands of digits). Knows nothing about what bodies mean.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from server.api.errors import echo
from server.ground.errors import BadRequest, UnsupportedMediaType

_READ_AT_ONCE_BYTES = 256 * 1024  # a body up to this is read in a few milliseconds, for which the others can wait


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, is JSON that `read_json` accepts."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def read_first(request: Request) -> Response:
            return await handler(await _read(request))

        return read_first


class _ReadRequest(Request):
    """A request whose body has been read: FastAPI's own reader takes any JSON, and tells no failure from another."""

    def __init__(self, request: Request, content: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._content = content
        self._value = value

    async def body(self) -> bytes:
        return self._content

    async def json(self) -> Any:
        return self._value


async def _read(request: Request) -> Request:
    content = await request.body()
    if not content:
        return _ReadRequest(request, content, None)  # whether there must be one is the route's to say
    check_media_type(request)
    if len(content) <= _READ_AT_ONCE_BYTES:
        return _ReadRequest(request, content, read_json(content))
    return _ReadRequest(request, content, await run_in_threadpool(read_json, content))


def check_media_type(request: Request) -> None:
    """Raises UnsupportedMediaType for a body that is not declared as plain JSON."""
    kind = Message()
    kind["content-type"] = request.headers.get("content-type", "nothing")
    subtype = kind.get_content_subtype()
    if kind.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise UnsupportedMediaType("Send the body as JSON, with the header Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("Send the body as it is: this server reads no Content-Encoding.")


def read_json(content: bytes) -> Any:
    """The value of a JSON text. Raises BadRequest that says what is wrong, and where."""
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()  # json.loads would guess UTF-16 and UTF-32, too
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode())
        raise BadRequest(f"The body is not valid JSON: {echo(error.msg)} (byte {at}).") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: byte {error.start} is not UTF-8.") from None
    except RecursionError:
        raise BadRequest("The body's JSON is nested too deeply; send fewer levels.") from None
    except ValueError:
        raise BadRequest("The body has a number of too many digits; send a smaller one.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise BadRequest(f"'{echo(twice)}' is twice in one JSON object; send it once.", param=echo(twice))
    return found


def _no_number(name: str) -> NoReturn:
    raise BadRequest(f"The body is not valid JSON: {name} is not a number in JSON.")
