"""The request id: on every answer, the client's own where that is safe."""

import pytest

from tests.api.conftest import Live


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


def test_streams_have_one_too(live: Live) -> None:
    answer = live.openai.completions.with_raw_response.create(model="tiny", prompt="Hi", max_tokens=1, stream=True)
    assert answer.headers["x-request-id"].startswith("req_")
    assert list(answer.parse())
