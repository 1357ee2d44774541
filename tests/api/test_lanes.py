"""What takes long has threads of its own: uploads that are stuck take none from the routes that look and generate."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from server.adapters.asker import OPERATOR, Asker, ask_as
from server.adapters.store.folder_store import INCOMING_FOLDER
from server.api.lanes import Lane
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, eventually

NUM_THREADS_OF_OTHERS = 40  # anyio's, which all other routes share


class Works:
    """Works that end when the test says so, and how many of each have begun."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun: list[str] = []

    def __call__(self, label: str) -> str:
        self.begun.append(label)
        assert self.may_end.wait(60)
        return label


def asked(lane: Lane, works: Works, owner: str | None, label: str) -> "asyncio.Task[str]":
    """A work under way in the name of an owner."""

    async def run() -> str:
        ask_as(OPERATOR if owner is None else Asker(owner, owner))
        return await lane.run(works, label)

    return asyncio.create_task(run())


async def until(is_true: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if is_true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


async def test_one_owner_has_half_of_a_lane_and_the_others_the_rest() -> None:
    lane, works = Lane(4), Works()
    tasks = [asked(lane, works, "acme", "acme") for _ in range(6)]
    await until(lambda: len(works.begun) == 2)
    tasks += [asked(lane, works, owner, str(owner)) for owner in ("beta", None)]
    await until(lambda: len(works.begun) == 4)
    assert sorted(works.begun) == ["None", "acme", "acme", "beta"]
    works.may_end.set()
    assert await asyncio.gather(*tasks) == [*["acme"] * 6, "beta", "None"]
    assert not lane._shares, "nothing is kept of who has nothing under way"


async def test_who_leaves_while_it_waits_gives_its_turn_to_the_next() -> None:
    lane, works = Lane(2), Works()
    first, second, third = (asked(lane, works, "acme", label) for label in ("first", "second", "third"))
    await until(lambda: works.begun == ["first"])
    second.cancel()
    works.may_end.set()
    assert await asyncio.gather(first, third) == ["first", "third"]
    assert second.cancelled()


async def test_what_a_work_raises_comes_out_and_frees_its_place() -> None:
    lane = Lane(2)
    ask_as(Asker("acme", "acme"))

    def fails() -> None:
        raise KeyError("no")

    for _ in range(5):
        with pytest.raises(KeyError):
            await lane.run(fails)


@contextmanager
def stuck_loads(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While this lasts, no adapter that is read gets to its end."""
    registry, may_end = live.server.registry, threading.Event()
    load = registry._load

    def wait_and_load(*arguments: Any) -> Any:
        assert may_end.wait(120)
        return load(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_load", wait_and_load)
        try:
            yield
        finally:
            may_end.set()


def num_received(live: Live) -> int:
    """Uploads whose files have come."""
    return len(list((live.store / INCOMING_FOLDER).glob("*/version/adapter_model.safetensors")))


def test_uploads_that_are_stuck_leave_the_other_routes_their_threads(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, files = [f"stuck-{number}" for number in range(NUM_THREADS_OF_OTHERS + 8)], lora_files(77)
    with ThreadPoolExecutor(len(names)) as clients:
        with stuck_loads(live, monkeypatch):
            uploads = [clients.submit(live.upload, name, files) for name in names]
            eventually(lambda: num_received(live) == len(names))
            assert live.http.get("/v1/models", timeout=60).status_code == 200
            assert live.http.get("/v1/adapters/first", timeout=60).status_code == 200
            body = {"prompt": "Hi", "max_tokens": 2}
            assert live.http.post("/v1/completions", json=body, timeout=60).status_code == 200
            assert live.http.delete("/v1/adapters/nobody", timeout=60).status_code == 404
        assert {upload.result().status_code for upload in uploads} == {201}
        deleted = [clients.submit(live.http.delete, f"/v1/adapters/{name}") for name in names]
        assert {answer.result().status_code for answer in deleted} == {200}
