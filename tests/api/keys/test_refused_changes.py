"""The audit log has every refusal of a change, whatever refuses it: the scope, a limit, a body, a name, an owner."""

import json
import logging
from typing import Any

import httpx
import pytest

from server.adapters.audit import LOGGER
from server.api.keys.scopes import SCOPES
from server.api.refusals import CHANGES
from tests.api.adapter_files import lora_files
from tests.api.keys.conftest import Tenants
from tests.api.keys.tenants import Tenant

# They are asked by POST and change nothing.
LOOKS = {
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
}
NAMED = [change for change in CHANGES if "{name}" in change[1]]
MERGE: dict[str, Any] = {"adapters": [{"name": "nobody"}, {"name": "public-one"}]}


class Audit:
    """The lines since the last look."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, LOGGER)
        self.caplog = caplog

    def lines(self) -> list[dict[str, Any]]:
        told = [json.loads(record.message) for record in self.caplog.records if record.name == LOGGER]
        assert "secret-of-" not in self.caplog.text
        self.caplog.clear()
        return told

    def only(self) -> tuple[str, str, str | None, str]:
        (line,) = self.lines()
        assert line["request_id"].startswith("req_")
        return line["who"], line["verb"], line["adapter"], line["result"]


@pytest.fixture
def audit(caplog: pytest.LogCaptureFixture) -> Audit:
    return Audit(caplog)


def ask(key: Tenant, change: tuple[str, str], name: str = "nobody") -> httpx.Response:
    """A change without a body, which is refused before or because of that."""
    method, path = change
    return key.ask(method, path.replace("{name}", name))


def test_every_route_that_is_no_look_is_a_change() -> None:
    assert {route for route in SCOPES if route[0] != "GET"} - LOOKS == CHANGES.keys()


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_a_key_without_the_scope_is_noted(tenants: Tenants, audit: Audit, change: tuple[str, str]) -> None:
    assert ask(tenants["only-infer"], change, "public-one").status_code == 403
    adapter = "public-one" if change in NAMED else None
    assert audit.only() == ("only-infer", CHANGES[change], adapter, "missing_scope")


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_a_key_above_its_limits_is_noted(tenants: Tenants, audit: Audit, change: tuple[str, str]) -> None:
    tenants["spent"].complete()
    assert audit.lines() == [], "a generation changes nothing"
    assert ask(tenants["spent"], change, "public-one").status_code == 429
    adapter = "public-one" if change in NAMED else None
    assert audit.only() == ("spent", CHANGES[change], adapter, "rate_limit_exceeded")


def test_a_slash_at_the_end_hides_nothing(tenants: Tenants, audit: Audit) -> None:
    assert tenants["only-infer"].ask("DELETE", "/v1/adapters/public-one/").status_code == 403
    assert audit.only() == ("only-infer", "delete", "public-one", "missing_scope")


@pytest.mark.parametrize("change", [change for change in NAMED if change[0] != "PUT"], ids=" ".join)
def test_a_name_that_is_not_there_is_noted(tenants: Tenants, audit: Audit, change: tuple[str, str]) -> None:
    assert ask(tenants["operator"], change).status_code == 404
    code = "not_found" if CHANGES[change] == "cancel fetch" else "adapter_not_found"
    assert audit.only() == ("operator", CHANGES[change], "nobody", code)


@pytest.mark.parametrize("change", [("DELETE", "/v1/adapters/{name}"), ("POST", "/v1/adapters/{name}/unload")])
def test_what_is_the_operators_is_noted(tenants: Tenants, audit: Audit, change: tuple[str, str]) -> None:
    assert ask(tenants["acme"], change, "public-one").status_code == 403
    assert audit.only() == ("acme", CHANGES[change], "public-one", "not_owner")


def test_a_refused_upload_is_noted_with_its_name(tenants: Tenants, audit: Audit) -> None:
    acme, files = tenants["acme"], lora_files(61)
    for name, query, status, code in (
        ("tiny", {}, 409, "conflict"),
        ("Not A Name", {}, 400, "invalid_value"),
        ("public-one", {}, 409, "name_unavailable"),
    ):
        assert acme.upload(name, files, **query).status_code == status
        assert audit.only() == ("acme", "register", name, code)
    long = {"config": ("adapter_config.json", b" " * (1024**2 + 1))}
    assert acme.ask("POST", "/v1/adapters", data={"name": "acme-long"}, files=long).status_code == 413
    assert audit.only() == ("acme", "register", "acme-long", "too_large")
    new = {"if-none-match": "*"}
    assert tenants["operator"].ask("PUT", "/v1/adapters/public-one", headers=new).status_code == 412
    assert audit.only() == ("operator", "register", "public-one", "precondition_failed")
    assert acme.ask("PUT", "/v1/adapters/tiny", content=b"").status_code == 409
    assert audit.only() == ("acme", "register", "tiny", "conflict")


def test_a_refused_fetch_is_noted_with_its_source(tenants: Tenants, audit: Audit) -> None:
    order = {"name": "acme-far", "source": "hf://other/adapter"}
    assert tenants["acme-ci"].ask("POST", "/v1/adapters", order).status_code == 403
    (line,) = audit.lines()
    told = {"who": "acme-ci", "verb": "order fetch", "adapter": "acme-far", "source": "hf://other/adapter"}
    assert line.items() >= (told | {"result": "source_not_allowed"}).items()
    with_secret = order | {"source": "https://user:secret-of-mine@host/x"}
    assert tenants["acme-ci"].ask("POST", "/v1/adapters", with_secret).status_code == 400
    assert audit.only() == ("acme-ci", "order fetch", "acme-far", "invalid_source")


def test_a_fetch_that_fails_on_its_way_is_noted(tenants: Tenants, audit: Audit) -> None:
    (allowed,) = tenants.live.server.settings.allow_source
    order = {"name": "acme-gone", "source": f"{allowed}/nothing-here", "wait": True}
    assert tenants["operator"].ask("POST", "/v1/adapters", order).status_code == 400
    told = [(line["verb"], line["adapter"], line["result"]) for line in audit.lines()]
    assert told == [("order fetch", "acme-gone", "done"), ("fetch", "acme-gone", "source_not_found")]
    assert tenants["operator"].ask("DELETE", "/v1/adapters/acme-gone/fetch").status_code == 200
    assert audit.only() == ("operator", "cancel fetch", "acme-gone", "done")


def test_a_refused_merge_is_noted_with_its_name(tenants: Tenants, audit: Audit) -> None:
    for name, code in (("acme-mix", "adapter_not_found"), ("tiny", "conflict"), ("No Name", "invalid_value")):
        tenants["acme"].ask("POST", "/v1/adapters/merge", {"name": name, **MERGE})
        assert audit.only() == ("acme", "merge", name, code)


def test_vllms_verbs_are_noted_as_ours_are(tenants: Tenants, audit: Audit) -> None:
    operator = tenants["operator"]
    load = {"lora_name": "far", "lora_path": "/etc"}
    assert operator.ask("POST", "/v1/load_lora_adapter", load).status_code == 403
    assert audit.only() == ("operator", "register", "far", "foreign_origin")
    assert operator.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "nobody"}).status_code == 404
    assert audit.only() == ("operator", "delete", "nobody", "adapter_not_found")


def test_more_unloads_than_may_wait_are_noted(tenants: Tenants, audit: Audit) -> None:
    assert tenants["acme"].ask("POST", "/v1/adapters/public-one/unload?max_wait_s=301").status_code == 400
    assert audit.only() == ("acme", "unload", "public-one", "invalid_value")


def test_a_load_by_hand_is_noted(tenants: Tenants, audit: Audit) -> None:
    assert tenants["acme"].ask("POST", "/v1/adapters/public-one/load").status_code == 200
    assert audit.only() == ("acme", "load", "public-one", "done")


def test_a_wrong_key_and_a_look_leave_no_line(tenants: Tenants, audit: Audit) -> None:
    assert tenants["nobody"].ask("DELETE", "/v1/adapters/public-one").status_code == 401
    assert tenants["acme"].ask("GET", "/v1/adapters/nobody").status_code == 404
    assert tenants["acme"].complete(adapter="nobody").status_code == 404
    assert tenants["acme"].ask("POST", "/nowhere").status_code == 404
    assert audit.lines() == []
