"""A server of this checkout in a process of its own, with LoRA adapters of any size made for its base.

Owns the process and the adapters' files. Knows nothing about what is measured.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from load_tests.many_adapters import Made

_T = TypeVar("_T")
ITEM_BYTES = 2  # of a bfloat16
_START = "import sys; from server.cli import main; sys.exit(main())"
_START_TIMEOUT_S = 300.0
_CALL_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0


class NoServer(Exception):
    """The server did not start, or refused what a measurement needs. Says what it said."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a Llama's shape decides the size of an adapter of all its linears."""

    num_layers: int
    widths: tuple[tuple[str, int, int], ...]  # module, d_in, d_out

    @classmethod
    def of(cls, model: Path) -> "Shape":
        """From a checkpoint's config.json."""
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        query, key = head * config["num_attention_heads"], head * config["num_key_value_heads"]
        attention = (("q_proj", hidden, query), ("k_proj", hidden, key), ("v_proj", hidden, key))
        inside = (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden))
        widths = [(f"self_attn.{name}", *sizes) for name, *sizes in (*attention, ("o_proj", query, hidden))]
        return cls(config["num_hidden_layers"], (*widths, *((f"mlp.{name}", *sizes) for name, *sizes in inside)))

    def row_elements(self) -> int:
        """Numbers in an adapter of rank 1."""
        return self.num_layers * sum(d_in + d_out for _, d_in, d_out in self.widths)

    def rank_of(self, num_bytes: int) -> int:
        """The rank whose rows take about so many bytes in 16-bit arithmetic."""
        return max(1, round(num_bytes / (ITEM_BYTES * self.row_elements())))


def make_loras(shape: Shape, name: str, count: int, rank: int) -> Iterator[Made]:
    """`count` LoRA adapters of `rank` on all linears, named name-0000 and so on; each its own, seeded."""
    modules = [module.rpartition(".")[2] for module, _, _ in shape.widths]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "bias": "none"}
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        tensors = {
            f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight": 0.02
            * torch.randn(size, generator=generator)
            for layer in range(shape.num_layers)
            for module, d_in, d_out in shape.widths
            for side, size in (("A", (rank, d_in)), ("B", (d_out, rank)))
        }
        halves = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        yield Made(f"{name}-{index:04d}", json.dumps(config).encode(), save(halves))


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A server that listens."""

    url: str
    pid: int

    def call(self, method: str, path: str) -> Any:
        """The JSON of an answer. Raises NoServer for an error, with what it says."""
        request = urllib.request.Request(self.url + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_CALL_TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise NoServer(f"{method} {path}: {error.code} {error.read()[:300].decode(errors='replace')}") from error

    def metric(self, name: str, default: float | None = None) -> float:
        """A metric without labels; `default` where the server has none of that name. Raises KeyError without one."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=_CALL_TIMEOUT_S) as answer:
            lines = answer.read().decode().splitlines()
        value = next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), default)
        if value is None:
            raise KeyError(name)
        return value


def in_scratch(program: str, measure: Callable[[Path], _T]) -> _T | None:
    """What `measure` finds out in a folder of its own; None where there was no server, and then standard error says
    why."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return measure(Path(scratch))
    except NoServer as error:
        print(f"{program}: {error}", file=sys.stderr)
        return None


@contextmanager
def own_server(model: Path, scratch: Path, flags: Mapping[str, object]) -> Iterator[OwnServer]:
    """Serves `model` with `flags` (name without dashes -> value) on a free port until the block ends.

    Its log is scratch/server.log. Raises NoServer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = scratch / "server.log"
    own: dict[str, object] = {"port": port, "store": scratch / "store"}
    told = [text for name, value in (own | dict(flags)).items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-c", _START, "serve", str(model), *told]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=Path(__file__).parents[1])
    try:
        server = OwnServer(f"http://127.0.0.1:{port}", process.pid)
        _await_start(process, server, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_start(process: "subprocess.Popen[bytes]", server: OwnServer, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            server.metric("graft_adapters")
            return
        except OSError:
            time.sleep(0.1)
    raise NoServer(f"the server did not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
