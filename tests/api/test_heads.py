"""The heads of requests and answers: limits on the ones, words for browsers in the others."""

import httpx
import pytest

from server.api.heads import MAX_HEADERS, MAX_HEADERS_BYTES, MAX_TARGET_BYTES, SAFE_HEADERS
from tests.api.conftest import Live


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/v1/models"), ("GET", "/nowhere"), ("POST", "/v1/completions"), ("HEAD", "/metrics")],
)
def test_every_answer_tells_browsers_to_take_it_for_data(live: Live, method: str, path: str) -> None:
    answer = live.http.request(method, path)
    assert {name: answer.headers[name] for name in SAFE_HEADERS} == SAFE_HEADERS
    assert httpx.request(method, live.url + path, headers={"origin": "http://x"}, timeout=120).headers.keys() >= {
        *SAFE_HEADERS
    }


def test_a_stream_has_its_own_word_on_caches(live: Live) -> None:
    answer = live.post("/v1/completions", prompt="Hi", max_tokens=1, stream=True)
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "path", "words"),
    [
        ({f"x-{number}": "y" for number in range(MAX_HEADERS)}, "/health", f"at most {MAX_HEADERS}"),
        ({f"x-{number}": "y" * 2000 for number in range(17)}, "/health", f"larger than {MAX_HEADERS_BYTES}"),
        ({}, f"/v1/adapters/{'a' * MAX_TARGET_BYTES}", f"larger than {MAX_TARGET_BYTES}"),
        ({}, f"/v1/adapters?after={'a' * MAX_TARGET_BYTES}", f"larger than {MAX_TARGET_BYTES}"),
    ],
    ids=["headers", "bytes", "path", "query"],
)
def test_a_head_over_its_limits_is_a_431(live: Live, headers: dict[str, str], path: str, words: str) -> None:
    refused = live.http.get(path, headers=headers)
    assert refused.status_code == 431
    assert words in refused.json()["error"]["message"]
    assert refused.json()["error"]["code"] == "head_too_large"
    assert refused.headers["x-request-id"]
