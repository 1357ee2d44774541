"""The HTTP face put together: routes, errors, and what stands around every request.

From the outside in: HEAD (`paths`), request id, metrics and last resort (`traffic`), what browsers ask for pages of
other origins, API key (`auth`) or, where there is none, the page that asks (`origin`), what gateways want to know
(`load_report`), slashes (`paths`), size of bodies (`body`), fields to ignore (`unknown_fields`), routes.
"""

import re

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.api import (
    adapters,
    chat,
    completions,
    custody,
    errors,
    fetches,
    health,
    lora_verbs,
    merging,
    models,
    tokenize,
    versions,
)
from server.api.auth import KeyCheck
from server.api.body import BodyLimit
from server.api.load_report import LoadReport, load_of
from server.api.openapi import DocumentedApp
from server.api.origin import OriginCheck
from server.api.paths import HeadAsGet, TrailingSlash
from server.api.services import Services
from server.api.traffic import Traffic
from server.api.unknown_fields import IgnoredFields
from server.api.watched import adapter_states, state

_PARTS = (
    completions,
    chat,
    tokenize,
    models,
    adapters,
    fetches,
    custody,
    versions,
    merging,
    lora_verbs,
    health,
)
_HEADERS_FOR_PAGES = ("location", "retry-after", "retry-after-ms", "x-ignored-fields", "x-request-id", "x-should-retry")
_UPLOAD = re.compile(r"POST /v1/adapters|PUT /v1/adapters/[^/]+")


def create_app(services: Services) -> FastAPI:
    """The ASGI application over these services, complete when returned."""
    app = DocumentedApp(
        title="Graftserve", version=services.version, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    errors.install(app)
    for part in _PARTS:
        app.include_router(part.router(services))
    _add_middleware(app, services)
    services.metrics.watch(lambda: state(services))
    services.metrics.adapters.watch(lambda: adapter_states(services), services.registry.has)
    return app


def _add_middleware(app: FastAPI, services: Services) -> None:
    """The last one added is the outermost."""
    if services.http.ignores_unknown_fields:
        app.add_middleware(IgnoredFields)
    app.add_middleware(BodyLimit, max_bytes=services.max_body_bytes, exempt=_reads_its_own_body)
    app.add_middleware(TrailingSlash)
    app.add_middleware(LoadReport, measured=lambda: load_of(services.engine))
    if services.api_key is not None:
        app.add_middleware(KeyCheck, key=services.api_key)
    else:
        app.add_middleware(OriginCheck, allowed=services.http.allowed_origins)
    if services.http.allowed_origins:
        # Outside of the key: a browser asks without it whether it may send it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=services.http.allowed_origins,
            allow_methods=("DELETE", "GET", "HEAD", "POST", "PUT"),
            allow_headers=("*",),
            expose_headers=_HEADERS_FOR_PAGES,
        )
    app.add_middleware(Traffic, metrics=services.metrics)
    app.add_middleware(HeadAsGet)


def _reads_its_own_body(method: str, path: str) -> bool:
    return _UPLOAD.fullmatch(f"{method} {path}") is not None
