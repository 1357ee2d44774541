"""The rescan thread: it looks until it is closed, and survives what cannot be read."""

import threading

import pytest

from server.adapters.rescan import Rescan
from server.ground.errors import StoreUnreachable


def test_it_looks_again_until_it_is_closed() -> None:
    looks = threading.Semaphore(0)
    rescan = Rescan(looks.release, interval_s=0.001)
    for _ in range(3):
        assert looks.acquire(timeout=120)
    rescan.close()
    while looks.acquire(blocking=False):
        pass
    assert not looks.acquire(timeout=0.05)


@pytest.mark.parametrize(
    "error", [OSError("the disk is gone"), StoreUnreachable("The store does not answer."), ValueError("unforeseen")]
)
def test_what_cannot_be_looked_at_does_not_end_it(error: Exception) -> None:
    looks = threading.Semaphore(0)

    def look() -> None:
        looks.release()
        raise error

    rescan = Rescan(look, interval_s=0.001)
    assert looks.acquire(timeout=120)
    assert looks.acquire(timeout=120)
    rescan.close()
