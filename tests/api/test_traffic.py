"""The request id: on every answer, the client's own where that is safe."""

from typing import Any

import pytest

from tests.api.conftest import Live, eventually


def test_the_clients_id_comes_back(live: Live) -> None:
    for path in ("/health", "/nowhere", "/v1/models"):
        assert live.http.get(path, headers={"x-request-id": "trace:1.a_B-2"}).headers["x-request-id"] == "trace:1.a_B-2"


@pytest.mark.parametrize("sent", ["", "has space", "x" * 129, 'quote"', "tab\tx", "<script>", "ü"])
def test_an_id_that_could_do_harm_is_replaced(live: Live, sent: str) -> None:
    answer = live.http.get("/health", headers=[(b"x-request-id", sent.encode())])
    assert answer.headers["x-request-id"].startswith("req_")


def test_every_answer_has_an_id_of_its_own(live: Live) -> None:
    ids = {live.http.get("/health").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


def test_the_id_leads_to_what_the_log_says_of_a_failure(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*step: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(live.server.runner, "run", broken)
    for stream in (True, False):
        headers = {"x-request-id": f"trace-{stream}"}
        live.http.post("/v1/completions", json={"prompt": "Hi", "stream": stream}, headers=headers)
        assert f"request trace-{stream} was answered with 500 generation_failed" in caplog.text


def test_each_answer_is_a_line_of_the_log_in_detail(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="server.api.traffic"):
        live.http.get("/v1/models/nobody", headers={"x-request-id": "trace-9"})
        eventually(lambda: "request trace-9: GET '/v1/models/nobody' was answered with 404 after" in caplog.text)


def test_streams_have_one_too(live: Live) -> None:
    answer = live.openai.completions.with_raw_response.create(model="tiny", prompt="Hi", max_tokens=1, stream=True)
    assert answer.headers["x-request-id"].startswith("req_")
    assert list(answer.parse())
