"""Scopes: every route asks for one, and a key does what its scopes say and no more."""

import re

import pytest
from starlette.routing import Route

from server.api.keys.key import Scope
from server.api.keys.scopes import OPEN_PATHS, SCOPES
from tests.api.conftest import eventually
from tests.api.keys.conftest import Tenants
from tests.api.keys.tenants import entry, write_keys


def routes(tenants: Tenants) -> set[tuple[str, str]]:
    app = tenants.live.server.app
    found = [route for route in app.state.routes if isinstance(route, Route)]
    assert len(found) == len(app.state.routes), "a route of a kind that the table does not know"
    documented = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented <= {(method, route.path_format) for route in found for method in route.methods or ()}
    listed = {(method, route.path) for route in found for method in route.methods or ()}
    return {(method, path) for method, path in listed if path not in OPEN_PATHS and method != "HEAD"}


def test_every_route_declares_its_scope(tenants: Tenants) -> None:
    assert routes(tenants) == SCOPES.keys()
    assert all(SCOPES.values())


@pytest.mark.parametrize("scope", [*Scope])
def test_a_key_of_one_scope_passes_where_it_is_asked_for_and_nowhere_else(tenants: Tenants, scope: Scope) -> None:
    key = tenants[f"only-{scope}"]
    for (method, path), wanted in SCOPES.items():
        answer = key.ask(method, re.sub(r"\{name\}|\{id:path\}", "nobody", path))
        if scope in wanted:
            assert answer.status_code not in (401, 403), (method, path)
        else:
            assert answer.status_code == 403, (method, path)
            assert answer.json()["error"]["code"] == "missing_scope"
            assert re.search("needs a key with the scope", answer.json()["error"]["message"])


def test_a_route_outside_the_table_is_closed_to_all(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {key: value for key, value in SCOPES.items() if key != ("GET", "/v1/models")}
    monkeypatch.setattr("server.api.auth.SCOPES", rest)
    assert tenants["operator"].ask("GET", "/v1/models").status_code == 403
    assert tenants["operator"].ask("GET", "/v1/models/").status_code == 403
    assert tenants["operator"].ask("HEAD", "/v1/models").status_code == 403


def test_what_is_no_route_is_told_to_holders_of_keys_alone(tenants: Tenants) -> None:
    assert tenants["only-infer"].ask("GET", "/nowhere").status_code == 404
    assert tenants["only-infer"].ask("GET", "/v1/completions").status_code == 405
    assert tenants["nobody"].ask("GET", "/nowhere").status_code == 401
    for path in OPEN_PATHS:
        assert tenants["nobody"].ask("GET", path).status_code == 200


def test_keys_change_without_a_restart(tenants: Tenants) -> None:
    before = tenants.file.read_text()
    assert tenants["late"].ask("GET", "/v1/models").status_code == 401
    try:
        write_keys(tenants.file, entry("late"))
        eventually(lambda: tenants["late"].ask("GET", "/v1/models").status_code == 200)
        assert tenants["acme"].ask("GET", "/v1/models").status_code == 401
    finally:
        tenants.file.write_text(before)
    eventually(lambda: tenants["acme"].ask("GET", "/v1/models").status_code == 200)
    assert tenants["late"].ask("GET", "/v1/models").status_code == 401
