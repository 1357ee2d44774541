"""Copies and steps on streams that work off their queues in any order that waits allow: no step reads wrong rows."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.device.device import DeviceTier
from server.adapters.device.transfers import Mark, Stream, Transfers
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.adapters.random_edits import random_adapter


@dataclass(eq=False)
class QueueMark:
    machine: "Machine"
    is_reached: bool = False

    def wait_here(self) -> None:
        while not self.is_reached:
            self.machine.advance()


@dataclass(eq=False)
class QueueStream:
    """A stream that does nothing until the machine advances it."""

    machine: "Machine"
    queue: list[Callable[[], None] | tuple[str, QueueMark]] = field(default_factory=list)

    def run(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def record(self) -> Mark:
        mark = QueueMark(self.machine)
        self.queue.append(("reach", mark))
        return mark

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, QueueMark)
        self.queue.append(("wait", mark))

    @property
    def can_advance(self) -> bool:
        match self.queue[:1]:
            case []:
                return False
            case [("wait", QueueMark(is_reached=is_reached))]:
                return is_reached
            case _:
                return True

    def advance(self) -> None:
        match self.queue.pop(0):
            case ("reach", mark):
                mark.is_reached = True
            case ("wait", _):
                pass
            case work:
                work()  # type: ignore[operator]


class Machine:
    """A device with streams; which of those that can advance does is drawn by chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.streams: list[QueueStream] = []

    def stream(self) -> QueueStream:
        self.streams.append(QueueStream(self))
        return self.streams[-1]

    def advance(self) -> bool:
        ready = [stream for stream in self.streams if stream.can_advance]
        if ready:
            self._random.choice(ready).advance()
        return bool(ready)

    def finish(self) -> None:
        while self.advance():
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for one another"


def transfers(machine: Machine) -> tuple[Transfers, QueueStream, QueueStream]:
    copies, steps = machine.stream(), machine.stream()

    def current() -> Stream:
        return steps

    return Transfers(copies, current), copies, steps


@given(st.integers(0, 2**32), st.lists(st.sampled_from(["swap", "step", "advance", "swap here"]), max_size=60))
def test_a_step_reads_what_was_copied_last_before_it_was_queued(seed: int, events: list[str]) -> None:
    """One row that changes hands: each swap frees it and copies another number; each step notes what it reads."""
    machine = Machine(seed)
    known, _, steps = transfers(machine)
    row, number, read, expected = [0], 0, [], []
    for event in events:
        if event == "advance":
            machine.advance()
        elif event == "step":
            known.before_step()
            steps.run(lambda: read.append(row[0]))
            expected.append(number)
        else:
            number += 1
            known.rows_freed()
            arrival = known.start(lambda number=number: row.__setitem__(0, number))  # type: ignore[misc]
            if event == "swap here":
                arrival.wait_here()
                assert row[0] == number
            else:
                known.hold_steps(arrival)
    machine.finish()
    assert read == expected


def test_a_copy_into_rows_that_nobody_left_waits_for_no_step() -> None:
    machine = Machine(0)
    known, copies, steps = transfers(machine)
    machine.finish()
    done: list[str] = []
    known.before_step()
    steps.run(lambda: done.append("step"))
    known.start(lambda: done.append("copy"))
    while copies.can_advance:
        copies.advance()
    assert done == ["copy"]


def test_a_step_that_was_queued_before_does_not_wait_for_a_copy() -> None:
    machine = Machine(0)
    known, copies, steps = transfers(machine)
    machine.finish()
    known.before_step()
    steps.run(lambda: None)
    known.hold_steps(known.start(lambda: None))
    while steps.can_advance:
        steps.advance()
    assert (len(steps.queue), bool(copies.queue)) == (0, True)


# The device tier on such a machine


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


@pytest.fixture
def adapters(base: Base) -> list[HostAdapter]:
    host = HostTier(1 << 30, torch.float32)
    made = [random_adapter(base.sites.sites, seed) for seed in range(2)]
    return [host.put(str(seed), lowered) for seed, lowered in enumerate(made)]


@pytest.mark.parametrize("seed", range(10))
def test_an_adapter_in_rows_that_another_left_arrives_after_the_steps_that_read_them(
    seed: int, base: Base, adapters: list[HostAdapter]
) -> None:
    machine = Machine(seed)
    device = DeviceTier(base.sites, 8 << 20, torch.float32, torch.device("cpu"))
    device._transfers, _, steps = transfers(machine)
    seen: list[torch.Tensor] = []

    def step(digest: str) -> None:
        rows = device._slots[device._slot_of[digest]].rows
        device.before_step()
        steps.run(lambda: seen.append(_contents(device, rows.values())))

    for digest, adapter in (("0", adapters[0]), ("1", adapters[1]), ("0", adapters[0])):
        device.admit(digest, adapter)
        step(digest)
        device.release(digest)
    machine.finish()
    assert torch.equal(seen[0], seen[2])
    assert seen[0].abs().sum() > 0
    assert seen[1].abs().sum() > 0


def test_what_is_large_is_there_when_its_copy_returns(
    base: Base, adapters: list[HostAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.adapters.device.device._AWAITED_BYTES", 0)
    machine = Machine(1)
    device = DeviceTier(base.sites, 8 << 20, torch.float32, torch.device("cpu"))
    device._transfers, copies, _ = transfers(machine)
    device.admit("0", adapters[0])
    assert not copies.queue


def _contents(device: DeviceTier, rows: object) -> torch.Tensor:
    """All numbers in these rows, in order."""
    found = [device.row_view(own.width)[list(own.numbers)].flatten() for own in rows]  # type: ignore[attr-defined]
    return torch.cat(found).clone()
