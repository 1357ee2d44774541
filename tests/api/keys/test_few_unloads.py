"""Unloads that wait take places that all owners share: a key has few of them, and not for long."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.adapter_files import lora_files
from tests.api.conftest import Gate, eventually
from tests.api.keys.conftest import Tenants


def test_a_key_does_not_wait_for_as_long_as_the_operator(tenants: Tenants) -> None:
    for name, status in (("acme", 400), ("operator", 200)):
        answer = tenants[name].ask("POST", "/v1/adapters/public-one/unload?max_wait_s=301")
        assert answer.status_code == status


def test_a_third_unload_of_a_key_does_not_wait(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, runner = tenants["acme"], tenants.live.server.runner
    assert acme.upload("acme-busy", lora_files(31)).status_code == 201
    gate = Gate(runner.run)
    monkeypatch.setattr(runner, "run", gate)
    content = tenants.live.server.registry._books.catalog.entries["acme-busy"].current.content
    with ThreadPoolExecutor(3) as pool:
        try:
            asked = pool.submit(acme.complete, adapter="acme-busy")
            eventually(lambda: content.num_residencies == 1)
            unloads = [pool.submit(acme.ask, "POST", "/v1/adapters/acme-busy/unload") for _ in range(2)]
            eventually(lambda: content.num_unloads == 2)
            assert acme.ask("POST", "/v1/adapters/acme-busy/unload").status_code == 429
        finally:
            gate.allow(1_000_000)
        assert [asked.result().status_code, *(unload.result().status_code for unload in unloads)] == [200, 200, 200]
    assert acme.ask("POST", "/v1/adapters/acme-busy/unload").status_code == 200
    assert acme.ask("DELETE", "/v1/adapters/acme-busy").status_code == 200
