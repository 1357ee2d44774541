"""Other ways to say what a route answers, and what is told to who names no route."""

import pytest

from tests.api.conftest import Live


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/org/tiny", "/v1/adapters/first", "/metrics"])
def test_head_is_get_without_the_body(live: Live, path: str) -> None:
    head, get = live.http.head(path), live.http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0
    assert head.headers["x-request-id"]


def test_head_of_what_is_not_there(live: Live) -> None:
    assert live.http.head("/v1/models/nobody").status_code == 404
    assert live.http.head("/v1/completions").status_code == 405


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/org/tiny", "/v1/adapters", "/health", "/v1/adapters/first"])
def test_a_slash_behind_the_path_changes_nothing(live: Live, path: str) -> None:
    assert live.http.get(f"{path}/").json() == live.http.get(path).json()


def test_a_slash_behind_the_path_of_a_post_keeps_the_body(live: Live) -> None:
    answer = live.post("/v1/completions/", prompt="Hi", max_tokens=1)
    assert answer.status_code == 200
    assert answer.history == []
    assert live.http.post("/v1/adapters/", data={"name": "x"}, files={"config": b"{"}).status_code == 400


def test_several_slashes_are_another_path(live: Live) -> None:
    assert live.http.get("/v1/adapters//").status_code == 404
    assert live.http.get("//health").status_code == 404
    assert live.http.get("/").status_code == 404


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/completions", "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/adapters", "GET, HEAD, POST"),
        ("/v1/adapters/first", "DELETE, GET, HEAD, PUT"),
        ("/v1/adapters/first/fetch", "DELETE, GET, HEAD"),
        ("/v1/adapters/first/", "DELETE, GET, HEAD, PUT"),
        ("/ping", "GET, HEAD, POST"),
    ],
)
def test_a_method_that_a_path_does_not_take_is_told_those_that_it_takes(live: Live, path: str, methods: str) -> None:
    for method in ("PATCH", "OPTIONS", "TRACE"):
        refused = live.http.request(method, path)
        assert refused.status_code == 405
        assert refused.headers["allow"] == methods
        assert methods in refused.json()["error"]["message"]


def test_a_path_without_its_version_is_told_so(live: Live) -> None:
    for path in ("/completions", "/chat/completions", "/models"):
        assert "begin with /v1" in live.post(path).json()["error"]["message"]
    for path in ("/v1/nothing", "/v2/completions", "/nothing"):
        assert "begin with /v1" not in live.post(path).json()["error"]["message"]
