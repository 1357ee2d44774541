"""The soak: a short one on a real server balances, and each thing that may be left behind fails it."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from load_tests import soak
from load_tests.soak import Course, Sample, Soak
from load_tests.soak_operations import OPERATIONS, World, Wrong, drawn

NUM_OPERATIONS = 80


def soaked(samples: list[Sample], max_slope_mib: float = 1.0) -> Soak:
    """A soak of 10,000 operations that took these samples, 3,000 of them to warm up."""
    course = Course(10_000, 0, 8, 1000, max_slope_mib, warm_up=0.3)
    return Soak(course, World("http://127.0.0.1:1", "base", (), None), None, None, samples=samples)


def course_of(rss_mib: list[float], num_threads: int = 10, num_descriptors: int = 20) -> list[Sample]:
    """A sample of the rested server every 1,000 operations."""
    return [
        Sample(1000 * (at + 1), rss, num_threads, num_descriptors, is_rested=True) for at, rss in enumerate(rss_mib)
    ]


def test_a_short_soak_of_a_real_server_balances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "_REST_S", 0.0)
    out, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    flags = ["--operations", str(NUM_OPERATIONS), "--check-every", "40", "--clients", "6", "--max-slope", "inf"]
    code = soak.main([*flags, "--out", str(out), "--plot", str(plot)])
    told = capsys.readouterr()
    assert code == 0, told.out + told.err
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert (report["schema"], report["num_done"], report["failures"]) == (soak.SCHEMA, NUM_OPERATIONS, [])
    assert {at for at, *_ in report["samples"]} >= {40, NUM_OPERATIONS}
    assert f"{NUM_OPERATIONS} operations, 0 failures" in told.out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_every_operation_comes_in_ten_thousand() -> None:
    dice = random.Random(0)
    assert {drawn(dice) for _ in range(10_000)} == set(OPERATIONS)


def test_memory_that_is_flat_after_the_warm_up_passes_however_it_began() -> None:
    flat = soaked(course_of([100, 300, 500, *[501, 500] * 3, 501]))
    flat._check_flat()
    assert flat.failures == []


def test_memory_that_grows_fails_with_the_figure() -> None:
    growing = soaked(course_of([500 + 1.5 * at for at in range(10)]))
    assert growing.slope_mib() == pytest.approx(1.5)
    growing._check_flat()
    [told] = growing.failures
    assert "resident memory grows by 1.50 MiB in 1,000 operations" in told


def test_a_heap_in_pieces_hides_no_growth_and_makes_none() -> None:
    pieces = [0, 20, 45, 3, 30, 0, 41, 12, 0, 44]
    flat = soaked(course_of([500.0 + more for more in pieces]))
    assert flat.slope_mib() == 0
    growing = soaked(course_of([500.0 + 2 * at + more for at, more in enumerate(pieces)]))
    assert growing.slope_mib() > 1


def test_what_a_server_at_work_takes_for_a_moment_is_no_growth() -> None:
    bursts = [Sample(3500 + 100 * at, 900.0 + at, 10, 20, is_rested=False) for at in range(60)]
    bursting = soaked(course_of([500.0] * 10) + bursts)
    bursting._check_flat()
    assert bursting.failures == []


@pytest.mark.parametrize("what", ["num_threads", "num_descriptors"])
def test_what_is_opened_and_never_closed_fails(what: str) -> None:
    few, many = course_of([500.0] * 3), course_of([500.0] * 10, **{what: 60})
    leaking = soaked(few + many[3:])
    leaking._check_flat()
    [told] = leaking.failures
    assert what in told


def test_what_is_on_disk_and_is_no_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "legal" / "v1").mkdir(parents=True)
    (tmp_path / "legal" / "current.json").touch()
    (tmp_path / ".incoming").mkdir()
    assert soak._on_disk(tmp_path) == {"legal": frozenset({"v1"})}
    (tmp_path / ".incoming" / "left-over").mkdir()
    (tmp_path / "no-index").mkdir()
    assert soak._on_disk(tmp_path)[""] == frozenset({"left-over", "no-index"})


def test_a_server_that_does_not_become_quiet_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = soak.State(Counter({"graft_adapter_leases": 1}), {})

    async def of(_: World) -> soak.State:
        return busy

    monkeypatch.setattr(soak.State, "of", of)
    monkeypatch.setattr(soak, "_QUIET_TIMEOUT_S", 0.0)
    watched = soaked([])
    asyncio.run(watched._become("quiet", lambda state: not any(state.metrics[name] for name in soak._GAUGES)))
    [told] = watched.failures
    assert "does not become quiet" in told
    assert "graft_adapter_leases" in told


def test_a_wrong_answer_and_one_that_never_comes_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(_: World, __: random.Random) -> None:
        raise Wrong("500")

    async def silent(_: World, __: random.Random) -> None:
        await asyncio.Event().wait()

    turns = iter((wrong, silent))
    monkeypatch.setattr(soak, "drawn", lambda _: next(turns))
    monkeypatch.setattr(soak, "_OPERATION_TIMEOUT_S", 0.01)
    asked = soaked([])
    asyncio.run(asked._client(random.Random(0), last=2))
    assert ["500" in asked.failures[0], "no end within" in asked.failures[1]] == [True, True]
    assert asked.num_done == 2


def test_no_server_is_an_error_that_says_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--url", "http://127.0.0.1:1", "--operations", "1"]) == 2
    assert "http://127.0.0.1:1/v1/models" in capsys.readouterr().err
