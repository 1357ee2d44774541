"""What the engine's process of a test does before it loads: functions that it finds by their module and name."""

import torch

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
