"""The list of adapters in pages: each adapter once, whatever is deleted between two pages."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, serving

NAMES = ("a-1", "a-2", "b", "c", "d")


@pytest.fixture(scope="module")
def shelf(settings: Callable[..., Settings]) -> Iterator[Live]:
    """A server with five adapters."""
    with serving(settings()) as live:
        for seed, name in enumerate(NAMES):
            assert live.upload(name, lora_files(seed)).status_code == 201
        yield live


def page(live: Live, **query: Any) -> dict[str, Any]:
    answer = live.http.get("/v1/adapters", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def names(listed: dict[str, Any]) -> list[str]:
    return [each["name"] for each in listed["data"]]


def test_without_a_limit_all_come_at_once(shelf: Live) -> None:
    listed = page(shelf)
    assert names(listed) == list(NAMES)
    assert (listed["object"], listed["has_more"], listed["first_id"], listed["last_id"]) == ("list", False, "a-1", "d")


def test_pages_follow_one_another_until_there_are_no_more(shelf: Live) -> None:
    found: list[str] = []
    after, has_more = "", True
    while has_more:
        listed = page(shelf, limit=2, after=after)
        found += names(listed)
        after, has_more = listed["last_id"], listed["has_more"]
    assert found == list(NAMES)


def test_a_page_that_ends_with_the_last_one_has_no_more(shelf: Live) -> None:
    assert page(shelf, limit=5)["has_more"] is False
    assert page(shelf, limit=4)["has_more"] is True


def test_a_page_begins_after_a_name_that_is_gone(shelf: Live) -> None:
    assert names(page(shelf, after="a-3", limit=1)) == ["b"]


def test_a_page_after_the_last_one_is_empty(shelf: Live) -> None:
    listed = page(shelf, after="z", limit=3)
    assert (listed["data"], listed["first_id"], listed["last_id"], listed["has_more"]) == ([], None, None, False)


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "many"])
def test_a_limit_that_is_none_is_a_bad_request(shelf: Live, limit: str) -> None:
    answer = shelf.http.get("/v1/adapters", params={"limit": limit})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"
