"""The steps of an engine that has a process of its own, as seen there.

Owns what is set up in that process before it loads, and how what was seen comes back: by the server's own calls. So
nothing of this is in a server. Knows nothing about what is compared.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from load_tests.engine_steps import SeenStep
from server.apart.front import ApartServer
from server.engine.engine import StepReport
from server.ground.config import Settings
from server.ground.metrics import Metrics


def prepare(settings: Settings) -> None:
    """For `assemble_apart`: one thread for products, and every step is seen on the engine's thread."""
    torch.set_num_threads(1)
    told, seen, cpu_s = Metrics.step, list[SeenStep](), [0.0]

    def step(self: Metrics, report: StepReport) -> None:
        now_s = time.thread_time()
        seen.append(SeenStep(report, time.perf_counter(), now_s - cpu_s[0]))
        cpu_s[0] = now_s
        told(self, report)

    def take_steps(self: Metrics) -> list[SeenStep]:
        taken = seen[:]
        del seen[: len(taken)]
        return taken

    seeing: dict[str, Any] = {"step": step, "take_steps": take_steps}
    for name, function in seeing.items():
        setattr(Metrics, name, function)


@contextmanager
def watched_apart(server: ApartServer) -> Iterator[list[SeenStep]]:
    """The steps of the engine while the block ran; there are none before its end."""
    steps: list[SeenStep] = []
    server.calls.call("metrics", "take_steps")
    yield steps
    steps += server.calls.call("metrics", "take_steps")
