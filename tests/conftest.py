"""For every floor: folders of tiny models, made once per run, and what a slow machine may not turn into a failure."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fastapi.dependencies.models
import pytest
import torch
from hypothesis import HealthCheck, settings

from server.ground.config import Settings, variable_name
from tests import models
from tests.models import save_filled, save_model

# A machine that is busy, or a process that is paused, says nothing about what is tested.
settings.register_profile("graft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graft")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws is the same in every run, whatever ran before it: rounding has no lucky days."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products are slower on several threads, and parallel test processes would fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell has its background jobs ignore SIGINT, and so would every process that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_inherited_settings() -> None:
    for name in Settings.model_fields:
        os.environ.pop(variable_name(name), None)


@pytest.fixture(scope="module", autouse=True)
def _nothing_kept() -> Iterator[None]:
    """A server that has been closed still holds its buffers, because others hold on to it.

    FastAPI remembers the routes of every application, Python looks for rings of objects only now and then, and glibc
    keeps what is freed, with a heap for each thread that there ever was.
    """
    yield
    for remembered in vars(fastapi.dependencies.models).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by architecture name (see `models.ARCHITECTURES`)."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_filled(models.wide_llama(), tmp_path_factory.mktemp("wide-llama"))


@pytest.fixture(scope="session")
def tiny_llama(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")
