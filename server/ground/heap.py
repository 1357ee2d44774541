"""What glibc's malloc keeps for itself: how many heaps there are, and memory that is free but not given back.

Owns those two settings of the process. Knows nothing about what is allocated.

glibc gives each busy thread a heap ("arena") of its own. Adapters come and go on loader threads, request threads and
the engine's; what one heap has free is of no use to another, so a server that does the same all day grows for hours.
And what a burst of requests has used stays with the process after it, free and in pieces.

The price of one heap is one lock: threads that allocate at once wait for one another, and while free memory is given
back all of them do.
"""

import ctypes
import os

_ARENA_MAX = -8  # mallopt(3): M_ARENA_MAX
_VARIABLES = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")  # with which operators decide for themselves


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
