"""Load, unload, pin and unpin over HTTP, on a real base: the bytes that are told are those that move."""

import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.api.adapter_files import lora_files
from tests.api.conftest import Gate, Live, eventually


@pytest.fixture
def name(live: Live) -> Iterator[str]:
    """An adapter that was just uploaded, gone at the test's end."""
    assert live.upload("moved", lora_files(31)).status_code == 201
    yield "moved"
    live.http.delete("/v1/adapters/moved")


def verb(live: Live, name: str, what: str, **query: str) -> httpx.Response:
    return live.http.post(f"/v1/adapters/{name}/{what}", params=query)


def ask(live: Live, name: str) -> str:
    answer = live.post("/v1/completions", adapter=name, prompt="Hello", max_tokens=8, temperature=0, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_load_and_an_unload_move_the_bytes_that_they_tell(live: Live, name: str) -> None:
    verb(live, name, "unload")
    before = live.server.registry.stats()
    loaded = verb(live, name, "load").json()
    during = live.server.registry.stats()
    assert loaded["tiers"] == ["store", "host", "device"]
    assert loaded["seconds"] >= 0
    assert loaded["tier_bytes"]["host"] == during.host_used_bytes - before.host_used_bytes > 0
    assert loaded["tier_bytes"]["device"] == during.device_used_bytes - before.device_used_bytes > 0
    said = ask(live, name)
    unloaded = verb(live, name, "unload").json()
    after = live.server.registry.stats()
    assert unloaded["freed_bytes"] == {key: loaded["tier_bytes"][key] for key in ("host", "device")}
    assert after.host_used_bytes == before.host_used_bytes
    assert after.device_used_bytes == before.device_used_bytes
    assert (unloaded["name"], unloaded["version"], unloaded["unloaded"]) == (name, loaded["version"], True)
    shown = live.http.get(f"/v1/adapters/{name}").json()
    assert (shown["tiers"], shown["num_requests"], shown["num_running"]) == (["store"], 1, 0)
    assert shown["last_used"] >= shown["created"]
    assert ask(live, name) == said, "it is loaded again and is the same"


def test_an_unload_lets_a_running_request_finish(live: Live, name: str, gate: Gate) -> None:
    gate.allow(8)
    said = ask(live, name)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(live, name)))
    gate.allow(1)
    asking.start()
    eventually(lambda: live.http.get(f"/v1/adapters/{name}").json()["num_running"] == 1)
    refused = verb(live, name, "unload", max_wait_s="0")
    assert refused.status_code == 409
    assert "max_wait_s" in refused.json()["error"]["message"]
    freed: list[httpx.Response] = []
    unloading = threading.Thread(target=lambda: freed.append(verb(live, name, "unload")))
    unloading.start()
    gate.allow(7)
    asking.join(120)
    unloading.join(120)
    assert answers == [said]
    assert freed[0].json()["freed_bytes"]["device"] > 0


def test_a_pin_is_shown_and_refuses_an_unload_until_it_ends(live: Live, name: str) -> None:
    assert verb(live, name, "pin").json()["pinned"] is True
    assert live.metric("graft_adapters_pinned") == 1
    refused = verb(live, name, "unload")
    assert refused.status_code == 409
    assert "/unpin" in refused.json()["error"]["message"]
    assert verb(live, name, "unpin").json()["pinned"] is False
    assert verb(live, name, "unload").status_code == 200
    assert live.metric("graft_adapter_unloads_total") >= 1


@pytest.mark.parametrize("what", ["load", "unload", "pin", "unpin"])
def test_an_unknown_name_is_not_found(live: Live, what: str) -> None:
    missing = verb(live, "nobody", what)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "adapter_not_found"


@pytest.mark.parametrize("wait", ["-1", "nan", "inf", "3601", "soon"])
def test_a_wait_that_is_none_is_refused(live: Live, wait: str) -> None:
    refused = verb(live, "first", "unload", max_wait_s=wait)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_wait_s"


def test_the_verbs_ask_for_the_key(strict: Live) -> None:
    assert httpx.post(f"{strict.url}/v1/adapters/first/unload").status_code == 401
