"""Priority: who is admitted earlier and who gives way, and that whatever has once run ends."""

from dataclasses import replace
from typing import Any

import pytest

from server.engine.sequence import Sequence, SequenceStatus
from tests.engine.test_scheduler import Server, alone, assert_nothing_is_held


def ask(server: Server, priority: int, **what: Any) -> Sequence:
    sequence = server.sequence(**what)
    sequence.params = replace(sequence.params, priority=priority)
    return server.add(sequence)


def test_the_lower_number_is_admitted_first_and_equals_by_arrival() -> None:
    server = Server(max_sequences=1)
    asked = [ask(server, priority) for priority in (1, 0, 5, -3, 0, 1)]
    server.run_to_the_end()
    ended = [sequence_id for sequence_id, _ in server.endings]
    assert ended == [asked[i].sequence_id for i in (3, 1, 4, 0, 5, 2)]


def test_what_runs_keeps_its_seat_when_something_more_urgent_comes() -> None:
    server = Server(max_sequences=1)
    slow = ask(server, 9, max_tokens=8)
    server.step()
    ask(server, -9)
    server.run_to_the_end()
    assert server.endings[0][0] == slow.sequence_id
    assert server.scheduler.num_preemptions == 0


def test_of_those_that_run_the_least_urgent_gives_its_blocks() -> None:
    server = Server(num_blocks=6, block_size=4)
    low, high = ask(server, 5, max_tokens=18), ask(server, 0, max_tokens=18)
    server.step_until_preemption()
    assert (low.status, high.status) == (SequenceStatus.WAITING, SequenceStatus.RUNNING)
    server.run_to_the_end()
    assert (low.output_ids, high.output_ids) == (alone(low), alone(high))
    assert_nothing_is_held(server)


def test_what_was_preempted_comes_back_before_any_newcomer() -> None:
    """A flood of urgent requests, a new one in every step, cannot keep out what has begun."""
    server = Server(num_blocks=6, block_size=4)
    low = ask(server, 5, max_tokens=18)
    ask(server, 0, max_tokens=18)
    server.step_until_preemption()
    for _ in range(200):
        if low.status is SequenceStatus.FINISHED:
            break
        ask(server, -5, max_tokens=3)
        server.step()
    assert low.output_ids == alone(low)
    server.run_to_the_end()
    assert_nothing_is_held(server)


def test_an_adapter_that_has_waited_too_long_has_its_turn_whatever_the_priority() -> None:
    server = Server(room=1, max_adapter_wait_s=1.0, num_blocks=400, max_queued=1000)
    starved = ask(server, 9, version="b")
    for _ in range(400):
        if starved.status is SequenceStatus.FINISHED:
            break
        ask(server, -9, version="a", max_tokens=4)
        server.step()
        server.now_s += 0.125
    assert starved.output_ids == alone(starved)


@pytest.mark.parametrize("priority", [-(2**31) + 1, 2**31 - 1])
def test_a_sequence_that_waits_can_be_aborted_wherever_it_stands(priority: int) -> None:
    server = Server(max_sequences=1)
    ask(server, 0)
    server.step()
    others = [ask(server, number) for number in (0, priority, 0)]
    for sequence in others:
        assert server.scheduler.abort(sequence.sequence_id) is sequence
        server.scheduler.check_integrity()
    server.run_to_the_end()
    assert_nothing_is_held(server)
