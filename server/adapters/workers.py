"""The threads that read and remove adapters, and whether there are any left to ask.

Owns the pool and its end. Knows nothing about what its tasks do.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from server.ground.errors import GraftError, Overloaded

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Workers:
    """A few threads that take tasks until they are closed. `lock` is the registry's, for who must not miss the end."""

    def __init__(self, lock: threading.Lock, num_threads: int) -> None:
        self._lock = lock
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-loader")
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def check_open(self) -> None:
        """Under the lock. Raises Overloaded once closed."""
        if self._is_closed:
            raise Overloaded("The server is shutting down.")

    def submit(self, task: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> "Future[_T]":
        """Under the lock, so that nothing is submitted once the pool is closed."""
        self.check_open()
        future = self._pool.submit(task, *arguments, **named)
        future.add_done_callback(_log_defect)
        return future

    def later(self, task: Callable[[_T], None], argument: _T) -> None:
        """Runs a task that blocks, away from the caller's thread while there is another. Not under the lock."""
        with self._lock:
            if not self._is_closed:
                self.submit(task, argument)
                return
        task(argument)

    def refuse(self) -> None:
        """Under the lock: takes no more tasks."""
        self._is_closed = True

    def join(self) -> None:
        """Waits for the tasks that were taken. Not under the lock."""
        self._pool.shutdown(wait=True)


def _log_defect(future: "Future[_T]") -> None:
    """What a task raised that is no answer to a user would be lost with its future."""
    error = future.exception()
    if error is not None and not isinstance(error, GraftError):
        _log.error("A task on adapters failed.", exc_info=error)
