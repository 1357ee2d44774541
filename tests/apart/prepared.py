"""What the engine's process of a test does before it loads: functions that it finds by their module and name."""

import time
from typing import Any

import torch

from server.adapters.registry import Registry
from server.engine.engine import Engine
from server.engine.sequence import Batch
from server.ground.config import Settings


def one_thread(settings: Settings) -> None:
    """As `tests/conftest.py` has it for the tests' own process."""
    torch.set_num_threads(1)


FATAL_PROMPT = (90, 91, 92, 93)


def fragile(settings: Settings) -> None:
    """An engine whose loop ends when a step is to compute FATAL_PROMPT."""
    one_thread(settings)
    schedule = Engine._schedule

    def broken(self: Engine) -> Batch:
        batch = schedule(self)
        if any(tuple(item.sequence.prompt_ids) == FATAL_PROMPT for item in batch.sequences):
            raise SystemError("a fault")
        return batch

    Engine._schedule = broken  # type: ignore[method-assign]


def defect(settings: Settings) -> None:
    raise RuntimeError("a defect that nobody foresaw")


class Panic(BaseException):
    """As libraries in Rust raise it."""


PANICKING = "panics"  # an adapter


def panicking(settings: Settings) -> None:
    """A registry that meets a panic when it is asked for PANICKING."""
    one_thread(settings)
    describe = Registry.describe

    def panics(self: Registry, spec: str) -> Any:
        if spec == PANICKING:
            raise Panic("index out of bounds")
        return describe(self, spec)

    Registry.describe = panics  # type: ignore[method-assign]


def unhurried(settings: Settings) -> None:
    """A registry whose end takes longer than a child that is lost is given; it leaves a file in the store's folder."""
    one_thread(settings)
    close = Registry.close

    def closes(self: Registry) -> None:
        time.sleep(7)
        close(self)
        settings.store.joinpath("closed").touch()

    Registry.close = closes  # type: ignore[method-assign]
