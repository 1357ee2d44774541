"""`graft` with one part that breaks on SIGUSR1: `python -m tests.faults.faulty_server FAULT serve ...`.

For faults of a process that no means from outside brings about: a defect in the engine's loop, a step that hangs, a
device that is gone.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from server.cli import main
from server.engine.engine import Engine
from server.engine.runner import Runner

_is_broken = threading.Event()


def _before(real: Callable[..., Any], fault: Callable[[], object]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if _is_broken.is_set():
            fault()
        return real(*arguments, **named)

    return call


def _die() -> None:
    raise SystemError("a fault")


def _lose_device() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def _install(fault: str) -> None:
    if fault == "dies":
        Engine._schedule = _before(Engine._schedule, _die)  # type: ignore[method-assign]
    elif fault == "hangs":
        Runner.run = _before(Runner.run, lambda: time.sleep(10**6))  # type: ignore[method-assign]
    elif fault == "loses its device":
        Runner.run = _before(Runner.run, _lose_device)  # type: ignore[method-assign]
        alive = Runner.is_device_alive
        Runner.is_device_alive = lambda self: not _is_broken.is_set() and alive(self)  # type: ignore[method-assign]


if __name__ == "__main__":
    _install(sys.argv[1])
    signal.signal(signal.SIGUSR1, lambda *_: _is_broken.set())
    sys.exit(main(sys.argv[2:]))
