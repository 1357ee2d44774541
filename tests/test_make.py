"""The README's first command in a fresh clone: `make serve` installs, starts and answers; then it only starts."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout"),
]


@contextmanager
def made(tree: Path) -> Iterator[tuple[list[str], str]]:
    """What `make serve` has said until the server answers, and the server's address."""
    command = ["make", "serve", "ARGS=--port 0", f"PYTHON={sys.executable}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFT_", "PYTHON", "VIRTUAL_"))}
    with subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                said.append(line)
                if "Try it:" in line:
                    break
            (address,) = [line.split(" at ")[1].strip() for line in said if " at http://" in line] or ["".join(said)]
            yield said, address
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.stdout.read()


def test_make_serve_installs_once_and_answers_with_adapters(tmp_path: Path) -> None:
    tree = tmp_path / "graftserve"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True, timeout=120)
    with made(tree) as (said, address):
        assert any("pip install" in line for line in said)
        texts = set()
        for adapter in (None, "pirate-lora", "poet-dora"):
            body = {"prompt": "Tell me about the baker.", "max_tokens": 24, "temperature": 0, "adapter": adapter}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
            texts.add(answer.json()["choices"][0]["text"])
        assert len(texts) == 3
    with made(tree) as (said, address):
        assert not any("pip" in line for line in said)
        assert httpx.get(f"{address}/ready", timeout=120).status_code == 200
    status = subprocess.run(["git", "status", "--porcelain"], cwd=tree, capture_output=True, text=True, check=True)
    assert status.stdout == ""
