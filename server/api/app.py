"""The HTTP face put together: routes, errors, and what stands around every request.

From the outside in: HEAD (`paths`), request id, metrics and last resort (`traffic`), size of heads and what they tell
browsers (`heads`), what browsers ask for pages of other origins, API key (`auth`), the note of refused changes
(`refusals`), the key's limits (`auth`) or, where there is no key, the page that asks (`origin`), what gateways want to
know (`load_report`), slashes (`paths`), the key's scope (`auth`), size of bodies (`body`), fields to ignore
(`unknown_fields`), routes.
"""

import re
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

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
from server.api.auth import BudgetCheck, KeyCheck, ScopeCheck, key_of
from server.api.body import BodyLimit
from server.api.heads import Heads
from server.api.keys.budget import Budgets
from server.api.keys.scopes import METRICS_PATH, OPEN_PATHS, may_see_metrics
from server.api.load_report import LoadReport, load_of
from server.api.openapi import DocumentedApp
from server.api.origin import OriginCheck
from server.api.paths import HeadAsGet, TrailingSlash
from server.api.refusals import RefusalAudit
from server.api.services import Services
from server.api.traffic import Traffic
from server.api.unknown_fields import IgnoredFields
from server.api.watched import moment

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
    # All routes, in the order in which they match: an application may hold its routers' in ways of its own.
    routes = app.state.routes = list(app.routes)
    for part in _PARTS:
        router = part.router(services)
        routes += router.routes
        app.include_router(router)
    _add_middleware(app, services, routes)
    services.metrics.look_at(lambda names: moment(services, names))
    return app


def _add_middleware(app: FastAPI, services: Services, routes: Sequence[BaseRoute]) -> None:
    """The last one added is the outermost."""
    if services.http.ignores_unknown_fields:
        app.add_middleware(IgnoredFields)
    open_paths = OPEN_PATHS | ({METRICS_PATH} if services.http.open_metrics else set())
    app.add_middleware(BodyLimit, max_bytes=services.max_body_bytes, exempt=_reads_its_own_body, open_paths=open_paths)
    if services.keyring is not None:
        app.add_middleware(ScopeCheck, routes=routes, open_paths=open_paths)
    app.add_middleware(TrailingSlash)
    app.add_middleware(
        LoadReport,
        measured=lambda: load_of(services.engine),
        is_told=lambda scope: services.keyring is None or may_see_metrics(key_of(scope)),
    )
    if services.keyring is None:
        app.add_middleware(OriginCheck, allowed=services.http.allowed_origins)
    if services.keyring is not None:
        budgets = Budgets()
        services.keyring.watch(lambda keys: budgets.keep({key.name for key in keys}))
        app.add_middleware(BudgetCheck, budgets=budgets)
    app.add_middleware(RefusalAudit, routes=routes)
    app.add_middleware(KeyCheck, keyring=services.keyring, open_paths=open_paths)
    if services.http.allowed_origins:
        # Outside of the key: a browser asks without it whether it may send it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=services.http.allowed_origins,
            allow_methods=("DELETE", "GET", "HEAD", "POST", "PUT"),
            allow_headers=("*",),
            expose_headers=_HEADERS_FOR_PAGES,
        )
    app.add_middleware(Heads)
    app.add_middleware(Traffic, metrics=services.metrics)
    app.add_middleware(HeadAsGet)


def _reads_its_own_body(method: str, path: str) -> bool:
    return _UPLOAD.fullmatch(f"{method} {path}") is not None
