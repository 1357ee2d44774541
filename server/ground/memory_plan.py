"""What goes where in the memory of the device, decided before anything large is allocated.

Owns the arithmetic, its table, and the sentences that say which dial to turn where it does not come out. Knows nothing
about models, and measures nothing.

The server takes at most a share (--memory-share) of what is free. Base, graphs, adapters and workspace have fixed
sizes; the KV cache gets what is asked for (--kv-memory), or a part of the rest, and never more blocks than could be
used.
"""

import math
from dataclasses import dataclass

from server.ground.errors import StartupRefused

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What is to be placed; bytes, all at least 0, `block_bytes` and `max_blocks` at least 1."""

    base_bytes: int
    graph_bytes: int  # captured decode steps; 0 where there are none
    adapter_bytes: int  # --adapter-memory
    workspace_bytes: int  # what a step needs for a moment
    block_bytes: int
    block_tokens: int
    max_blocks: int  # that all sequences together could use
    kv_bytes: int | None = None  # --kv-memory

    @property
    def fixed_parts(self) -> tuple[tuple[str, int], ...]:
        """All but the KV cache: (name, bytes)."""
        return (
            ("base", self.base_bytes),
            ("graphs", self.graph_bytes),
            ("adapters", self.adapter_bytes),
            ("workspace", self.workspace_bytes),
        )

    @property
    def fixed_bytes(self) -> int:
        return sum(size for _, size in self.fixed_parts)

    @property
    def least_kv_bytes(self) -> int:
        """What the KV cache was given, in whole blocks that could be used; else one block."""
        num_blocks = 1 if self.kv_bytes is None else min(self.max_blocks, self.kv_bytes // self.block_bytes)
        return max(1, num_blocks) * self.block_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What each part gets. The parts together are at most `budget_bytes`."""

    needs: MemoryNeeds
    free_bytes: int  # with nothing loaded yet
    share: float
    num_blocks: int

    @property
    def budget_bytes(self) -> int:
        return int(self.free_bytes * self.share)

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.needs.block_bytes

    @property
    def total_bytes(self) -> int:
        return self.needs.fixed_bytes + self.kv_bytes

    def rows(self) -> tuple[tuple[str, int, str], ...]:
        """(part, bytes, what decides it), for people and for JSON."""
        needs = self.needs
        reasons = (
            "MODEL, --quantize",
            "captured decode steps" if needs.graph_bytes else "none on a CPU",
            "--adapter-memory",
            "an estimate, by --max-batch-tokens and --max-sequences",
        )
        tokens = self.num_blocks * needs.block_tokens
        return (
            *((name, size, why) for (name, size), why in zip(needs.fixed_parts, reasons, strict=True)),
            ("KV cache", self.kv_bytes, f"--kv-memory: {self.num_blocks:,} blocks, {tokens:,} tokens"),
            ("left", self.budget_bytes - self.total_bytes, f"of --memory-share {self.share:g}"),
            ("free before", self.free_bytes, "as measured, limits of containers counted"),
        )

    def table(self) -> str:
        """The rows under one another, each with its size in MiB; no newline at the end."""
        return "\n".join(f"  {name:<12}{_mib(size):>14}  {why}" for name, size, why in self.rows())


def plan(needs: MemoryNeeds, free_bytes: int, share: float, kv_part: float) -> MemoryPlan:
    """Shares out `free_bytes` x `share`.

    Without `needs.kv_bytes` the KV cache may take `kv_part` (0 to 1) of what the fixed parts leave. Raises
    StartupRefused with the dial to turn and how far.
    """
    if needs.kv_bytes is not None and needs.kv_bytes < needs.block_bytes:
        raise StartupRefused(
            f"the KV cache has {needs.kv_bytes} bytes, and one block of {needs.block_tokens} tokens takes "
            f"{needs.block_bytes}: raise --kv-memory"
        )
    budget = int(free_bytes * share)
    rest = budget - needs.fixed_bytes
    if rest < needs.block_bytes:
        raise _too_small(needs, free_bytes, share)
    kv_bytes = max(int(kv_part * rest), needs.block_bytes) if needs.kv_bytes is None else needs.kv_bytes
    num_blocks = min(needs.max_blocks, kv_bytes // needs.block_bytes)
    if num_blocks * needs.block_bytes > rest:
        raise StartupRefused(
            f"--kv-memory asks for {_mib(num_blocks * needs.block_bytes)}, and the rest leaves {_mib(rest)} of "
            f"{_budget(budget, free_bytes, share)}: lower --kv-memory to at most {_floor_mib(rest)}"
            f"{_or_raise_share(needs.fixed_bytes + needs.least_kv_bytes, free_bytes)}"
        )
    return MemoryPlan(needs, free_bytes, share, num_blocks)


def _too_small(needs: MemoryNeeds, free_bytes: int, share: float) -> StartupRefused:
    """What does not fit even with a KV cache of one block."""
    budget = int(free_bytes * share)
    wanted = needs.fixed_bytes + needs.block_bytes
    for_adapters = needs.adapter_bytes - (wanted - budget)
    if for_adapters >= _MIB:
        remedy = f"lower --adapter-memory to at most {_floor_mib(for_adapters)}"
    elif wanted - needs.adapter_bytes - needs.workspace_bytes < budget:
        remedy = "lower --adapter-memory, and --max-batch-tokens or --max-sequences"
    else:
        remedy = "take a smaller base, or --quantize nf4"
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in needs.fixed_parts)
    return StartupRefused(
        f"this does not fit into {_budget(budget, free_bytes, share)}: {parts}, and a block of the KV cache "
        f"{_mib(needs.block_bytes)}: {remedy}"
        f"{_or_raise_share(needs.fixed_bytes + needs.least_kv_bytes, free_bytes)}"
    )


def _or_raise_share(wanted: int, free_bytes: int) -> str:
    least = math.ceil(1000 * wanted / free_bytes) / 1000 if free_bytes else math.inf
    if least < 1 and int(free_bytes * least) < wanted:  # a product that comes out a hair too low
        least = round(least + 0.001, 3)
    return f", or raise --memory-share to {least:g}" if least <= 1 else ", or free memory"


def _budget(budget: int, free_bytes: int, share: float) -> str:
    return f"{_mib(budget)} (--memory-share {share:g} of {_mib(free_bytes)} that are free)"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"


def _floor_mib(num_bytes: int) -> str:
    """As the settings take it, never more than there is."""
    return f"{num_bytes // _MIB}MiB" if num_bytes >= _MIB else f"{num_bytes}"
