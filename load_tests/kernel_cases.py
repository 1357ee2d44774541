"""What the kernels' benchmark computes: site groups of real models, batches of adapters, and random weights for both.

Owns the shapes, the batches and a case's weights, as rank rows in a buffer with sheets and as plain matrices. Knows
nothing about who computes a case, nor about time.
"""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from server.adapters.device.rows import RowAllocator, stride
from server.ops.runs import TokenRuns
from server.ops.sheets import OUT_SCALE, UP_SCALE, GroupTable, Sheets, SiteRows, make_sheet


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share their input."""

    name: str
    d_in: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """How many layers there are, each with these groups."""

    num_layers: int
    groups: tuple[Group, ...]


MODELS: Mapping[str, Model] = {
    "llama-3.1-8b": Model(
        32,
        (
            Group("q k v", 4096, (4096, 1024, 1024)),
            Group("o", 4096, (4096,)),
            Group("gate up", 4096, (14336, 14336)),
            Group("down", 14336, (4096,)),
        ),
    ),
    "qwen2.5-0.5b": Model(
        24,
        (
            Group("q k v", 896, (896, 128, 128)),
            Group("o", 896, (896,)),
            Group("gate up", 896, (4864, 4864)),
            Group("down", 4864, (896,)),
        ),
    ),
}
QUICK_MODEL = Model(1, (Group("q k v", 48, (48, 16, 16)), Group("o", 48, (48,)), Group("gate up", 48, (32, 32))))

Method = Literal["lora", "dora", "vera"]


class BatchAdapter(NamedTuple):
    """An adapter of a batch. All VeRA adapters of a batch share their matrices."""

    rank: int
    num_tokens: int
    method: Method = "lora"


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of a step. Adapter i has slot i + 1; with `is_shuffled` its tokens do not follow one another."""

    name: str
    adapters: tuple[BatchAdapter, ...]
    is_shuffled: bool = False

    @property
    def slots(self) -> list[int]:
        slots = [slot for slot, adapter in enumerate(self.adapters, start=1) for _ in range(adapter.num_tokens)]
        if self.is_shuffled:
            random.Random(0).shuffle(slots)
        return slots

    @property
    def max_rank(self) -> int:
        return max(adapter.rank for adapter in self.adapters)

    @property
    def is_plain(self) -> bool:
        """Whether all adapters are LoRA."""
        return all(adapter.method == "lora" for adapter in self.adapters)

    @property
    def has_mixed_ranks(self) -> bool:
        return self.is_plain and len({adapter.rank for adapter in self.adapters}) > 1


_MIXED = (8, 16, 64)


def _distinct(num_tokens: int, *ranks: int) -> tuple[BatchAdapter, ...]:
    """As many adapters, a token each, with these ranks in turn."""
    return tuple(BatchAdapter(ranks[i % len(ranks)], 1) for i in range(num_tokens))


def _by_zipf(num_tokens: int, *ranks: int) -> tuple[BatchAdapter, ...]:
    """Tokens drawn over as many adapters, the k-th being 1/k as popular as the first; those that got one."""
    popularity = [1 / k for k in range(1, num_tokens + 1)]
    drawn = random.Random(0).choices(range(num_tokens), popularity, k=num_tokens)
    return tuple(BatchAdapter(ranks[i % len(ranks)], drawn.count(i)) for i in sorted(set(drawn)))


def _prefills(num_tokens: int, num_adapters: int, *ranks: int) -> tuple[BatchAdapter, ...]:
    return tuple(BatchAdapter(ranks[i % len(ranks)], num_tokens // num_adapters) for i in range(num_adapters))


def _of_methods(num_tokens: int) -> tuple[BatchAdapter, ...]:
    methods = (BatchAdapter(16, 1), BatchAdapter(16, 1, "dora"), BatchAdapter(256, 1, "vera"))
    return tuple(methods[i % len(methods)] for i in range(num_tokens))


# The most telling come first: what the time does not suffice for is left out at the end.
BATCHES = (
    Batch("decode, 64 adapters r=16", _distinct(64, 16)),
    Batch("decode, 64 adapters r=8, 16, 64", _distinct(64, *_MIXED)),
    Batch("decode, 64 by Zipf r=16", _by_zipf(64, 16), is_shuffled=True),
    Batch("decode, 64 of 1 adapter r=16", (BatchAdapter(16, 64),)),
    Batch("prefill, 2048 of 1 adapter r=16", _prefills(2048, 1, 16)),
    Batch("prefill, 2048 of 8 r=8, 16, 64", _prefills(2048, 8, *_MIXED)),
    Batch("decode, 1 adapter r=16", _distinct(1, 16)),
    Batch("decode, 8 adapters r=16", _distinct(8, 16)),
    Batch("decode, 16 adapters r=16", _distinct(16, 16)),
    Batch("decode, 32 adapters r=16", _distinct(32, 16)),
    Batch("decode, 64 LoRA, DoRA, VeRA", _of_methods(64)),
    Batch("decode, 64 adapters r=8", _distinct(64, 8)),
    Batch("decode, 64 adapters r=64", _distinct(64, 64)),
    Batch("decode, 63 of r=8 and one r=64", (*_distinct(63, 8), BatchAdapter(64, 1))),
    Batch("decode, 64 by Zipf r=8, 16, 64", _by_zipf(64, *_MIXED), is_shuffled=True),
    Batch("prefill, 512 of 1 adapter r=16", _prefills(512, 1, 16)),
    Batch("prefill, 8192 of 1 adapter r=16", _prefills(8192, 1, 16)),
    Batch("prefill, 512 of 8 r=8, 16, 64", _prefills(512, 8, *_MIXED)),
    Batch("prefill, 8192 of 8 r=8, 16, 64", _prefills(8192, 8, *_MIXED)),
    Batch("prefill, 2048 of 8 r=64", _prefills(2048, 8, 64)),
    Batch("decode, 64 VeRA r=256", (BatchAdapter(256, 1, "vera"),) * 64),
)
QUICK_BATCHES = (
    Batch("mixed", (BatchAdapter(8, 1), BatchAdapter(3, 2), BatchAdapter(17, 1)), is_shuffled=True),
    Batch("methods", (BatchAdapter(8, 1), BatchAdapter(4, 2, "dora"), *(BatchAdapter(8, 1, "vera"),) * 2)),
    Batch("prefill", (BatchAdapter(8, 257), BatchAdapter(4, 3))),
)


@dataclass(frozen=True, slots=True)
class MemberWeights:
    """An adapter's at one linear: matrices (rank, width), vectors float32; see the normal form in `server.ops`."""

    down: torch.Tensor
    up: torch.Tensor
    mid_scale: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        vectors = (self.mid_scale, self.up_scale, self.out_scale)
        yield from (self.down, self.up, *(vector for vector in vectors if vector is not None))

    def applied(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y (tokens, d_out) with the edit, in the dtype of y."""
        low = x @ self.down.to(y.dtype).t()
        if self.mid_scale is not None:
            low = low * self.mid_scale.to(y.dtype)
        part = low @ self.up.to(y.dtype)
        if self.up_scale is not None:
            part = part * self.up_scale.to(y.dtype)
        return y + part if self.out_scale is None else (y + part) * self.out_scale.to(y.dtype)


class Case:
    """A group's weights for the adapters of a batch: `weights[slot - 1][member]`, and the same as rows and sheets."""

    def __init__(self, group: Group, batch: Batch, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.group, self.batch, self.dtype, self.device = group, batch, dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.weights = self._draw()
        self.slots = torch.tensor(batch.slots)
        # Inputs of unit size, and outputs of that of one adapter's part: else the rounding of y would hide it.
        self.x = self._normal(len(batch.slots), group.d_in, 1.0)
        self.y = self._normal(len(batch.slots), sum(group.widths), 1 / math.sqrt(sum(group.widths)))
        self._place_rows()

    def _normal(self, rows: int, width: int, deviation: float) -> torch.Tensor:
        matrix = torch.randn(rows, width, generator=self._generator, device=self.device, dtype=torch.float32)
        return (matrix * deviation).to(self.dtype)

    def _near_one(self, width: int) -> torch.Tensor:
        return 1 + 0.05 * torch.randn(width, generator=self._generator, device=self.device, dtype=torch.float32)

    def _draw(self) -> list[list[MemberWeights]]:
        shared: dict[int, list[MemberWeights]] = {}
        weights = []
        for rank, _, method in self.batch.adapters:
            if method == "vera":
                if rank not in shared:
                    shared[rank] = self._matrices(rank)
                own = [MemberWeights(m.down, m.up, self._near_one(rank), self._near_one(m.up.shape[1]))
                       for m in shared[rank]]  # fmt: skip
            else:
                own = self._matrices(rank)
            if method == "dora":
                own = [MemberWeights(m.down, m.up, out_scale=self._near_one(m.up.shape[1])) for m in own]
            weights.append(own)
        return weights

    def _matrices(self, rank: int) -> list[MemberWeights]:
        return [MemberWeights(self._normal(rank, self.group.d_in, 1 / math.sqrt(self.group.d_in)),
                              self._normal(rank, width, 1 / math.sqrt(width)))
                for width in self.group.widths]  # fmt: skip

    def _place_rows(self) -> None:
        stored = self._store()
        edits = [{m: self._site_rows(of_member, stored) for m, of_member in enumerate(own)} for own in self.weights]
        num_members = len(self.group.widths)
        self._sheets = [make_sheet(num_members, edit).to(self.device) for edit in ({}, *edits)]
        addresses = torch.tensor([sheet.data_ptr() for sheet in self._sheets], device=self.device)
        rows = [site for edit in edits for site in edit.values()]
        self.table = Sheets(
            self.buffer, addresses, -(-self.batch.max_rank // 16) * 16,
            has_middle=any(site.mid_scale is not None for site in rows), has_vectors=any(site.vectors for site in rows),
        )  # fmt: skip
        self.group_table = self._group_table()
        classes = self._classes()
        self.tokens = TokenRuns.of(self.slots, classes, classes, self.device)

    def _store(self) -> dict[int, tuple[int, ...]]:
        """Fills the buffer: the row numbers of every matrix and vector by its id. A vector is a row of its bits."""
        tensors = {id(t): t if t.dim() == 2 else t.view(self.dtype)[None]
                   for own in self.weights for m in own for t in m.tensors() if t is not m.mid_scale}  # fmt: skip
        # Twice the rows: slabs have edges that no row of their width can use.
        num_elements = 2 * sum(t.shape[0] * stride(t.shape[1]) for t in tensors.values()) + (1 << 22)
        self.buffer = torch.zeros(num_elements, dtype=self.dtype, device=self.device)
        allocator = RowAllocator(num_elements, 1 << 16)
        stored: dict[int, tuple[int, ...]] = {}
        for key, matrix in tensors.items():
            step = stride(matrix.shape[1])
            stored[key] = tuple(allocator.allocate(matrix.shape[1], matrix.shape[0]))
            view = self.buffer[: num_elements // step * step].view(-1, step)[:, : matrix.shape[1]]
            view[torch.tensor(stored[key], device=self.device)] = matrix
        return stored

    @staticmethod
    def _site_rows(own: MemberWeights, stored: Mapping[int, tuple[int, ...]]) -> SiteRows:
        fields = {UP_SCALE: own.up_scale, OUT_SCALE: own.out_scale}
        vectors = {name: stored[id(vector)][0] for name, vector in fields.items() if vector is not None}
        return SiteRows(stored[id(own.down)], stored[id(own.up)], own.mid_scale, None, vectors)

    def _group_table(self) -> GroupTable:
        d_in, widths = self.group.d_in, self.group.widths
        members = [[m, width, sum(widths[:m]), stride(width), self._vector_stride(width)]
                   for m, width in enumerate(widths)]  # fmt: skip
        table = torch.tensor(members, dtype=torch.int32, device=self.device)
        return GroupTable(-1, False, d_in, widths, stride(d_in), self._vector_stride(d_in), table)

    def _vector_stride(self, width: int) -> int:
        per_float = 4 // self.dtype.itemsize
        return stride(width * per_float) // per_float

    def _classes(self) -> torch.Tensor:
        """One for each slot, the same for slots of the same matrices."""
        firsts = [id(own[0].down) for own in self.weights]
        return torch.tensor([0, *(firsts.index(first) + 1 for first in firsts)])

    @property
    def moved_bytes(self) -> int:
        """Each distinct matrix and vector once, the input once, the output read and written."""
        tensors = {id(t): t for own in self.weights for m in own for t in m.tensors()}
        rows = sum(t.numel() * t.element_size() for t in tensors.values())
        return rows + (self.x.numel() + 2 * self.y.numel()) * self.dtype.itemsize

    @property
    def num_flops(self) -> int:
        """Of the products, without padding."""
        ranks = sum(adapter.rank * adapter.num_tokens for adapter in self.batch.adapters)
        return 2 * ranks * (len(self.group.widths) * self.group.d_in + sum(self.group.widths))

    @cached_property
    def expected(self) -> torch.Tensor:
        """In float64."""
        x, y = self.x.double(), self.y.double()
        for slot, own in enumerate(self.weights, start=1):
            tokens = torch.nonzero(self.slots == slot)[:, 0].to(self.device)
            columns = torch.split(y[tokens], list(self.group.widths), dim=1)
            y[tokens] = torch.cat([m.applied(x[tokens], part) for m, part in zip(own, columns, strict=True)], dim=1)
        return y
