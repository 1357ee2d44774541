"""--allowed-origins: which web pages may ask from a browser, and what they may read of an answer."""

from collections.abc import Callable, Iterator

import pytest

from server.ground.config import Settings, load
from server.ground.errors import StartupRefused
from tests.api.conftest import KEY, Live, serving

CHAT_PAGE = "https://chat.example"
ELSEWHERE = "https://evil.example"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
BODY = {"prompt": "Hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def open_to_one(settings: Callable[..., Settings]) -> Iterator[Live]:
    with serving(settings(allowed_origins=(CHAT_PAGE, "http://localhost:3000"))) as live:
        yield live


@pytest.fixture(scope="module")
def open_to_all(settings: Callable[..., Settings]) -> Iterator[Live]:
    with serving(settings(allowed_origins=("*",), api_key=KEY)) as live:
        yield live


def test_a_page_that_is_allowed_may_ask_and_read(open_to_one: Live) -> None:
    for origin in (CHAT_PAGE, "http://localhost:3000"):
        asked = open_to_one.http.options("/v1/completions", headers={"origin": origin, **ASKS})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        assert asked.headers["x-request-id"]
        answer = open_to_one.http.post("/v1/completions", json=BODY, headers={"origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_another_page_may_not(open_to_one: Live) -> None:
    for origin in (ELSEWHERE, "null", "https://chat.example.evil.example", "http://chat.example"):
        asked = open_to_one.http.options("/v1/completions", headers={"origin": origin, **ASKS})
        assert asked.status_code == 400
        answer = open_to_one.http.post("/v1/completions", json=BODY, headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        assert "--allowed-origins" in answer.json()["error"]["message"]


def test_an_error_can_be_read_by_the_page_too(open_to_one: Live) -> None:
    for path, status in (("/v1/models/nobody", 404), ("/nowhere", 404), ("/v1/completions", 405)):
        answer = open_to_one.http.get(path, headers={"origin": CHAT_PAGE})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == CHAT_PAGE


def test_with_a_key_every_page_may_ask_and_needs_the_key(open_to_all: Live) -> None:
    without = {"authorization": "", "origin": ELSEWHERE}
    asked = open_to_all.http.options("/v1/completions", headers={**without, **ASKS})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "*"
    refused = open_to_all.http.post("/v1/completions", json=BODY, headers=without)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"
    assert open_to_all.http.post("/v1/completions", json=BODY, headers={"origin": ELSEWHERE}).status_code == 200


def test_programs_notice_nothing(open_to_one: Live) -> None:
    answer = open_to_one.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_by_default_there_is_nothing_to_negotiate(live: Live) -> None:
    asked = live.http.options("/v1/completions", headers={"origin": CHAT_PAGE, **ASKS})
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://Chat.example", "null", "https://", "https://a b", ""]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(StartupRefused, match="origin"):
        load({"model": "x", "allowed_origins": [origin]})


def test_all_pages_need_a_key() -> None:
    with pytest.raises(StartupRefused, match="GRAFT_API_KEY"):
        load({"model": "x", "allowed_origins": ["*"]})
    assert load({"model": "x", "allowed_origins": ["*"], "api_key": "k"}).allowed_origins == ("*",)
