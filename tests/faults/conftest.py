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
from tests.faults.load import ADAPTERS, MODEL, SLACK, STORE, Case, Load, right_answers, settled
from tests.faults.record import Counts, note
from tests.test_isolation import check_nothing_leaks

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
    with Load(lambda: live.url, right).running():  # starts what is started when it is first needed
        pass
    num_threads, num_descriptors = _num_threads(), _num_descriptors()
    yield right

    def left_over() -> dict[str, int]:
        live.post("/v1/completions", prompt="Hi", max_tokens=1)  # lets go of idle threads
        time.sleep(0.5)
        return {
            "threads": max(_num_threads() - num_threads - SLACK, 0),
            "descriptors": max(_num_descriptors() - num_descriptors - SLACK, 0),
        }

    found = settled(left_over)
    note(Counts("when all in the tests' process were over", left_over=found))
    assert not any(found.values()), found


def left_over_in(live: Live) -> dict[str, int]:
    """What a server in the tests' process holds for requests that are over."""
    engine, registry = live.server.engine.stats(), live.server.registry.stats()
    return {
        "sequences": engine.num_in_flight,
        "blocks": engine.num_used_blocks,
        "leases": registry.num_leases,
        "residencies": registry.num_residencies,
    }


@pytest.fixture
def faulted(live: Live, right: Mapping[Case, str]) -> Faulted:
    """The server under load; afterwards, what is left over for the third count."""

    def left_over() -> dict[str, int]:
        return left_over_in(live) | {"files": len(list((live.store / INCOMING_FOLDER).iterdir()))}

    @contextmanager
    def faulted() -> Iterator[Load]:
        with Load(lambda: live.url, right).running() as load:
            yield load
        load.left_over = settled(left_over)
        check_nothing_leaks(live.server)

    return faulted


def _num_threads() -> int:
    return threading.active_count()


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
