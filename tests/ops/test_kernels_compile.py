"""The kernels compile for GPUs, without one: what the interpreter accepts, the compiler need not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# What a thread block may have on every GPU since the A100's generation, consumers' included.
MAX_SHARED_BYTES = 99 << 10


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_every_kernel_compiles_and_uses_what_the_gpu_has(target: int, tmp_path: Path) -> None:
    """In a process of its own: in this one Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", str(target)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 15
    assert all(kernel["shared_bytes"] <= MAX_SHARED_BYTES for kernel in found)
    assert {k["kernel"] for k in found if not k["uses_tensor_cores"]} == {
        "_embed", "_scale", "_store_kv", "_join", "_sum", "_whole",
    }  # fmt: skip
    products = [kernel for kernel in found if kernel["uses_tensor_cores"]]
    assert all(kernel["copies_ahead"] for kernel in products)
    assert not any(kernel["has_local_memory"] for kernel in found)
