"""What the checks of every Python client are given. Imports nothing that a client's environment may lack."""

import os
import time
import urllib.request
from collections.abc import Callable

import pytest

KEY = "sesame-open"  # of the small server
VOICES = ("pirate-lora", "shout-rslora", "poet-dora", "news-vera", "robot-ia3")


@pytest.fixture(scope="session")
def url() -> str:
    """The demo with the settings of `graft serve`, no key."""
    return os.environ["GRAFT_TEST_URL"] + "/v1"


@pytest.fixture(scope="session")
def small_url() -> str:
    """The demo with a key, which runs one sequence at a time and lets 64 wait."""
    return os.environ["GRAFT_TEST_SMALL_URL"] + "/v1"


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    request = urllib.request.Request(url.removesuffix("/v1") + "/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    samples = [line for line in lines if line.startswith((f"{name} ", f"{name}{{")) and all(w in line for w in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in samples)


def eventually(is_true: Callable[[], bool], within_s: float = 240) -> None:
    """Wait for something that the server does. The limit is for a server that hangs, not for one that is slow."""
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
