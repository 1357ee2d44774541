"""The demo, served in two processes and, beside that, in one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.apart.front import ApartServer, assemble_apart
from server.ground.config import Settings
from tests.apart.prepared import one_thread
from tests.api.conftest import Live, serving
from tests.demo_files import BASE, store_of_five


def in_two(settings: Settings) -> ApartServer:
    return assemble_apart(settings, one_thread)


@pytest.fixture(scope="session")
def demo_settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    """Of a server with the five demo adapters in a store of its own."""

    def make(**changes: Any) -> Settings:
        plain: dict[str, Any] = {
            "model": str(BASE),
            "served_model_name": ("demo",),
            "quantize": "none",
            "dtype": "float32",
            "device": "cpu",
            "kv_memory": "64MiB",
            "adapter_memory": "64MiB",
            "host_memory": "256MiB",
            "metrics_compat": "vllm",
            "store": store_of_five(tmp_path_factory.mktemp("store")),
        }
        return Settings(**(plain | changes))

    return make


@pytest.fixture(scope="session")
def folder_of_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which requests may have adapters read."""
    return tmp_path_factory.mktemp("readable")


@pytest.fixture(scope="session")
def two(demo_settings: Callable[..., Settings], folder_of_adapters: Path) -> Iterator[Live]:
    """A server in two processes."""
    with serving(demo_settings(adapter_paths=(folder_of_adapters,)), assembled=in_two) as live:
        yield live


@pytest.fixture(scope="session")
def one(demo_settings: Callable[..., Settings], folder_of_adapters: Path) -> Iterator[Live]:
    """The same server in one."""
    with serving(demo_settings(adapter_paths=(folder_of_adapters,))) as live:
        yield live
