"""Merges asked of a running server: one at a time, beside the engine, each into a new version of a name.

Owns their queue, their thread, and that nothing is left of one that fails or is given up. Knows nothing about HTTP or
how changes are merged.

The inputs are leased from the beginning, and read once; the result is stored and validated as an upload is.
"""

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path

from server.adapters.audit import noted
from server.adapters.lease import Lease
from server.adapters.merging.merge import Input, MergeBase, Merged, merge_inputs, read_input
from server.adapters.merging.recipe import Ingredient, Recipe, check_ingredients
from server.adapters.registry import Registered, Registry
from server.adapters.store.adapter_store import AdapterStore
from server.ground.errors import Overloaded

MAX_MERGES = 4  # under way at once: one that is made, and those that wait for it
# Beside a step that computes on all cores, a merge gets what the step leaves.
_NICENESS = 19
_RETRY_AFTER_S = 10


@dataclass(frozen=True, slots=True)
class MergeOrder:
    """What a merge shall be made of, and under which name."""

    name: str
    adapters: tuple[tuple[str, float], ...]  # "name" or "name@version-prefix", and its weight
    recipe: Recipe
    replace: bool


@dataclass(frozen=True, slots=True)
class Made:
    """A merge that is stored and served."""

    merged: Merged
    registered: Registered


class Merge:
    """One merge under way; `future` ends with `Made`, or with the GraftError that says why not."""

    future: "Future[Made]"

    def __init__(self, order: MergeOrder, leases: list[Lease]) -> None:
        self.order = order
        self.leases = leases
        self.ingredients = [
            _ingredient(lease, weight) for lease, (_, weight) in zip(leases, order.adapters, strict=True)
        ]
        self._is_given_up = threading.Event()

    def give_up(self) -> None:
        """Ends it at the next site, unless it is done; never blocks."""
        self._is_given_up.set()

    def check(self, *_: int) -> None:
        """Raises Overloaded if it was given up."""
        if self._is_given_up.is_set():
            raise Overloaded("The merge was given up: the client left, or the server is shutting down.")


class Merges:
    """All merges of a server. Safe for many threads."""

    def __init__(self, registry: Registry, store: AdapterStore, base: MergeBase, *, max_bytes: int) -> None:
        """`max_bytes`: of one result, as of one upload."""
        self._registry = registry
        self._store = store
        self._base = base
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._under_way: set[Merge] = set()
        self._is_closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="merge", initializer=_step_back)

    def begin(self, order: MergeOrder) -> Merge:
        """Leases the inputs and queues the merge; never blocks.

        Raises what `Registry.lease` raises, BadRequest for inputs that make no merge, and Overloaded where MAX_MERGES
        are under way or the server ends.
        """
        with ExitStack() as on_failure:
            leases = [on_failure.enter_context(self._registry.hold(spec)) for spec, _ in order.adapters]
            merge = Merge(order, leases)
            check_ingredients(merge.ingredients)
            with self._lock:
                self._check_room()
                self._under_way.add(merge)
                # In the name of who asks: the result is to be theirs.
                merge.future = self._pool.submit(copy_context().run, self._make, merge)
            on_failure.pop_all()
        merge.future.add_done_callback(lambda _: self._end(merge))
        return merge

    def give_up(self) -> None:
        """Takes no more merges, and ends those under way at their next site; never blocks."""
        with self._lock:
            self._is_closed = True
            for merge in self._under_way:
                merge.give_up()

    def close(self) -> None:
        """As `give_up`, and waits for their end."""
        self.give_up()
        self._pool.shutdown(wait=True)

    def _check_room(self) -> None:
        if self._is_closed:
            raise Overloaded("The server is shutting down.")
        if len(self._under_way) >= MAX_MERGES:
            raise Overloaded(
                f"{MAX_MERGES} merges are under way, which is all that this server takes at once: ask again later.",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _make(self, merge: Merge) -> Made:
        order = merge.order
        inputs = [f"{lease.version.name}@{lease.version.digest}" for lease in merge.leases]
        with (
            noted("merge", order.name, inputs=inputs) as facts,
            self._store.incoming(max_bytes=self._max_bytes) as incoming,
        ):
            target = incoming.workspace / "merged"
            read = [self._read(merge, *pair) for pair in zip(merge.leases, merge.ingredients, strict=True)]
            merged = merge_inputs(read, order.recipe, self._base, target, progress=merge.check)
            incoming.copy(target)
            merge.check()
            registered = self._registry.register(incoming, order.name, replace=order.replace)
            told = {"version": registered.info.digest, "is_new": registered.is_new, "replaced": registered.replaced}
            facts |= told
        return Made(merged, registered)

    def _read(self, merge: Merge, lease: Lease, ingredient: Ingredient) -> Input:
        merge.check()

        def read(folder: Path) -> Input:
            return read_input(replace(ingredient, folder=folder), self._base)

        return self._registry.read(lease, read)

    def _end(self, merge: Merge) -> None:
        with self._lock:
            self._under_way.discard(merge)
        for lease in merge.leases:
            lease.release()


def _ingredient(lease: Lease, weight: float) -> Ingredient:
    copy = lease.copy
    assert copy is not None
    return Ingredient(lease.version.name, lease.version.digest, copy.folder, weight)


def _step_back() -> None:
    """Makes way for the engine. On Linux each thread has a niceness of its own, which OpenMP's threads inherit."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
