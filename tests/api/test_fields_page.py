"""docs/fields.md says what the code does, names every field that clients know, and points to tests that exist."""

import ast
from functools import cache
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from server.api.fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, ELSEWHERE
from tests.api.conftest import Live
from tests.api.fields_page import (
    IMPLEMENTED,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    PAGE,
    ROOT,
    all_fields,
    fate,
    table,
    table_in,
)

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
NEUTRAL = {"completions": COMPLETION_NEUTRAL, "chat": CHAT_NEUTRAL}
BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "Hi", "max_tokens": 1},
    "chat": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
}


@cache
def functions_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_page_is_what_the_code_says() -> None:
    """When it is not: `python -m tests.api.fields_page`."""
    assert table_in(PAGE.read_text(encoding="utf-8")) == table()


def test_every_field_that_is_implemented_has_words_and_a_test() -> None:
    implemented = {name for name in all_fields() for endpoint in PATHS if fate(name, endpoint).shown == "yes"}
    assert implemented == set(IMPLEMENTED)


def test_the_tests_that_the_page_names_exist() -> None:
    for name in all_fields():
        for endpoint in PATHS:
            path, _, function = fate(name, endpoint).test.partition("::")
            assert function in functions_in(path), f"{name}: {path} has no {function}"


def test_the_lists_have_every_field_of_openais_own_client() -> None:
    base = completion_create_params.CompletionCreateParamsBase.__annotations__
    assert set(base) | {"stream"} == OPENAI_COMPLETIONS
    chat = chat_create_params.CompletionCreateParamsBase.__annotations__
    assert set(chat) | {"stream"} == OPENAI_CHAT


def test_no_field_that_clients_know_is_left_to_the_policy_for_unknown_ones() -> None:
    """Each refusal has its own advice, and --unknown-fields warn lets none of them pass."""
    for name in all_fields():
        for endpoint in PATHS:
            assert fate(name, endpoint).sentence is None or name in ELSEWHERE or name in NEUTRAL[endpoint], name


@pytest.mark.parametrize("endpoint", PATHS)
def test_what_the_page_calls_refused_is_refused_in_its_words(live: Live, endpoint: str) -> None:
    for name in all_fields():
        told = fate(name, endpoint)
        if told.sentence is None:
            continue
        answer = live.post(PATHS[endpoint], **BODIES[endpoint], **{name: "what nobody can mean"})
        assert answer.status_code == 400, name
        error = answer.json()["error"]
        assert (error["param"], error["code"], error["message"]) == (name, "unsupported", told.sentence)
