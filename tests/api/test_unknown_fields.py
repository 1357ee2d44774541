"""--unknown-fields warn: what no server is known for passes, and the answer says so; all else is refused as ever."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.api.fields import BOOKKEEPING, ELSEWHERE
from server.api.schemas import ChatBody, CompletionBody
from server.api.unknown_fields import HEADER
from server.ground.config import Settings
from tests.api.conftest import Live, serving

TEXT = ("/v1/completions", {"prompt": "Hi", "max_tokens": 1})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
BOTH = pytest.mark.parametrize(("path", "body"), [TEXT, CHAT], ids=["completions", "chat"])


@pytest.fixture(scope="module")
def warning(settings: Callable[..., Settings]) -> Iterator[Live]:
    with serving(settings(unknown_fields="warn")) as live:
        yield live


def ignored(answer: httpx.Response) -> str | None:
    assert answer.status_code == 200, answer.text
    header: str | None = answer.headers.get(HEADER)
    return header


@BOTH
def test_unknown_fields_pass_and_are_named(warning: Live, path: str, body: dict[str, Any]) -> None:
    assert ignored(warning.post(path, **body)) is None
    assert ignored(warning.post(path, **body, zeta=1, alpha={"x": None})) == "zeta, alpha"
    assert ignored(warning.post(path, **body, stream=True, zeta=1)) == "zeta"


@BOTH
def test_null_and_bookkeeping_are_nothing_to_name(warning: Live, path: str, body: dict[str, Any]) -> None:
    assert ignored(warning.post(path, **body, **dict.fromkeys(BOOKKEEPING, "x"), unheard_of=None)) is None


def test_those_within_other_objects_are_named_too(warning: Live) -> None:
    path, body = CHAT
    message = {"role": "user", "content": "Hi", "cache_control": {"type": "ephemeral"}}
    assert ignored(warning.post(path, **{**body, "messages": [message]})) == "cache_control"
    options = {"include_usage": True, "verbose": True}
    assert ignored(warning.post(path, **body, stream=True, stream_options=options)) == "verbose"
    assert ignored(warning.post("/tokenize", prompt="Hi", verbose=True)) == "verbose"


@BOTH
def test_what_would_change_the_answer_is_refused_all_the_same(warning: Live, path: str, body: dict[str, Any]) -> None:
    model = CompletionBody if path == TEXT[0] else ChatBody
    for name, value in [*((name, "x") for name in ELSEWHERE), ("use_beam_search", True)]:
        if name not in model.model_fields:
            refused = warning.post(path, **body, **{name: value})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


def test_names_that_a_header_cannot_hold_are_encoded(warning: Live) -> None:
    path, body = TEXT
    names = {"a b": 1, "c,d": 2, "é\r\nset-cookie: x=1": 3, "%": 4, "": 5}
    assert ignored(warning.post(path, **body, **names)) == 'a%20b, c%2Cd, %C3%A9%0D%0Aset-cookie%3A%20x%3D1, %25, ""'


def test_many_names_are_counted_and_long_ones_cut(warning: Live) -> None:
    path, body = TEXT
    header = ignored(warning.post(path, **body, **{f"{i:03}{'x' * 100}": i for i in range(40)}))
    assert header is not None
    *names, more = header.split(", ")
    assert len(names) == 32
    assert all(len(name) == 64 for name in names)
    assert more == "+8"


def test_without_it_the_first_is_refused_and_nothing_named(live: Live) -> None:
    for path, body in (TEXT, CHAT):
        refused = live.post(path, **body, zeta=1)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "zeta"
        assert HEADER not in refused.headers


def test_what_other_servers_call_differently_is_refused_with_our_word(live: Live) -> None:
    path, body = TEXT
    for name, remedy in ELSEWHERE.items():
        if name not in CompletionBody.model_fields:
            error = live.post(path, **body, **{name: "x"}).json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported")
            assert remedy in error["message"]
