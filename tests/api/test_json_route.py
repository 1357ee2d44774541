"""Bodies in JSON, read strictly: what could be understood in two ways is refused, and what is refused is explained."""

import contextlib
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.json_route import read_json
from server.ground.errors import BadRequest
from tests.api.conftest import Live

JSON = {"content-type": "application/json"}
ROUTES = [
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v1/adapters/merge",
    "/v1/adapters/first/rollback",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
]
EVERY = pytest.mark.parametrize("path", ROUTES)


def send(live: Live, path: str, body: bytes, **headers: str) -> httpx.Response:
    return live.http.post(path, content=body, headers=headers or JSON)


@EVERY
@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": ""},
        {"content-type": "json"},
        {"accept": "*/*"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
    ids=str,
)
def test_another_media_type_is_a_415_with_the_remedy(live: Live, path: str, headers: dict[str, str]) -> None:
    refused = live.http.post(path, content=b'{"prompt": "Hi"}', headers=headers)
    assert refused.status_code == 415
    error = refused.json()["error"]
    assert error["code"] == "unsupported_media_type"
    assert "Content-Type: application/json" in error["message"] or "Content-Encoding" in error["message"]


@pytest.mark.parametrize(
    "kind",
    ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json", 'application/json;a="b"'],
)
def test_json_by_its_other_names_is_read(live: Live, kind: str) -> None:
    answer = send(live, "/v1/completions", b'{"prompt": "Hi", "max_tokens": 1}', **{"content-type": kind})
    assert answer.status_code == 200


@EVERY
def test_a_field_that_is_there_twice_is_refused_by_name(live: Live, path: str) -> None:
    for body in (b'{"name": "a", "name": "a"}', b'{"x": [{"y": {"name": 1, "z": 2, "name": 3}}]}'):
        refused = send(live, path, body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "name"
        assert "twice" in refused.json()["error"]["message"]


@EVERY
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\n"}', "control character"),
        ('{"é": x}'.encode(), "(byte 7)"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "too many digits"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_json_is_told_why(live: Live, path: str, body: bytes, words: str) -> None:
    refused = send(live, path, body)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
    assert len(refused.content) < 500


@pytest.mark.parametrize("body", [b'{"name": "a", "name": "b"}', b"{", b"[" * 50_000, b'{"name": NaN}'], ids=str)
def test_the_order_of_a_fetch_is_read_so_too(live: Live, body: bytes) -> None:
    refused = send(live, "/v1/adapters", body[:60_000])
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


@EVERY
@pytest.mark.parametrize("body", [b"[1]", b'"x"', b"5", b"true", b"[]"])
def test_what_is_no_object_is_told_so(live: Live, path: str, body: bytes) -> None:
    refused = send(live, path, body)
    assert refused.status_code == 400
    assert "JSON object" in refused.json()["error"]["message"]


def test_a_body_that_may_be_left_out_may_be_left_out(live: Live) -> None:
    for body in (b"", b"null"):
        answer = send(live, "/v1/adapters/first/rollback", body)
        assert answer.json()["error"]["code"] != "unsupported_media_type"
        assert "JSON" not in answer.json()["error"]["message"]  # but that there is no version before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=100)
@given(json_values)
def test_every_value_is_read_as_it_was_written(value: object) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value).encode("utf-8-sig")) == value


@settings(max_examples=100)
@given(st.binary(max_size=40))
def test_no_bytes_are_more_than_a_bad_request(content: bytes) -> None:
    with contextlib.suppress(BadRequest):
        read_json(content)
