"""Work that is recorded once and then repeated on the same memory: CUDA graphs, and what does the same without a GPU.

Owns how a recording is made. Knows nothing about what is recorded; whoever records sees to it that all that differs
from one repetition to the next lies in tensors that stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Work = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Recording:
    """`replay` does the work again; what it gives is in `outputs`, the same tensors each time."""

    outputs: tuple[torch.Tensor, ...]
    replay: Callable[[], None]


class Recorder(Protocol):
    def record(self, work: Work) -> Recording:
        """Does the work once, and keeps how. Its Python code does not run again at a replay."""


class EagerRecorder:
    """Runs the Python code at each replay: the meaning of a recording, on any device. Slower than no recording."""

    def record(self, work: Work) -> Recording:
        outputs = work()

        def replay() -> None:
            for kept, new in zip(outputs, work(), strict=True):
                kept.copy_(new)

        return Recording(outputs, torch.inference_mode()(replay))


class CudaRecorder:
    """CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None  # of the first graph

    def record(self, work: Work) -> Recording:
        """Raises RuntimeError where something of the work cannot be recorded, such as a wait for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()  # compiles kernels and sizes workspaces, which cannot be recorded
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy adapters meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = work()
        except Exception:
            # A capture that fails at its end leaves its stream current, and its pool in use.
            torch.cuda.set_stream(current)
            self._pool = None
            raise
        self._pool = self._pool or graph.pool()
        return Recording(outputs, graph.replay)
