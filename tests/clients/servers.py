"""The demo served to foreign clients: in float32 and unquantized, so that answers can be compared to the character."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.ground.config import Settings
from tests.api.conftest import Live, serving
from tests.demo_files import ADAPTERS, BASE, STORE


@contextmanager
def demo_served(scratch: Path, **changes: Any) -> Iterator[Live]:
    """A server on a copy of the demo's store, whose model is shown the tools of a request as well."""
    for name in ADAPTERS:
        shutil.copytree(STORE / name, scratch / "store" / name)
    exact: dict[str, Any] = {"model": str(BASE), "quantize": "none", "dtype": "float32", "device": "cpu"}
    template = Path(__file__).with_name("tools.jinja")
    with serving(Settings(**exact, store=scratch / "store", chat_template=template, **changes)) as live:
        yield live
