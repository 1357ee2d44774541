"""The adapters over HTTP: upload, list, look at, delete."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse

from server.adapters.catalog import AdapterVersion
from server.adapters.format.manifest import recipe_of
from server.adapters.naming import told
from server.adapters.registry import AdapterInfo, Registered
from server.adapters.served_base import FINGERPRINT
from server.adapters.store.folder_store import check_name
from server.api import fetches
from server.api.adapter_templates import use_of_template
from server.api.errors import echo
from server.api.faces import IncomingFace
from server.api.results import counted
from server.api.services import Services
from server.api.uploads import check_fingerprint, receive_archive, receive_upload
from server.ground.errors import AdapterNotFound, AdapterOnItsWay, BadRequest, Conflict, GraftError, PreconditionFailed

Limit = Annotated[int | None, Query(ge=1, le=10_000)]  # of a page of the list; None: all in one


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"])

    @routes.post("/v1/adapters", status_code=201, openapi_extra=_UPLOAD_FORM)
    async def upload(request: Request, replace: bool = False) -> JSONResponse:
        """201 for a new version, 200 where the very same content is there already, 409 for other content."""
        if fetches.is_order(request):
            return await fetches.begin(services, request, shown, replaces=replace)
        registered = await _upload(services, request, replace)
        return JSONResponse(shown(registered.info), 201 if registered.is_new else 200)

    @routes.put("/v1/adapters/{name}", status_code=201, openapi_extra=_UPLOAD_TAR)
    async def put(request: Request, name: str, replace: bool | None = None, base_fingerprint: str = "") -> JSONResponse:
        """Makes the name mean the adapter in a tar: 201 where that is new, 200 where it meant this very content."""
        with counted(services.metrics.count_upload) as result:
            is_conditional = _is_for_new_only(request, replace)
            check_fingerprint(base_fingerprint)
            await services.lanes.receiving.run(_check_can_put, services, name, is_conditional)
            async with _incoming(services) as incoming:
                check_room = partial(services.registry.check_room, name=name)
                ignored = await receive_archive(
                    request, incoming, services.max_upload_bytes, check_room, services.lanes.receiving
                )
                replaces = replace is not False and not is_conditional
                registered = await services.lanes.registering.run(
                    _register, services, incoming, name, replaces, base_fingerprint or None
                )
            if is_conditional and not registered.is_new:
                raise _exists(name)
            result.is_new = registered.is_new
        answer = {**shown(registered.info), "ignored_files": {"count": ignored.num_files, "names": ignored.names}}
        return JSONResponse(answer, 201 if registered.is_new else 200)

    @routes.get("/v1/adapters")
    def list_adapters(limit: Limit = None, after: str = "") -> JSONResponse:
        """By name; with `limit` a page, whose `last_id` is the next one's `after`."""
        # Not a plain dict: FastAPI would look at every value of thousands of adapters before it writes them.
        return JSONResponse(_page(services, limit, after))

    @routes.get("/v1/adapters/{name}")
    def retrieve(name: str) -> dict[str, Any]:
        """`name`, or `name@version-prefix`."""
        fetch = fetches.shown_of(services, name)
        try:
            info = services.registry.describe(name)
        except (AdapterNotFound, AdapterOnItsWay):
            if fetch is None:
                raise
            return {"name": name, "version": None, "fetch": fetch}
        return {**described(services, info), "chat_template": use_of_template(services, info.folder), "fetch": fetch}

    @routes.delete("/v1/adapters/{name}")
    async def delete(name: str) -> dict[str, Any]:
        """Requests that run keep their version until they end; new ones no longer find it."""
        await services.lanes.changing.run(fetches.delete, services, name)
        return {"name": name, "object": "adapter", "deleted": True}

    return routes


def _page(services: Services, limit: int | None, after: str) -> dict[str, Any]:
    """The list as OpenAI's are paged."""
    listed = fetches.listed(services)
    by_name = {fetch["name"]: fetch for fetch in listed}
    infos = services.registry.list(after, None if limit is None else limit + 1)
    page = infos[:limit]
    return {
        "object": "list",
        "data": [{**shown(info), "fetch": by_name.get(info.name)} for info in page],
        "fetches": listed,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
        "has_more": len(infos) > len(page),
    }


async def _upload(services: Services, request: Request, replace: bool) -> Registered:
    with counted(services.metrics.count_upload) as result:
        async with _incoming(services) as incoming:
            check_room, lane = services.registry.check_room, services.lanes.receiving
            form = await receive_upload(request, incoming, services.max_upload_bytes, check_room, lane)
            registered = await services.lanes.registering.run(
                _register, services, incoming, form.name, replace, form.base_fingerprint
            )
        result.is_new = registered.is_new
    return registered


@asynccontextmanager
async def _incoming(services: Services) -> AsyncIterator[IncomingFace]:
    """A place for an upload, cleared in the end; the disk is waited for in worker threads."""
    incoming = await services.lanes.receiving.run(services.store.incoming, max_bytes=services.max_upload_bytes)
    try:
        yield incoming
    finally:
        await services.lanes.receiving.run(incoming.discard)


def _register(
    services: Services, incoming: IncomingFace, name: str, replace: bool, base_fingerprint: str | None
) -> Registered:
    """Validate against the base and accept. Reads the whole upload: for a worker thread."""
    check_is_no_base(services, name)
    return services.registry.register(incoming, name, replace=replace, base_fingerprint=base_fingerprint)


def described(services: Services, info: AdapterInfo) -> dict[str, Any]:
    """As `shown`, with the recipe of a merged adapter, which is read from its files."""
    try:
        with services.store.reading(info.folder):
            return {**shown(info), "recipe": recipe_of(info.folder)}
    except GraftError as error:
        raise told(error, [AdapterVersion(info.name, info.digest)]) from error


def check_is_no_base(services: Services, name: str) -> None:
    """Raises Conflict for an adapter's name that a request's `model` would take for the base."""
    if name in services.base.served_names:
        raise Conflict(f"'{name}' is a name of the base; choose another for the adapter.", param="name")


def _is_for_new_only(request: Request, replace: bool | None) -> bool:
    """Whether a PUT asks for a name that does not exist (If-None-Match: *). Raises BadRequest for other conditions."""
    unknown = set(request.query_params) - {"replace", "base_fingerprint"}
    if unknown:
        raise BadRequest(
            f"'{echo(min(unknown))}' is no parameter of this request: it takes replace and base_fingerprint.",
            param=echo(min(unknown)),
            code="unsupported",
        )
    condition = request.headers.get("if-none-match")
    if condition not in (None, "*") or "if-match" in request.headers:
        raise BadRequest("Of HTTP's conditions, If-None-Match: * alone is supported: leave the others out.")
    if condition is not None and replace:
        raise BadRequest("replace=true and If-None-Match: * contradict one another: send one of them.", param="replace")
    return condition is not None


def _check_can_put(services: Services, name: str, is_for_new_only: bool) -> None:
    """Raises what the end of the upload would, before it is sent."""
    check_name(name)
    check_is_no_base(services, name)
    services.registry.check_may_claim(name)
    services.registry.check_room(0, name)
    try:
        services.registry.describe(name)
    except AdapterNotFound:
        return
    if is_for_new_only:
        raise _exists(name)


def _exists(name: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"The adapter {name!r} exists, and If-None-Match: * asks for a new name: choose another, or leave the header "
        f"out to replace it.",
        param="name",
    )


def shown(info: AdapterInfo) -> dict[str, Any]:
    """An adapter version as every route shows it."""
    return {
        "name": info.name,
        "version": info.digest,
        "method": info.method,
        "rank": info.rank,
        "parameters": info.num_parameters,
        "bytes": info.content_bytes,
        "sites": info.num_sites,
        "warnings": list(info.warnings),
        "versions": list(info.versions),  # the current one last
        "base_model": info.base_model,  # that it says it was trained on
        "base_fingerprint": info.base_fingerprint,
        "quarantined": info.is_quarantined,  # the output has overflowed with it too often
        "refused": info.is_refused,  # as one of another base, by a strict server; `warnings` says why
        "tiers": list(info.tiers),  # where it is now
        "tier_bytes": {"store": info.content_bytes, "host": info.host_bytes, "device": info.device_bytes},
        "pinned": info.is_pinned,
        "num_running": info.num_residencies,  # sequences, now
        "num_requests": info.num_requests,  # sequences, since the server's start
        "last_used": info.last_used,
        "created": info.created,
        "source": info.provenance and info.provenance.source,  # that it was fetched from; null where it was uploaded
        "source_revision": info.provenance and info.provenance.revision,
    }


_BINARY = {"type": "string", "format": "binary"}
_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": fetches.OrderBody.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "config", "weights"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,62}$"},
                        "config": {**_BINARY, "description": "adapter_config.json"},
                        "weights": {**_BINARY, "description": "adapter_model.safetensors"},
                        "manifest": {**_BINARY, "description": "manifest.json, where there is one"},
                        "base_fingerprint": {
                            "type": "string",
                            "pattern": f"^{FINGERPRINT.pattern}$",
                            "description": "of the base that the adapter was made for, as GET /v1/models shows it",
                        },
                    },
                }
            },
        },
    }
}
_UPLOAD_TAR = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-tar": {"schema": {**_BINARY, "description": "a tar of the adapter's folder, or one gzipped"}}
        },
    }
}
