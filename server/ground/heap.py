"""What glibc's malloc keeps for itself: how many heaps there are, and memory that is free but not given back. What
Python's collector of unreachable objects goes through. And the size of pages.

Owns those settings of the process. Knows nothing about what is allocated.

glibc gives each busy thread a heap ("arena") of its own. Adapters come and go on loader threads, request threads and
the engine's; what one heap has free is of no use to another, so a server that does the same all day grows for hours.
And what a burst of requests has used stays with the process after it, free and in pieces.

The price of one heap is one lock: threads that allocate at once wait for one another, and while free memory is given
back all of them do.
"""

import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_LARGE_BYTES = 1 << 20
_LARGEST_THRESHOLD_BYTES = 32 << 20  # to which glibc raises M_MMAP_THRESHOLD by itself, and no further
_VARIABLES = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")  # with which operators decide for themselves
_FULL_EVERY = 200  # collections of the middle generation, in the place of Python's 10
_BLOCK_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_one_arena() -> bool:
    """Lets all threads share one heap from now on; to be called before there are others.

    Returns whether it was done: not where the environment decides, and not with a C library other than glibc.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_ARENA_MAX, 1) == 1


def give_back_free_memory() -> bool:
    """Gives the pages that hold nothing back to the operating system: some milliseconds per 100 MB.

    It holds the heap's lock meanwhile, so with one heap for all threads whoever asks for memory waits, on every thread.

    Returns whether there were any; False with a C library other than glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1


@contextmanager
def large_blocks_given_back() -> Iterator[bool]:
    """Meanwhile, each block from 1 MiB goes back to the operating system when it is freed.

    By itself glibc learns from the first large blocks that are freed to keep blocks of up to 32 MiB, and what is
    allocated for good in between keeps their room from being used again. Afterwards it does what it would have
    learned: that is faster for what comes and goes in every step.

    Yields whether that is so: not where the environment decides, and not with a C library other than glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _BLOCK_VARIABLES):
        yield False
        return
    is_set = mallopt(_MMAP_THRESHOLD, _LARGE_BYTES) == 1
    try:
        yield is_set
    finally:
        mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD_BYTES)  # as glibc has the one follow the other


def ask_for_huge_pages(address: int, num_bytes: int) -> bool:
    """Has the system keep memory that nothing has been written to yet on pages of 2 MiB, as far as they fit in.

    Who reads all of a large piece in each step waits for fewer addresses: 27 GB/s instead of 20 with one thread of an
    AMD EPYC. Returns whether it will; not where there are no such pages, or the operator has switched them off.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    first, last = -(-address // mmap.PAGESIZE), (address + num_bytes) // mmap.PAGESIZE
    if advice is None or madvise is None or last <= first:
        return False
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return bool(madvise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, advice) == 0)


def set_apart_what_stays() -> None:
    """To be called when all that lives as long as the process has been made: the collector never looks at it again.

    Else each of its full collections goes through half a million objects of libraries and the base, which takes a
    quarter of a second, and nothing else runs meanwhile.

    And full collections get rare. They go through the adapters on the host, 90 objects for each, which are freed
    without the collector's help: 0.1 to 0.3 seconds for 2,300 adapters, once for each 300 that came. What only a full
    collection finds is some kilobytes for a request that was long under way.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _FULL_EVERY)


@contextmanager
def without_collections() -> Iterator[None]:
    """Meanwhile Python looks for no unreachable objects: for work of milliseconds that makes thousands of objects and
    drops all of them. Else it would go through them again and again, and bring the next full collection nearer."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
