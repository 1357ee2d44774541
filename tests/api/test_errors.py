"""Every failure is OpenAI's error object, with an id, and says no more than it must."""

import httpx
import openai
import pytest

from tests.api.conftest import Gate, Live, eventually

JSON = {"content-type": "application/json"}


def error(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert answer.headers["x-request-id"]
    found: dict[str, str | None] = body["error"]
    return found


def test_an_unknown_route(live: Live) -> None:
    answer = live.http.get("/v2/nothing")
    assert answer.status_code == 404
    assert error(answer)["code"] == "route_not_found"


def test_a_wrong_method(live: Live) -> None:
    answer = live.http.get("/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert error(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"n": 1e999}'])
def test_a_body_that_is_no_json_object(live: Live, body: bytes) -> None:
    answer = live.http.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert error(answer)["type"] == "invalid_request_error"


def test_a_body_without_its_content_type_is_told_the_remedy(live: Live) -> None:
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        answer = live.http.post("/v1/completions", content=b'{"prompt": "Hi"}', headers=headers)
        assert answer.status_code == 415
        assert "Content-Type: application/json" in str(error(answer)["message"])


def test_errors_do_not_repeat_what_was_sent(live: Live) -> None:
    for body in (
        {"prompt": "Hi", "x" * 50_000: 1},
        {"prompt": "Hi", "model": "x" * 50_000},
        {"prompt": "Hi", "adapter": "x" * 50_000},
        {"prompt": "Hi", "temperature": "x" * 50_000},
        {"prompt": ["x", 1] * 50_000},
        {"prompt": "Hi", "stop": [1] * 50_000},
    ):
        assert len(live.http.post("/v1/completions", json=body).content) < 2_000
    messages = [{"role": "x" * 1000}] * 4000
    assert len(live.http.post("/v1/chat/completions", json={"messages": messages}).content) < 2_000
    assert len(live.http.get("/" + "x" * 10_000).content) < 2_000


def test_a_defect_is_a_500_that_tells_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect() -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(live.server.registry, "list", defect)
    answer = live.http.get("/v1/models", headers={"x-request-id": "the-one"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "the-one"
    assert error(answer)["code"] == "internal_error"
    assert "secret" not in answer.text


def test_a_full_queue_asks_to_come_back(strict: Live, strict_gate: Gate) -> None:
    engine = strict.server.engine
    running = strict.send("/v1/completions", prompt="Hi", max_tokens=200)
    eventually(lambda: engine.stats().num_running == 1)
    waiting = strict.send("/v1/completions", prompt="Hi", max_tokens=200, n=4)
    eventually(lambda: engine.stats().num_waiting == 4)
    with pytest.raises(openai.InternalServerError) as refused:
        strict.openai.completions.create(model="tiny", prompt="Hi")
    assert refused.value.status_code == 503
    assert refused.value.code == "overloaded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for connection in (running, waiting):
        connection.close()
    strict_gate.allow(1_000)
    eventually(lambda: engine.stats().num_in_flight == 0)
