"""What Linux says of this machine: its memory, how much of it a new process may still take, and its processor.

Owns /proc/meminfo, /proc/cpuinfo and control groups (both versions; a container's limit is one). Knows nothing about
what memory is for, or about GPUs.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True, slots=True)
class Ram:
    """Bytes. `available_bytes` is what can be taken before something is pushed out or killed, limits counted."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None  # the narrowest of the control groups that this process is in; None: there is none


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor: its name, the cores that this process may use, and which of the extensions that matter it has."""

    name: str
    num_cores: int
    flags: tuple[str, ...]


def cpu(root: Path = Path("/")) -> Cpu:
    """As far as the system says. `root` is where `proc` lies."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = [(name.strip(), text.strip()) for name, _, text in (line.partition(":") for line in lines)]
    found = dict(reversed(pairs))  # of many cores, the first
    flags = set((found.get("flags") or found.get("Features") or "").split())
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpu(found.get("model name", "unknown"), num_cores, tuple(flag for flag in _CPU_FLAGS if flag in flags))


def ram(root: Path = Path("/")) -> Ram:
    """The memory as this process may use it; outside Linux, where nobody says what is free, all that there is.

    `root` is where `proc` and `sys` lie.
    """
    found = _meminfo(root)
    if not found.keys() >= {"MemTotal", "MemAvailable"}:
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Ram(total_bytes, total_bytes, None)
    groups = list(_groups(root))
    return Ram(
        total_bytes=found["MemTotal"],
        available_bytes=max(0, min([found["MemAvailable"], *(limit - used for limit, used in groups)])),
        limit_bytes=min((limit for limit, _ in groups), default=None),
    )


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each control group around this process that has a limit.

    What the files' cache holds can be had again and does not count as used, as in MemAvailable.
    """
    for folder, limit_file, used_file, cache_word in _folders(root):
        try:
            limit_text = (folder / limit_file).read_text(encoding="ascii").strip()
            limit = _UNLIMITED if limit_text == "max" else int(limit_text)
            used = int((folder / used_file).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue  # the group of all groups has no such files, nor has one that went meanwhile
        if limit < _UNLIMITED:
            yield limit, max(0, used - int(stat.get(cache_word, "0")))


def _folders(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The groups around this process, from within to without, with the names of their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounted, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounted = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = mounted / path.lstrip("/")
        # A container sees its own group at the mount's root, and may be told its path outside, which is not there.
        while inner != mounted:
            yield inner, *names
            inner = inner.parent
        yield mounted, *names
