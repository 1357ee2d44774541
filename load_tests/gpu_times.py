"""How long calls take on a GPU, and how fast it copies, multiplies and launches.

Owns the clock: calls are captured in a CUDA graph and its replays timed, so that Python is not measured. Knows nothing
about what is called.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

from load_tests.kernel_targets import Speeds

Call = Callable[[], object]

NUM_REPLAYS = 25
NUM_ROUNDS = 4  # over all copies in one graph, so that its own start does not count
COPY_BYTES = 1 << 30
SQUARE = 8192  # of the product that says how fast products are


def seconds_of(calls: Sequence[Call], num_rounds: int = NUM_ROUNDS) -> float:
    """The median time of one call, replayed from a graph in which all follow one another, so many times."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one for both: a peer keeps its buffers by stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(num_rounds):
            for call in calls:
                call()
    return _median_s(graph.replay) / len(calls) / num_rounds


def _median_s(call: Call) -> float:
    times: list[float] = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[5:])


def speeds_of(device: torch.device) -> Speeds:
    """Of a GPU: a large copy (bytes read and written), a large product, and a launch of next to nothing."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    factor = torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16, device=device)
    product, one = torch.empty_like(factor), torch.empty(1, device=device)
    return Speeds(
        copy_bytes_per_s=2 * COPY_BYTES / _median_s(lambda: target.copy_(source)),
        flops_per_s=2 * SQUARE**3 / _median_s(lambda: torch.mm(factor, factor, out=product)),
        launch_s=seconds_of([one.zero_] * 16),
    )
