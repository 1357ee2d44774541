"""What tests of faults count: a request that is lost fails its test, unless it was in flight in a killed process."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.faults import record
from tests.faults.load import CASES, NUM_CLIENTS, Case, End, Load, settled
from tests.faults.record import MAX_RESTART_S, Counts, is_good, totals

RIGHT: Mapping[Case, str] = dict.fromkeys(CASES, "right")
FIRST, SECOND = "http://first", "http://second"


def load_of(*ends: tuple[End, str]) -> Load:
    load = Load(lambda: SECOND, RIGHT)
    load._stop.set()  # nobody is to wait
    for end, url in ends:
        load._note(CASES[0], end, url)
    return load


def test_what_is_lost_in_a_killed_process_is_told_from_what_is_lost_elsewhere() -> None:
    load = load_of(*[(End(detail="broken"), FIRST)] * NUM_CLIENTS, (End(text="right"), SECOND))
    with pytest.raises(AssertionError):
        load.check()
    load.killed = [FIRST]
    load.check()
    load._note(CASES[0], End(detail="broken"), SECOND)
    with pytest.raises(AssertionError):
        load.check()


def test_no_more_are_lost_with_a_process_than_it_had_in_flight() -> None:
    load = load_of(*[(End(detail="broken"), FIRST)] * (NUM_CLIENTS + 1))
    load.killed = [FIRST]
    with pytest.raises(AssertionError):
        load.check()


@pytest.mark.parametrize("end", [End(text="left"), End(code="overloaded"), End(detail="refused", is_sent=False)])
def test_what_no_fault_explains_fails(end: End) -> None:
    with pytest.raises(AssertionError):
        load_of((end, FIRST)).check()


def test_what_is_left_over_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.load.PATIENCE_S", 0.0)
    load = load_of((End(text="right"), FIRST))
    load.left_over = settled(lambda: {"leases": 1, "blocks": 0})
    with pytest.raises(AssertionError, match="leases"):
        load.check()


def test_a_restart_that_takes_minutes_fails() -> None:
    load = load_of((End(text="right"), FIRST))
    load.killed, load.restarts_s = [FIRST], [8.0]
    load.check()
    load.restarts_s = [8.0, MAX_RESTART_S]
    with pytest.raises(AssertionError):
        load.check()


def test_counts_are_noted_before_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS_NOTED_IN", str(tmp_path / "lines"))
    with pytest.raises(AssertionError):
        load_of((End(text="wrong"), FIRST), (End(text="right"), FIRST), (End(code="overloaded"), FIRST)).check()
    counts = Counts(**json.loads((tmp_path / "lines").read_text()))
    assert counts.fault == "test_counts_are_noted_before_they_fail"
    assert (counts.num_sent, counts.num_right, counts.num_wrong, counts.refused) == (3, 1, 1, {"overloaded": 1})


def test_totals_tell_a_good_record_from_one_that_is_not() -> None:
    faults = [Counts(f"fault {number}", num_right=2, refused={"a": 1}) for number in range(record.MIN_FAULTS)]
    killed = Counts("killed", num_right=1, num_lost_with_process=3, num_killed=1, restarts_s=[2.0, 3.0])
    at_the_end = Counts("when all were over", left_over={"threads": 0})
    sums = totals([*faults, killed, at_the_end])
    assert is_good(sums)
    assert (sums["num_faults"], sums["num_sent"], sums["num_refused"]) == (26, 79, 25)
    assert (sums["num_killed"], sums["num_lost_with_process"], sums["max_restart_s"]) == (1, 3, 3.0)
    assert not is_good(totals(faults[1:]))
    for bad in (Counts("x", num_lost=1), Counts("x", num_wrong=1), Counts("x", left_over={"threads": 1})):
        assert not is_good(totals([*faults, bad]))


@pytest.mark.parametrize("have_passed", [True, False])
def test_one_command_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, have_passed: bool) -> None:
    def run_tests(lines: Path) -> bool:
        monkeypatch.setenv("FAULTS_NOTED_IN", str(lines))
        for number in range(record.MIN_FAULTS):
            record.note(Counts(f"fault {number}", num_right=1))
            record.note(Counts(f"fault {number}[in another way]", num_right=1))
        return have_passed

    monkeypatch.setattr(record, "run_tests", run_tests)
    monkeypatch.setattr(sys, "argv", ["record", "--out", str(tmp_path / "out.json")])
    assert record.main() == int(not have_passed)
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["totals"]["num_faults"], report["totals"]["have_passed"]) == (record.MIN_FAULTS, have_passed)
    assert len(report["rows"]) == 2 * record.MIN_FAULTS
