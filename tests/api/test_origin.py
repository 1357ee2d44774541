"""Web pages of other sites and a server without a key: they may read what a browser lets them, and change nothing."""

from collections.abc import Iterator

import pytest

from tests.api.adapter_files import lora_files
from tests.api.conftest import Live

NAME = "by-a-page"


@pytest.fixture
def origin(live: Live) -> Iterator[str]:
    """The server's own, as a browser would send it."""
    yield live.url
    live.http.delete(f"/v1/adapters/{NAME}")


def upload(live: Live, headers: dict[str, str]) -> int:
    form, files = {"name": NAME}, lora_files(61).parts()
    return live.http.post("/v1/adapters", data=form, files=files, headers=headers).status_code


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},  # a sandboxed frame, a local file
    {"origin": ""},
    {"origin": "http://127.0.0.1:1"},  # another program's page on this machine
    {"origin": "http://localhost.evil.example"},
    {"origin": "http://["},
    {"origin": "http://127.0.0.1:99999999"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_foreign_page_can_neither_upload_nor_delete_nor_generate(live: Live, headers: dict[str, str]) -> None:
    num_before = len(live.http.get("/v1/adapters").json()["data"])
    assert upload(live, headers) == 403
    assert live.http.delete("/v1/adapters/first", headers=headers).status_code == 403
    asked = live.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}, headers=headers)
    assert asked.status_code == 403
    assert asked.json()["error"]["code"] == "foreign_origin"
    assert "GRAFT_API_KEY" in asked.json()["error"]["message"]
    assert len(live.http.get("/v1/adapters").json()["data"]) == num_before


def test_a_name_that_a_stranger_points_at_this_machine_is_foreign(live: Live) -> None:
    port = live.address[1]
    headers = {"host": f"rebound.example:{port}", "origin": f"http://rebound.example:{port}"}
    assert upload(live, headers) == 403


def test_reading_needs_no_page_of_ones_own(live: Live) -> None:
    assert live.http.get("/v1/adapters", headers={"origin": "https://evil.example"}).status_code == 200


@pytest.mark.parametrize("site", [None, "same-origin"])
def test_the_servers_own_page_may(live: Live, origin: str, site: str | None) -> None:
    headers = {"origin": origin} if site is None else {"origin": origin, "sec-fetch-site": site}
    assert upload(live, headers) in (201, 200)


@pytest.mark.parametrize("name", ["localhost", "[::1]", "127.0.0.2"])
def test_by_any_loopback_name(live: Live, origin: str, name: str) -> None:
    own = f"{name}:{live.address[1]}"
    assert upload(live, {"host": own, "origin": f"http://{own}"}) in (201, 200)
    assert upload(live, {"host": own, "origin": f"http://{own}1"}) == 403


def test_what_a_person_started_and_what_programs_send_passes(live: Live, origin: str) -> None:
    assert upload(live, {"sec-fetch-site": "none"}) in (201, 200)
    assert upload(live, {}) in (201, 200)


def test_with_a_key_the_key_alone_decides(strict: Live) -> None:
    headers = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
    body = {"prompt": "Hi", "max_tokens": 1}
    assert strict.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    bare = headers | {"authorization": "Bearer wrong"}
    assert strict.http.post("/v1/completions", json=body, headers=bare).status_code == 401
