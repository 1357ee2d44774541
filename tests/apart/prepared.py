"""What the engine's process of a test does before it loads: functions that it finds by their module and name."""

import torch

from server.ground.config import Settings


def one_thread(settings: Settings) -> None:
    """As `tests/conftest.py` has it for the tests' own process."""
    torch.set_num_threads(1)


def defect(settings: Settings) -> None:
    raise RuntimeError("a defect that nobody foresaw")
