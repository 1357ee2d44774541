"""Free memory as a process may use it: the machine's, or what is left of the narrowest container around it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from server.ground.machine import Ram, cpu, ram

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB >> 10} kB\n"


def two(limit: str, used: int, cached: int) -> dict[str, str]:
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": f"inactive_file {cached}\n"}


def one(limit: int, used: int, cached: int) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"total_inactive_file {cached}\n",
    }


def machine(root: Path, groups: str, folders: Mapping[str, Mapping[str, str]], meminfo: str = MEMINFO) -> Ram:
    texts = {"proc/meminfo": meminfo, "proc/self/cgroup": groups}
    texts |= {f"sys/fs/cgroup/{folder}/{name}": text for folder, own in folders.items() for name, text in own.items()}
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return ram(root)


@pytest.mark.parametrize(
    ("groups", "folders", "available", "limit"),
    [
        ("", {}, 12 * GIB, None),
        ("0::/\n", {}, 12 * GIB, None),
        ("0::/a/b\n", {"a/b": two("max", 5, 0)}, 12 * GIB, None),
        ("0::/\n", {".": two(str(4 * GIB), 3 * GIB, GIB)}, 2 * GIB, 4 * GIB),
        # The group outside is the narrower one.
        ("0::/a/b\n", {"a": two(str(GIB), GIB // 2, 0), "a/b": two(str(2 * GIB), 0, 0)}, GIB // 2, GIB),
        # More than the machine has.
        ("0::/\n", {".": two(str(64 * GIB), 0, 0)}, 12 * GIB, 64 * GIB),
        # Used up.
        ("0::/\n", {".": two(str(GIB), 2 * GIB, 0)}, 0, GIB),
        ("5:cpu:/x\n4:cpuset,memory:/job\n", {"memory/job": one(3 * GIB, GIB, 0)}, 2 * GIB, 3 * GIB),
        ("4:memory:/\n", {"memory": one(9223372036854771712, GIB, 0)}, 12 * GIB, None),
        # Named from outside; the container's own group lies at the mount's root.
        ("0::/system.slice/docker-1.scope\n", {".": two(str(GIB), 0, 0)}, GIB, GIB),
        ("0::/\n", {".": two("nonsense", 0, 0)}, 12 * GIB, None),
    ],
    ids=[
        "no-groups", "root", "no-limit", "cache-is-free", "outer", "wide", "full", "version-1", "version-1-none",
        "docker", "nonsense",
    ],
)  # fmt: skip
def test_what_is_available_counts_the_limits_of_containers(
    groups: str, folders: Mapping[str, Mapping[str, str]], available: int, limit: int | None, tmp_path: Path
) -> None:
    assert machine(tmp_path, groups, folders) == Ram(16 * GIB, available, limit)


@pytest.mark.parametrize("meminfo", ["", "MemTotal: 5 kB\n"])
def test_where_the_system_does_not_say_what_is_free_it_is_all(meminfo: str, tmp_path: Path) -> None:
    found = machine(tmp_path, "", {}, meminfo)
    assert found == Ram(found.total_bytes, found.total_bytes, None)
    assert found.total_bytes > GIB // 4


def test_of_a_processors_extensions_those_are_told_that_matter(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    core = "processor : {}\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\n"
    (tmp_path / "proc/cpuinfo").write_text(core.format(0) + core.format(1))
    found = cpu(tmp_path)
    assert (found.name, found.flags) == ("Some CPU", ("avx2", "avx512_bf16", "amx_bf16"))
    assert found.num_cores >= 1
    assert (cpu(tmp_path / "elsewhere").name, cpu(tmp_path / "elsewhere").flags) == ("unknown", ())
