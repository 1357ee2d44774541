"""The steps of an engine that has a process of its own, as seen there.

Owns what is set up in that process before it loads, and how what was seen comes back: by the server's own calls. So
nothing of this is in a server. Knows nothing about what is compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from load_tests.engine_steps import SeenStep, noting
from server.apart.front import ApartServer
from server.apart.hosted import HostedState
from server.engine.engine import StepReport
from server.ground.config import Settings
from server.ground.metrics import Metrics


def prepare(settings: Settings) -> None:
    """For `assemble_apart`: one thread for products, and every step is seen on the engine's thread."""
    torch.set_num_threads(1)
    told, seen = Metrics.step, list[SeenStep]()
    note = noting(seen)

    def step(self: Metrics, report: StepReport) -> None:
        note(report)
        told(self, report)

    def take_steps(_state: HostedState) -> list[SeenStep]:
        taken = seen[:]
        del seen[: len(taken)]
        return taken

    seeing: list[tuple[type, str, Any]] = [(Metrics, "step", step), (HostedState, "take_steps", take_steps)]
    for of, name, function in seeing:
        setattr(of, name, function)


@contextmanager
def watched_apart(server: ApartServer) -> Iterator[list[SeenStep]]:
    """The steps of the engine while the block ran; there are none before its end."""
    steps: list[SeenStep] = []
    server.calls.call("state", "take_steps")
    yield steps
    steps += server.calls.call("state", "take_steps")
