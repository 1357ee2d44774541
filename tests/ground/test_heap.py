"""One heap for all threads, unless the operator decides; what is free goes back, and what stays is not gone through."""

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

# Threads that allocate at once, each block too large for a thread's own cache and too small to be mapped by itself;
# then malloc_info(3), which lists the heaps.
_COUNT_HEAPS = """
import ctypes, sys, threading
from server.ground.heap import keep_one_arena

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fdopen.restype = ctypes.c_void_p
done = keep_one_arena() if "bounded" in sys.argv else False
together = threading.Barrier(4)

def allocate():
    together.wait()
    for _ in range(200):
        libc.malloc(ctypes.c_size_t(20_000))
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.stdout.write(f"{done}\\n")
sys.stdout.flush()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def _heaps(*arguments: str, environment: Mapping[str, str] = {}) -> tuple[bool, int]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    told = subprocess.run(
        [sys.executable, "-c", _COUNT_HEAPS, *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return told.startswith("True"), told.count("<heap nr=")


pytestmark = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")


def test_without_it_threads_get_heaps_of_their_own() -> None:
    assert _heaps()[1] > 1


def test_with_it_all_threads_share_one() -> None:
    assert _heaps("bounded") == (True, 1)


def test_an_operator_who_has_decided_is_not_overruled() -> None:
    done, num_heaps = _heaps("bounded", environment={"MALLOC_ARENA_MAX": "3"})
    assert not done
    assert 1 < num_heaps <= 3


# What the programs below begin with: blocks of the C library that are written to, and the memory that the process has.
_HEAP = """
import ctypes, os

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def block(size):
    address = libc.malloc(ctypes.c_size_t(size))
    libc.memset(address, 1, size)
    return address
"""

# Many blocks with one in use between every two free ones' worth: the heap cannot shrink from its end.
_GIVE_BACK = f"""{_HEAP}
from server.ground.heap import give_back_free_memory

blocks = [block(100_000) for _ in range(500)]
full = resident()
for each in blocks[:-1]:
    libc.free(each)
free = resident()
given = give_back_free_memory()
print(full, free, resident(), given)
"""


def test_what_is_free_inside_the_heap_goes_back() -> None:
    told = subprocess.run([sys.executable, "-c", _GIVE_BACK], capture_output=True, text=True, check=True).stdout
    full, free, given_back, was_given = told.split()
    assert int(full) - int(free) < 10_000_000, "else there is nothing to show"
    assert int(full) - int(given_back) > 40_000_000
    assert was_given == "True"


# Blocks below 32 MiB that come and go beside one that stays: what glibc has learned from the first free keeps them.
_COME_AND_GO = f"""{_HEAP}
import sys
from contextlib import nullcontext
from server.ground.heap import large_blocks_given_back

libc.free(block(30_000_000))
before = resident()
with large_blocks_given_back() if "given back" in sys.argv else nullcontext():
    for size in range(20_000_000, 4_000_000, -4_000_000):
        passing = block(size)
        stays = block(100_000)
        libc.free(passing)
print(resident() - before)
"""


def test_large_blocks_go_back_while_that_is_asked_for() -> None:
    def kept_bytes(*arguments: str) -> int:
        run = [sys.executable, "-c", _COME_AND_GO, *arguments]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    assert kept_bytes() > 15_000_000, "else there is nothing to show"
    assert kept_bytes("given back") < 2_000_000


_COUNT_GONE_THROUGH = """
import gc, weakref
from server.ground.heap import set_apart_what_stays

class Node:
    pass

kept = [[] for _ in range(1000)]
set_apart_what_stays()
print(len(gc.get_objects()) < 1000, any(one is kept for one in gc.get_objects()))
node = Node()
node.itself = node
seen = weakref.ref(node)
del node
gc.collect()
print(seen() is None)
"""


def test_the_collector_leaves_alone_what_stays_and_finds_what_comes_later() -> None:
    done = subprocess.run([sys.executable, "-c", _COUNT_GONE_THROUGH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]


_COUNT_FULL = """
import gc, sys
from server.ground.heap import set_apart_what_stays

if "apart" in sys.argv:
    set_apart_what_stays()
before = gc.get_stats()[2]["collections"]
kept = [[] for _ in range(500_000)]
print(gc.get_stats()[2]["collections"] - before)
"""


def test_full_collections_are_rare_once_what_stays_is_set_apart() -> None:
    def num_full(*arguments: str) -> int:
        run = [sys.executable, "-c", _COUNT_FULL, *arguments]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    assert num_full() > 3, "else there is nothing to show"
    assert num_full("apart") == 0


_ASK_FOR_HUGE_PAGES = """
import ctypes, mmap
from server.ground.heap import ask_for_huge_pages

memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
inside = address + 3 * mmap.PAGESIZE
print(ask_for_huge_pages(inside - 1, mmap.PAGESIZE), ask_for_huge_pages(inside - 1, 6 << 20))
flags = {}
for line in open("/proc/self/smaps"):
    first, _, rest = line.partition(" ")
    if "-" in first and not first.endswith(":"):
        piece = range(*(int(end, 16) for end in first.split("-")))
    elif first == "VmFlags:" and address <= piece.start < address + (8 << 20):
        flags[piece.start - address] = "hg" in rest.split()
print([number for number, is_huge in flags.items() if is_huge] == [3 * mmap.PAGESIZE])
"""


def test_whole_pages_of_what_is_asked_for_become_huge_and_nothing_beside_them() -> None:
    done = subprocess.run([sys.executable, "-c", _ASK_FOR_HUGE_PAGES], capture_output=True, text=True, check=True)
    told = done.stdout.split()
    if told[1] == "False":
        pytest.skip("this system has no huge pages")
    assert told == ["False", "True", "True"]
