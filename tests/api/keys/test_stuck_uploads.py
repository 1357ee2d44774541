"""Uploads that are validated share a few threads: one owner of keys cannot have them all."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.adapter_files import lora_files
from tests.api.conftest import eventually
from tests.api.keys.conftest import Tenants
from tests.api.test_lanes import num_received, stuck_loads


def test_one_keys_stuck_uploads_leave_another_key_its_turn(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's upload is refused for what it says, which takes a thread of the same lane, and no load."""
    live, files = tenants.live, lora_files(78)
    with ThreadPoolExecutor(16) as clients:
        with stuck_loads(live, monkeypatch):
            acme = tenants["acme"]
            uploads = [clients.submit(acme.upload, f"acme-stuck-{number}", files) for number in range(16)]
            eventually(lambda: num_received(live) == len(uploads))
            refused = tenants["beta"].upload("tiny", files)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert {upload.result().status_code for upload in uploads} == {201}
    for number in range(16):
        assert acme.ask("DELETE", f"/v1/adapters/acme-stuck-{number}").status_code == 200
