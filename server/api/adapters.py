"""The adapters over HTTP: upload, list, look at, delete."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.adapters.registry import AdapterInfo
from server.adapters.served_base import FINGERPRINT
from server.adapters.store import Incoming
from server.api.services import Services
from server.api.uploads import UploadForm, receive_upload
from server.ground.errors import Conflict


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"])

    @routes.post("/v1/adapters", status_code=201, openapi_extra=_UPLOAD_FORM)
    async def upload(request: Request, replace: bool = False) -> JSONResponse:
        """201 for a new version, 200 where the very same content is there already, 409 for other content."""
        incoming = await run_in_threadpool(services.store.incoming, max_bytes=services.max_upload_bytes)
        try:
            form = await receive_upload(request, incoming, services.max_upload_bytes)
            return await run_in_threadpool(_register, services, incoming, form, replace)
        finally:
            await run_in_threadpool(incoming.discard)

    @routes.get("/v1/adapters")
    def list_adapters() -> dict[str, Any]:
        return {"object": "list", "data": [shown(info) for info in services.registry.list()]}

    @routes.get("/v1/adapters/{name}")
    def retrieve(name: str) -> dict[str, Any]:
        """`name`, or `name@version-prefix`."""
        return shown(services.registry.describe(name))

    @routes.delete("/v1/adapters/{name}")
    def delete(name: str) -> dict[str, Any]:
        """Requests that run keep their version until they end; new ones no longer find it."""
        services.registry.delete(name)
        return {"name": name, "object": "adapter", "deleted": True}

    return routes


def _register(services: Services, incoming: Incoming, form: UploadForm, replace: bool) -> JSONResponse:
    """Validate against the base and accept. Reads the whole upload: for a worker thread."""
    if form.name in services.base.served_names:
        raise Conflict(f"'{form.name}' is a name of the base; choose another for the adapter.", param="name")
    registered = services.registry.register(
        incoming, form.name, replace=replace, base_fingerprint=form.base_fingerprint
    )
    return JSONResponse(shown(registered.info), 201 if registered.is_new else 200)


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
        "refused": info.is_refused,  # as one of another base, by a strict server; `warnings` says why
        "tiers": list(info.tiers),  # where it is now
        "tier_bytes": {"store": info.content_bytes, "host": info.host_bytes, "device": info.device_bytes},
        "pinned": info.is_pinned,
        "num_running": info.num_residencies,  # sequences, now
        "num_requests": info.num_requests,  # sequences, since the server's start
        "last_used": info.last_used,
        "created": info.created,
    }


_BINARY = {"type": "string", "format": "binary"}
_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "config", "weights"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,62}$"},
                        "config": {**_BINARY, "description": "adapter_config.json"},
                        "weights": {**_BINARY, "description": "adapter_model.safetensors"},
                        "base_fingerprint": {
                            "type": "string",
                            "pattern": f"^{FINGERPRINT.pattern}$",
                            "description": "of the base that the adapter was made for, as GET /v1/models shows it",
                        },
                    },
                }
            }
        },
    }
}
