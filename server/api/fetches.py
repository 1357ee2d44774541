"""Adapters fetched from elsewhere over HTTP: the JSON body of POST /v1/adapters, and what is shown of a fetch.

Owns the order that a client sends, its answers, and DELETE of a fetch. Knows nothing about sources: `Fetches` does.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.adapters.asker import current_asker
from server.adapters.audit import about, note, noted
from server.adapters.registry import AdapterInfo
from server.adapters.remote.address import Address
from server.adapters.remote.fetches import FetchInfo, Order
from server.adapters.served_base import FINGERPRINT
from server.api.auth import key_of
from server.api.body import body_chunks, declared_bytes, discard
from server.api.errors import echo, error_object
from server.api.json_body import Body, Text
from server.api.json_route import read_json
from server.api.services import Services
from server.ground.errors import AdapterNotFound, Conflict, Forbidden, NotFound, TooLarge

_MAX_BODY_BYTES = 64 * 1024


class OrderBody(Body):
    name: Text
    source: Text
    replace: bool = False
    base_fingerprint: Annotated[str, Field(pattern=f"^{FINGERPRINT.pattern}$")] | None = None
    wait: bool = False


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"])

    @routes.get("/v1/adapters/{name}/fetch")
    def retrieve(name: str) -> dict[str, Any]:
        """The fetch for a name that is under way, or that has failed."""
        fetch = shown_of(services, name)
        if fetch is None:
            raise _no_fetch(name)
        return fetch

    @routes.delete("/v1/adapters/{name}/fetch")
    async def cancel(name: str) -> dict[str, Any]:
        """Cancels the fetch, or forgets its failure. An adapter that has the name stays."""
        if not await services.lanes.changing.run(_cancel, services, name):
            raise _no_fetch(name)
        return {"name": name, "object": "fetch", "deleted": True}

    return routes


def is_order(request: Request) -> bool:
    """Whether a POST /v1/adapters asks for a fetch, and is no upload."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json"


async def begin(
    services: Services, request: Request, shown: Callable[[AdapterInfo], dict[str, Any]], *, replaces: bool
) -> JSONResponse:
    """202 with the fetch; where the client waits, what an upload is answered, or the error that ended the fetch.

    A client that leaves while it waits changes nothing.
    """
    body = _parsed(await _read(request))
    about(body.name, "order fetch")
    if body.name in services.base.served_names:
        raise Conflict(f"'{echo(body.name)}' is a name of the base; choose another for the adapter.", param="name")
    address = Address.parse(body.source)
    order = Order(body.name, address, body.replace or replaces, body.base_fingerprint)
    with noted("order fetch", body.name, source=str(address)):
        _check_may_fetch(request, address)
        fetch = await run_in_threadpool(services.fetches.begin, order)
    if not body.wait:
        info = await run_in_threadpool(fetch.info)
        return JSONResponse(_shown(info), 202, headers={"location": f"/v1/adapters/{order.name}/fetch"})
    registered = await asyncio.wrap_future(fetch.result)
    return JSONResponse(shown(registered.info), 201 if registered.is_new else 200)


def delete(services: Services, name: str) -> None:
    """Takes an adapter out, with its fetch or the failure of one. Raises AdapterNotFound if there is neither."""
    had_fetch = _cancel(services, name)
    try:
        services.registry.delete(name)
    except AdapterNotFound:
        if not had_fetch:
            raise


def _cancel(services: Services, name: str) -> bool:
    is_done = services.fetches.cancel(name)
    if is_done:
        note("cancel fetch", adapter=name, result="done")
    return is_done


def listed(services: Services) -> list[dict[str, Any]]:
    """The fetches that are under way, and the failures that are remembered."""
    return [_shown(info) for info in services.fetches.list()]


def shown_of(services: Services, name: str) -> dict[str, Any] | None:
    info = services.fetches.info(name)
    return _shown(info) if info is not None else None


def _shown(info: FetchInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "object": "fetch",
        "source": info.source,
        "revision": info.revision,
        "status": info.status,
        "bytes_done": info.bytes_done,
        "bytes_total": info.bytes_total,
        "progress": info.progress,
        "error": error_object(info.failure)["error"] if info.failure is not None else None,
    }


async def _read(request: Request) -> bytes:
    chunks = body_chunks(request.receive)
    body = bytearray()
    is_too_large = declared_bytes(request.scope) > _MAX_BODY_BYTES
    async for chunk in chunks:
        body += chunk
        if is_too_large or len(body) > _MAX_BODY_BYTES:
            await discard(chunks)
            raise TooLarge(
                f"A JSON body here names a source, in at most {_MAX_BODY_BYTES} bytes: files are sent as "
                f"multipart/form-data."
            )
    return bytes(body)


def _parsed(content: bytes) -> OrderBody:
    try:
        return OrderBody.model_validate(read_json(content))
    except ValidationError as error:
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None


def _check_may_fetch(request: Request, address: Address) -> None:
    """The server fetches with its own credentials: what these open is not every key's. Raises Forbidden."""
    key = key_of(request.scope)
    if key is None or current_asker().owner is None or key.sources.allows(address):
        return
    raise Forbidden(
        f"This key may not have adapters fetched from {echo(address)!r}: the operator allows places with 'sources' in "
        f"the file of keys.",
        param="source",
        code="source_not_allowed",
    )


def _no_fetch(name: str) -> NotFound:
    return NotFound(f"No fetch for {echo(name)!r} is under way, and none has failed lately.", param="name")
