"""Versions over HTTP: history and rollback."""

from collections.abc import Callable, Iterator

import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Gate, Live, eventually, serving
from tests.api.test_adapters import text


@pytest.fixture
def name(live: Live) -> Iterator[str]:
    yield "rolled"
    live.http.delete("/v1/adapters/rolled")


def upload(live: Live, name: str, seed: int) -> str:
    answer = live.upload(name, lora_files(seed), replace="true")
    assert answer.status_code == 201, answer.text
    return str(answer.json()["version"])


def test_the_history_says_what_is_current_and_what_is_kept(live: Live, name: str) -> None:
    versions = [upload(live, name, seed) for seed in (41, 42, 43, 44)]
    text(live, adapter=name)
    listed = live.http.get(f"/v1/adapters/{name}/versions").json()
    assert (listed["object"], listed["name"], listed["max_versions"]) == ("list", name, 3)
    assert [item["version"] for item in listed["data"]] == versions[:0:-1], "the first is over the number kept"
    assert [item["current"] for item in listed["data"]] == [True, False, False]
    assert [item["num_requests"] for item in listed["data"]] == [1, 0, 0]
    assert all(item["bytes"] > 0 and item["added"] > 0 for item in listed["data"])
    assert live.http.get("/v1/adapters/nobody/versions").status_code == 404


def test_a_rollback_answers_with_the_version_that_serves_the_next_request(live: Live, name: str) -> None:
    first = upload(live, name, 45)
    said = text(live, adapter=name)
    second = upload(live, name, 46)
    assert text(live, adapter=name) != said
    back = live.http.post(f"/v1/adapters/{name}/rollback")
    assert back.status_code == 200
    assert (back.json()["version"], back.json()["previous_version"]) == (first, second)
    assert text(live, adapter=name) == said
    forward = live.http.post(f"/v1/adapters/{name}/rollback", json={"version": second[:12]})
    assert forward.json()["version"] == second


def test_a_request_that_runs_over_a_rollback_does_not_mix(live: Live, name: str, gate: Gate) -> None:
    upload(live, name, 47)
    gate.allow(20)
    first = text(live, adapter=name)
    upload(live, name, 48)
    gate.allow(20)
    second = text(live, adapter=name)
    gate.allow(1)
    with live.openai.completions.create(
        model=name, prompt="Hello", max_tokens=20, temperature=0, logprobs=0, stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:  # fmt: skip
        chunks = iter(stream)
        said = next(chunks).choices[0].text
        assert live.http.post(f"/v1/adapters/{name}/rollback").status_code == 200
        gate.allow(19)
        said += "".join(chunk.choices[0].text for chunk in chunks)
    assert said == second != first
    gate.allow(20)
    assert text(live, adapter=name) == first


def test_a_rollback_survives_a_restart(settings: Callable[..., Settings]) -> None:
    same = settings()
    with serving(same) as live:
        first = upload(live, "kept", 49)
        upload(live, "kept", 50)
        live.http.post("/v1/adapters/kept/rollback")
    with serving(same) as live:
        assert live.http.get("/v1/adapters/kept").json()["version"] == first
        assert live.http.get("/v1/adapters/kept").json()["num_requests"] == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"version": "latest"}, 400, "version"),
        ({"version": "abc"}, 400, "version"),
        ({"versions": "abcdef"}, 400, "versions"),
        ({"version": "000000"}, 404, "adapter"),
        ({}, 409, "adapter"),
    ],
)
def test_a_rollback_to_nowhere_is_refused(live: Live, name: str, body: dict[str, str], status: int, param: str) -> None:
    version = upload(live, name, 51)
    refused = live.post(f"/v1/adapters/{name}/rollback", **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
    assert live.http.get(f"/v1/adapters/{name}").json()["version"] == version


def test_a_deletion_refuses_new_requests_and_drains(live: Live, name: str, gate: Gate) -> None:
    upload(live, name, 52)
    before = live.server.registry.stats().device_used_bytes
    gate.allow(1)
    with live.openai.completions.create(
        model=name, prompt="Hello", max_tokens=5, temperature=0, logprobs=0, stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:  # fmt: skip
        chunks = iter(stream)
        next(chunks)
        assert live.server.registry.stats().device_used_bytes > before
        assert live.http.delete(f"/v1/adapters/{name}").status_code == 200
        assert live.post("/v1/completions", prompt="Hi", adapter=name).status_code == 404
        gate.allow(4)
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    eventually(lambda: live.server.registry.stats().device_used_bytes == before)
