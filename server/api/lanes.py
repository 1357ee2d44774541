"""Threads of their own for what may take long, so that it takes none from the routes that look and generate.

Owns how much of each kind of work runs at once, and that one owner of keys has half of that at most. What finds no
thread waits in the event loop, where it costs none. Knows nothing about the work.
"""

from asyncio import Semaphore
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread

from server.adapters.asker import current_asker

MAX_RECEIVING = 16  # writes of uploads to disk
MAX_REGISTERING = 8  # uploads that are validated: more than there are threads that read adapters
MAX_CHANGING = 8  # deletions, rollbacks and cancellations

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Lane:
    """Some threads for one kind of work. For the event loop alone."""

    def __init__(self, num_threads: int) -> None:
        """`num_threads`: at least 2."""
        self._threads = CapacityLimiter(num_threads)
        self._num_of_owner = num_threads // 2
        self._shares: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()  # by owner, while one is in use

    async def run(self, work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """What `work` returns or raises, run in a thread in the name of who asks."""
        async with AsyncExitStack() as held:
            owner = current_asker().owner
            if owner is not None:
                await held.enter_async_context(self._share_of(owner))
            return await to_thread.run_sync(lambda: work(*arguments, **named), limiter=self._threads)

    def _share_of(self, owner: str) -> Semaphore:
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = Semaphore(self._num_of_owner)
        return share


class Lanes:
    """The lanes of one server that its routes share."""

    def __init__(self) -> None:
        self.receiving = Lane(MAX_RECEIVING)
        self.registering = Lane(MAX_REGISTERING)
        self.changing = Lane(MAX_CHANGING)
