"""A server with little room, in the tests' process, with demo adapters of five methods; and what it must be at rest."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from server.adapters.store.folder_store import INCOMING_FOLDER
from server.ground.config import Settings
from tests.adapters.remote.site import Site
from tests.api.conftest import Live, serving
from tests.faults.load import ADAPTERS, MODEL, STORE, Case, Load, await_that, right_answers
from tests.test_isolation import check_nothing_leaks

_SLACK = 4  # threads and descriptors that come and go with connections

Faulted = Callable[[], AbstractContextManager[Load]]


def fill_store(store: Path) -> Path:
    for name in ADAPTERS:
        shutil.copytree(STORE / name, store / name)
    return store


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Live]:
    """Room for few blocks, few sequences and few adapters at once, so that all of them are always on the move."""
    settings = Settings(
        model=str(MODEL),
        store=fill_store(tmp_path_factory.mktemp("store")),
        quantize="none",
        dtype="float32",
        device="cpu",
        kv_memory="1MiB",
        block_size=16,
        max_sequences=6,
        max_queued=24,
        adapter_memory="4MiB",
        max_adapter_wait=0.5,
        request_timeout=100,
        store_reserve=0,
        allow_source=(f"{site.url}/",),
    )
    with serving(settings) as live:
        yield live


@pytest.fixture(scope="module")
def right(live: Live) -> Iterator[Mapping[Case, str]]:
    """The right answers; when all faults are over, threads and descriptors are what they were at the beginning."""
    right = right_answers(live.http)
    with Load(live.url, right).running():  # starts what is started when it is first needed
        pass
    before = _num_threads(), _num_descriptors()
    yield right

    def are_back() -> bool:
        live.post("/v1/completions", prompt="Hi", max_tokens=1)  # lets go of idle threads
        time.sleep(0.5)
        return _num_threads() <= before[0] + _SLACK and _num_descriptors() <= before[1] + _SLACK

    await_that(are_back, lambda: f"threads and descriptors were {before}: {_num_threads()}, {_num_descriptors()}")


@pytest.fixture
def faulted(live: Live, right: Mapping[Case, str]) -> Faulted:
    """The server under load; afterwards, the third count: nothing is left over."""

    @contextmanager
    def faulted() -> Iterator[Load]:
        with Load(live.url, right).running() as load:
            yield load
        await_that(lambda: live.server.engine.stats().num_in_flight == 0)
        await_that(lambda: live.server.registry.stats().num_leases == 0)
        await_that(lambda: list((live.store / INCOMING_FOLDER).iterdir()) == [])
        check_nothing_leaks(live.server)

    return faulted


def _num_threads() -> int:
    return threading.active_count()


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
