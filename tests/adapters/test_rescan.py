"""The rescan thread: it looks until it is closed, and survives a disk error."""

import threading

from server.adapters.rescan import Rescan


def test_it_looks_again_until_it_is_closed() -> None:
    looks = threading.Semaphore(0)
    rescan = Rescan(looks.release, interval_s=0.001)
    for _ in range(3):
        assert looks.acquire(timeout=120)
    rescan.close()
    while looks.acquire(blocking=False):
        pass
    assert not looks.acquire(timeout=0.05)


def test_a_disk_error_does_not_end_it() -> None:
    looks = threading.Semaphore(0)

    def look() -> None:
        looks.release()
        raise OSError("the disk is gone")

    rescan = Rescan(look, interval_s=0.001)
    assert looks.acquire(timeout=120)
    assert looks.acquire(timeout=120)
    rescan.close()
