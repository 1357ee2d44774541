"""The audit log over HTTP: every change of an adapter leaves a line in the name of its key."""

import json
import logging

import pytest

from server.adapters.audit import LOGGER
from tests.api.adapter_files import lora_files
from tests.api.keys.conftest import Tenants

SECRET_TEXT = "the quick brown fox"


def test_what_a_merge_or_an_upload_replaced_is_told(tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    acme = tenants["acme"]
    first = acme.upload("acme-changed", lora_files(22)).json()["version"]
    acme.upload("acme-changed", lora_files(22))
    order = {"name": "acme-changed", "adapters": [{"name": "acme-changed"}, {"name": "public-one"}], "replace": True}
    second = acme.ask("POST", "/v1/adapters/merge", order).json()["version"]
    acme.ask("DELETE", "/v1/adapters/acme-changed")
    lines = [json.loads(record.message) for record in caplog.records if record.name == LOGGER]
    told = [(line["verb"], line["version"], line["is_new"], line["replaced"]) for line in lines[:-1]]
    assert told == [
        ("register", first, True, None),
        ("register", first, False, None),
        ("register", second, True, first),
        ("merge", second, True, first),
    ]


def test_every_change_leaves_a_line(tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    acme, operator = tenants["acme"], tenants["operator"]
    first = acme.upload("acme-noted", lora_files(20)).json()["version"]
    second = acme.upload("acme-noted", lora_files(21), replace="true").json()["version"]
    acme.ask("POST", "/v1/adapters/acme-noted/rollback")
    operator.ask("POST", "/v1/adapters/acme-noted/pin")
    operator.ask("POST", "/v1/adapters/acme-noted/unpin")
    acme.ask("POST", "/v1/adapters/acme-noted/unload")
    parts = [{"name": "acme-noted"}, {"name": "public-one"}]
    mixed = acme.ask("POST", "/v1/adapters/merge", {"name": "acme-mixed", "adapters": parts}).json()["version"]
    public = operator.ask("GET", "/v1/adapters/public-one").json()["version"]
    tenants["beta"].ask("DELETE", "/v1/adapters/acme-noted")
    acme.complete(adapter="acme-noted", prompt=SECRET_TEXT)
    for name in ("acme-noted", "acme-mixed"):
        acme.ask("DELETE", f"/v1/adapters/{name}")
    lines = [json.loads(record.message) for record in caplog.records if record.name == LOGGER]
    told = [(line["who"], line["verb"], line["adapter"], line["result"]) for line in lines]
    assert told == [
        ("acme", "register", "acme-noted", "done"),
        ("acme", "register", "acme-noted", "done"),
        ("acme", "roll back", "acme-noted", "done"),
        ("operator", "pin", "acme-noted", "done"),
        ("operator", "unpin", "acme-noted", "done"),
        ("acme", "unload", "acme-noted", "done"),
        ("acme", "register", "acme-mixed", "done"),
        ("acme", "merge", "acme-mixed", "done"),
        ("beta", "delete", "acme-noted", "adapter_not_found"),
        ("acme", "delete", "acme-noted", "done"),
        ("acme", "delete", "acme-mixed", "done"),
    ]
    assert [line["version"] for line in lines[:3]] == [first, second, first]
    assert [line["replaced"] for line in lines[:2]] == [None, first], "an upload, and a replacement"
    assert lines[7]["inputs"] == [f"acme-noted@{first}", f"public-one@{public}"]
    assert [(line["version"], line["is_new"], line["replaced"]) for line in lines[6:8]] == [(mixed, True, None)] * 2
    assert sorted(lines[9]["versions"]) == sorted([first, second])
    assert all(line["request_id"].startswith("req_") for line in lines)
    # No log at any level has what a request says, or a key.
    assert SECRET_TEXT not in caplog.text
    assert "secret-of-" not in caplog.text
