"""Time of the adapters' kernels at the shapes of real models, beside other ways to compute the same.

    python -m load_tests.kernels --model llama-3.1-8b --out load_tests/results/NAME.json     on a GPU
    python -m load_tests.kernels --quick                                                     anywhere, to see it work

Every way computes one site group: the low-rank part of all its linears, added to the base's outputs. On a GPU the calls
are captured in a CUDA graph and its replays timed, over several copies of the weights, so that neither Python nor the
cache is measured. Beside the time stand the bytes that must move (each distinct row, input and output once) and the
share of the bandwidth of a plain copy, measured here, that this makes.

`--way NAME=MODULE:FUNCTION` adds a way, such as another server's kernels from its own package: FUNCTION(case) returns a
function (x, y) that adds the low-rank part to y (tokens, sum of d_out) in place. It is checked before it is timed.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from server.adapters.device.rows import RowAllocator, stride
from server.ops.runs import TokenRuns
from server.ops.sheets import GroupTable, Sheets, SiteRows, make_sheet

NUM_COPIES = 4  # of a group's weights, read in turn: together more than a GPU's cache holds
NUM_REPLAYS = 30
COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share their input, and how many layers have them."""

    name: str
    d_in: int
    widths: tuple[int, ...]


MODELS: Mapping[str, tuple[int, tuple[Group, ...]]] = {
    "llama-3.1-8b": (
        32,
        (
            Group("q k v", 4096, (4096, 1024, 1024)),
            Group("o", 4096, (4096,)),
            Group("gate up", 4096, (14336, 14336)),
            Group("down", 14336, (4096,)),
        ),
    ),
    "qwen2.5-0.5b": (
        24,
        (
            Group("q k v", 896, (896, 128, 128)),
            Group("o", 896, (896,)),
            Group("gate up", 896, (4864, 4864)),
            Group("down", 4864, (896,)),
        ),
    ),
    "quick": (1, (Group("q k v", 48, (48, 16, 16)),)),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of a step: for each adapter its rank and how many it has. `is_shared`: one projection for all."""

    name: str
    adapters: tuple[tuple[int, int], ...]  # (rank, tokens)
    is_shared: bool = False

    @property
    def slots(self) -> list[int]:
        return [slot for slot, (_, tokens) in enumerate(self.adapters, start=1) for _ in range(tokens)]


BATCHES = (
    Batch("decode, 64 adapters r=16", ((16, 1),) * 64),
    Batch("decode, 64 adapters r=8", ((8, 1),) * 64),
    Batch("decode, 63 of r=8 and one r=64", (*((8, 1),) * 63, (64, 1))),
    Batch("decode, 1 adapter r=16, 64 tokens", ((16, 64),)),
    Batch("decode, 1 adapter r=16, 1 token", ((16, 1),)),
    Batch("decode, 64 adapters r=256, shared", ((256, 1),) * 64, is_shared=True),
    Batch("prefill, 1 adapter r=16, 2000 tokens", ((16, 2000),)),
    Batch("prefill, 8 adapters r=64, 250 tokens", ((64, 250),) * 8),
)
QUICK_BATCHES = (Batch("mixed", ((8, 1), (3, 2), (17, 1))), Batch("shared", ((8, 1), (8, 2)), is_shared=True))


class Case:
    """A group's weights for the adapters of a batch, as rank rows in a buffer with sheets, and as plain matrices."""

    def __init__(self, group: Group, batch: Batch, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.group, self.batch, self.dtype, self.device = group, batch, dtype, device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, width: int) -> torch.Tensor:
            matrix = torch.randn(rows, width, generator=generator, device=device, dtype=torch.float32)
            return (matrix / math.sqrt(width)).to(dtype)

        ranks = [batch.adapters[0][0]] if batch.is_shared else [rank for rank, _ in batch.adapters]
        self.downs = [[normal(rank, group.d_in) for _ in group.widths] for rank in ranks]  # [adapter][member]
        self.ups = [[normal(rank, width) for width in group.widths] for rank in ranks]
        if batch.is_shared:
            self.downs *= len(batch.adapters)
            self.ups *= len(batch.adapters)
        self.slots = torch.tensor(batch.slots)
        self.x = normal(len(batch.slots), group.d_in)
        self.y = normal(len(batch.slots), sum(group.widths))
        self._place_rows()

    def _place_rows(self) -> None:
        matrices = {id(m): m for of_adapter in (*self.downs, *self.ups) for m in of_adapter}
        num_elements = 2 * sum(m.shape[0] * stride(m.shape[1]) for m in matrices.values()) + (1 << 22)
        self.buffer = torch.zeros(num_elements, dtype=self.dtype, device=self.device)
        allocator = RowAllocator(num_elements, 1 << 16)
        numbers: dict[int, tuple[int, ...]] = {}
        for key, matrix in matrices.items():
            step = stride(matrix.shape[1])
            numbers[key] = tuple(allocator.allocate(matrix.shape[1], matrix.shape[0]))
            view = self.buffer[: num_elements // step * step].view(-1, step)[:, : matrix.shape[1]]
            view[torch.tensor(numbers[key], device=self.device)] = matrix
        edits = [
            {m: SiteRows(numbers[id(a)], numbers[id(b)]) for m, (a, b) in enumerate(zip(down, up, strict=True))}
            for down, up in zip(self.downs, self.ups, strict=True)
        ]
        num_members = len(self.group.widths)
        self._sheets = [make_sheet(num_members, edit).to(self.device) for edit in ({}, *edits)]
        addresses = torch.tensor([sheet.data_ptr() for sheet in self._sheets], device=self.device)
        max_rank = -(-max(rank for rank, _ in self.batch.adapters) // 16) * 16
        self.table = Sheets(self.buffer, addresses, max_rank, has_middle=False, has_vectors=False)
        members = [[m, width, sum(self.group.widths[:m]), stride(width), stride(width)]
                   for m, width in enumerate(self.group.widths)]  # fmt: skip
        table = torch.tensor(members, dtype=torch.int32, device=self.device)
        d_in = self.group.d_in
        self.group_table = GroupTable(-1, False, d_in, self.group.widths, stride(d_in), stride(d_in), table)
        classes = torch.arange(len(self._sheets)).clamp_max(1 if self.batch.is_shared else len(self._sheets))
        self.tokens = TokenRuns.of(self.slots, classes, classes, self.device)

    @property
    def moved_bytes(self) -> int:
        """Each distinct row once, the input once, the output read and written."""
        matrices = {id(m): m for of_adapter in (*self.downs, *self.ups) for m in of_adapter}
        rows = sum(m.numel() for m in matrices.values())
        return (rows + self.x.numel() + 2 * self.y.numel()) * self.dtype.itemsize

    def expected(self) -> torch.Tensor:
        """In float64."""
        return self._by_adapter(self.x.double(), self.y.double(), torch.float64)

    def _by_adapter(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        for slot in range(1, len(self.batch.adapters) + 1):
            own = torch.nonzero(self.slots == slot)[:, 0].to(self.device)
            parts = [x[own] @ a.to(dtype).t() @ b.to(dtype)
                     for a, b in zip(self.downs[slot - 1], self.ups[slot - 1], strict=True)]  # fmt: skip
            y[own] += torch.cat(parts, dim=1)
        return y


Run = Callable[[torch.Tensor, torch.Tensor], None]  # (x, y): adds the low-rank part to y


def by_kernels(case: Case) -> Run:
    """Ours: `shrink` and `expand` of server.ops.kernels, one launch each."""
    kernels = _kernels()

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        h = kernels.shrink(x, case.group_table, case.table, case.tokens)
        kernels.expand(y, h, case.group_table, case.table, case.tokens)

    return run


def by_gathered_bmm(case: Case) -> Run:
    """Each token's own matrices gathered, padded to the largest rank, and two batched products for each linear."""
    rank = max(rank for rank, _ in case.batch.adapters)
    index = (case.slots - 1).to(case.device)

    def stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        pad = torch.nn.functional.pad
        return torch.stack([pad(m, (0, 0, 0, rank - m.shape[0])) for m in matrices])

    members = [(stacked([d[m] for d in case.downs]), stacked([u[m] for u in case.ups]))
               for m in range(len(case.group.widths))]  # fmt: skip

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        start = 0
        for down, up in members:
            h = torch.bmm(down.index_select(0, index), x[:, :, None])
            y[:, start : start + up.shape[2]] += torch.bmm(h.transpose(1, 2), up.index_select(0, index))[:, 0]
            start += up.shape[2]

    return run


def by_loop(case: Case) -> Run:
    """As PEFT computes a mixed batch: for each adapter and linear, its tokens' rows out, two products, and back."""
    own = [torch.nonzero(case.slots == slot)[:, 0].to(case.device) for slot in range(1, len(case.batch.adapters) + 1)]

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        for tokens, downs, ups in zip(own, case.downs, case.ups, strict=True):
            start = 0
            for down, up in zip(downs, ups, strict=True):
                part = x.index_select(0, tokens) @ down.t() @ up
                y[:, start : start + up.shape[1]].index_add_(0, tokens, part)
                start += up.shape[1]

    return run


WAYS: Mapping[str, Callable[[Case], Run]] = {
    "kernels": by_kernels,
    "gathered bmm": by_gathered_bmm,
    "loop": by_loop,
}
_MAX_GATHERED_BYTES = 8 << 30


def _kernels() -> ModuleType:
    return importlib.import_module("server.ops.kernels")


def error_of(way: Callable[[Case], Run], case: Case) -> float:
    """The way's error of the sum that it adds, relative to its size, against float64."""
    y = case.y.clone()
    way(case)(case.x, y)
    expected = case.expected()
    return float((y.double() - expected).norm() / (expected - case.y.double()).norm())


def seconds(cases: Sequence[Case], way: Callable[[Case], Run]) -> float | None:
    """The median time of one group on a GPU; None without one, where a time would say nothing."""
    if cases[0].device.type != "cuda":
        return None
    runs = [(way(case), case) for case in cases]
    for run, case in runs:
        run(case.x, case.y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run, case in runs:
            run(case.x, case.y)
    return _median_s(graph.replay) / len(cases)


def _median_s(call: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[5:])


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes read and written per second by a large copy on the device; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_s(lambda: target.copy_(source))


@dataclass(frozen=True, slots=True)
class Row:
    """One way, for one group and batch. `group_s` is None where nothing was timed."""

    group: str
    batch: str
    way: str
    moved_bytes: int
    relative_error: float
    group_s: float | None

    def line(self, bandwidth: float | None, num_layers: int) -> str:
        text = f"{self.group:8} {self.batch:37} {self.way:13} error {self.relative_error:.0e}"
        if self.group_s is None or bandwidth is None:
            return text
        share = self.moved_bytes / self.group_s / bandwidth
        times = f"{self.group_s * 1e6:8.1f} us a group  {self.group_s * num_layers * 1e3:7.2f} ms in all layers"
        return f"{text}  {times}  {share:5.0%} of a copy"


def measure(
    group: Group, batch: Batch, ways: Mapping[str, Callable[[Case], Run]], dtype: torch.dtype, device: torch.device
) -> list[Row]:
    num_copies = NUM_COPIES if device.type == "cuda" else 1
    cases = [Case(group, batch, dtype, device, seed) for seed in range(num_copies)]
    rows = []
    for name, way in ways.items():
        gathered = len(batch.slots) * max(r for r, _ in batch.adapters) * (group.d_in + sum(group.widths)) * 2
        if name == "gathered bmm" and gathered > _MAX_GATHERED_BYTES:
            continue
        error, group_s = error_of(way, cases[0]), seconds(cases, way)
        rows.append(Row(group.name, batch.name, name, cases[0].moved_bytes, error, group_s))
    return rows


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.quick else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        options.model = "quick"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    num_layers, groups = MODELS[options.model]
    ways = {**WAYS, **dict(map(_named_way, options.way))}
    bandwidth = copy_bandwidth(device)
    rows = [row for group in groups for batch in (QUICK_BATCHES if device.type == "cpu" else BATCHES)
            for row in measure(group, batch, ways, dtype, device)]  # fmt: skip
    for row in rows:
        print(row.line(bandwidth, num_layers))
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    result = {
        "device": name, "torch": torch.__version__, "model": options.model, "dtype": str(dtype),
        "copy_bytes_per_s": bandwidth, "num_layers": num_layers, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    limit = 1e-5 if dtype is torch.float32 else 3e-2
    wrong = [f"{row.way} ({row.batch})" for row in rows if not row.relative_error < limit]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS.keys() - {"quick"}), default="llama-3.1-8b")
    parser.add_argument("--quick", action="store_true", help="small shapes in Triton's interpreter; no times")
    parser.add_argument("--way", action="append", default=[], metavar="NAME=MODULE:FUNCTION", help="one more way")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results here as JSON")
    return parser.parse_args(arguments)


def _named_way(text: str) -> tuple[str, Callable[[Case], Run]]:
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    return name, getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
