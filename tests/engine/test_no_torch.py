"""The most intricate logic must stay testable in milliseconds: it may not reach torch through any import."""

import subprocess
import sys

import pytest

MODULES = (
    "server.adapters.device.rows",
    "server.engine.blocks",
    "server.engine.sequence",
    "server.engine.scheduler",
)


@pytest.mark.parametrize("module", MODULES)
def test_module_does_not_import_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
