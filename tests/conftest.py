"""Fixtures for every floor: folders of tiny models, made once per run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models import save_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products are slower on several threads, and parallel test processes would fight for the cores."""
    torch.set_num_threads(1)


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
def tiny_llama(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")
