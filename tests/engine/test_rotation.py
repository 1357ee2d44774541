"""Adapters take turns on the device: nobody waits for room beyond the bound, every turn is of use, no token changes.

Time is the test's: each step takes `STEP_S`. What plays the forward pass and the device is `test_scheduler`'s.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sequence import Batch, FinishReason, Sequence, SequenceStatus
from tests.engine.test_scheduler import SLOTS, Server, alone, assert_nothing_is_held

LIMIT_S = 2.0
STEP_S = 0.125  # exact in binary, so that sums are


def rotating(room: int, **limits: Any) -> Server:
    """With blocks for all that these tests ask for, so that only room is short."""
    return Server(**{"room": room, "num_blocks": 400, "max_queued": 1000, **limits})


def step(server: Server) -> Batch:
    batch = server.step()
    server.now_s += STEP_S
    return batch


def run_to_the_end(server: Server) -> None:
    for _ in range(10_000):
        if not server.scheduler.num_running + server.scheduler.num_waiting:
            return
        step(server)
    raise AssertionError("something never ends")


def turns_of(server: Server, num_steps: int) -> Iterator[tuple[float, str]]:
    """(seconds, adapters that are held) after each of some steps."""
    for _ in range(num_steps):
        step(server)
        yield server.now_s, "".join(sorted(map(str, +server.residency.holds)))


def test_a_cold_adapter_waits_no_longer_than_the_limit_however_popular_the_warm_one() -> None:
    server = rotating(1)
    popular = [server.add(server.sequence(version="a", max_tokens=6))]
    step(server)
    cold = server.add(server.sequence(version="b", max_tokens=3))
    asked_s = server.now_s
    while not cold.has_started:
        popular.append(server.add(server.sequence(version="a", max_tokens=6)))
        step(server)
    assert server.now_s - asked_s == LIMIT_S + STEP_S
    run_to_the_end(server)
    assert {reason for _, reason in server.endings} == {FinishReason.LENGTH}
    assert [sequence.output_ids for sequence in (cold, *popular)] == [alone(s) for s in (cold, *popular)]
    assert_nothing_is_held(server)


def test_a_long_generation_gives_way_and_goes_on_with_the_same_tokens() -> None:
    server = rotating(1)
    long = server.add(server.sequence(version="a", max_tokens=400))
    step(server)
    short = server.add(server.sequence(version="b", max_tokens=4))
    while not short.has_started:
        step(server)
    assert server.now_s <= LIMIT_S + 2 * STEP_S
    assert (long.status, server.scheduler.num_rotations) == (SequenceStatus.WAITING, 1)
    assert 0 < long.num_output_tokens < 400
    run_to_the_end(server)
    assert (long.output_ids, short.output_ids) == (alone(long), alone(short))
    assert server.scheduler.num_rotations == 1, "what finished by itself made room without anybody's harm"
    assert_nothing_is_held(server)


def test_two_adapters_that_want_one_place_take_turns_of_the_whole_limit() -> None:
    server = rotating(1)
    both = [server.add(server.sequence(version=version, max_tokens=100)) for version in "ab"]
    held = [adapters for _, adapters in turns_of(server, 96)]
    lengths = [len(run) for run in "".join(held).replace("ab", "a b").replace("ba", "b a").split()]
    assert {LIMIT_S / STEP_S <= length <= LIMIT_S / STEP_S + 2 for length in lengths[:-1]} == {True}
    run_to_the_end(server)
    assert [sequence.output_ids for sequence in both] == [alone(sequence) for sequence in both]


def test_no_turn_ends_before_its_first_sequence_has_a_new_token() -> None:
    """Else two long prompts could drive one another out for ever, each computed in part again and again."""
    server = rotating(1, max_batch_tokens=8)
    prompts = [server.add(server.sequence(num_prompt=300, version=version, max_tokens=3)) for version in "ab"]
    run_to_the_end(server)  # a prompt takes 38 steps, the limit 16
    assert [sequence.output_ids for sequence in prompts] == [alone(sequence) for sequence in prompts]
    assert server.scheduler.num_rotations <= 2 * 3


def test_the_next_prompts_of_a_popular_adapter_do_not_prolong_its_turn() -> None:
    """Each is a chunked prompt that ends with its first token, so that one is always being computed."""
    server = rotating(1, max_batch_tokens=8)
    server.add(server.sequence(num_prompt=20, version="a", max_tokens=1))
    step(server)
    cold = server.add(server.sequence(version="b", max_tokens=1))
    while not cold.has_started:
        server.add(server.sequence(num_prompt=20, version="a", max_tokens=1))
        step(server)
    assert server.now_s <= LIMIT_S + 3 * STEP_S
    run_to_the_end(server)


def test_the_least_valuable_goes_first_and_what_may_not_leave_never() -> None:
    server = rotating(2)
    a, b = (server.add(server.sequence(version=version, max_tokens=200)) for version in "ab")
    server.residency.pinned = {"a"}
    step(server)
    server.add(server.sequence(version="c", max_tokens=200))
    for _, held in turns_of(server, 60):
        assert "a" in held
    assert a.status is SequenceStatus.RUNNING
    assert b.num_output_tokens < a.num_output_tokens
    server.residency.pinned = {"a", "b", "c"}
    num_rotations = server.scheduler.num_rotations
    run_to_the_end(server)
    assert server.scheduler.num_rotations == num_rotations


def test_who_waits_for_a_load_makes_nobody_give_way() -> None:
    server = rotating(1)
    server.add(server.sequence(version="a", max_tokens=100))
    step(server)
    server.add(server.sequence(version="b", max_tokens=5))
    step(server)
    server.residency.absent = {"b"}  # it lacked room, and then left the host as well
    for _, held in turns_of(server, 40):
        assert held == "a"
    server.residency.absent = set()
    assert [held for _, held in turns_of(server, 1)] == ["b"], "it had waited for room before"
    run_to_the_end(server)


def test_what_becomes_free_for_one_that_is_overdue_is_taken_by_nobody_else() -> None:
    """Adapter c fills the device alone, so that both others must have left."""
    server = rotating(2)
    residency, admit = server.residency, server.residency.admit
    residency.admit = lambda version: (  # type: ignore[method-assign]
        admit(version) if "c" not in {version, *+residency.holds} or not +residency.holds else None
    )
    server.add(server.sequence(version="a", max_tokens=200))
    step(server)
    large = server.add(server.sequence(version="c", max_tokens=4))
    server.now_s += LIMIT_S / 2
    server.add(server.sequence(version="b", max_tokens=200))  # its turn ends half a limit after a's
    while not large.has_started:
        step(server)
    assert server.now_s <= 2 * LIMIT_S + 3 * STEP_S
    run_to_the_end(server)
    assert_nothing_is_held(server)


def test_the_base_is_neither_held_back_nor_preempted_by_a_rotation() -> None:
    server = rotating(1)
    base = server.add(server.sequence(max_tokens=60))
    server.add(server.sequence(version="a", max_tokens=100))
    server.add(server.sequence(version="b", max_tokens=100))
    for _ in range(60):
        step(server)
        assert server.scheduler.num_preemptions == server.scheduler.num_rotations
    assert base.finish_reason is FinishReason.LENGTH


def test_an_abort_of_the_one_that_is_overdue_lets_the_others_in() -> None:
    server = rotating(1)
    server.residency.pinned = {"a"}
    server.add(server.sequence(version="a", max_tokens=100))
    step(server)
    overdue = server.add(server.sequence(version="b"))
    list(turns_of(server, 30))
    held_back = server.add(server.sequence(version="c"))
    server.residency.room = 2
    server.scheduler.abort(overdue.sequence_id)
    step(server)
    assert held_back.status is SequenceStatus.RUNNING


arrivals = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(sorted(map(str, SLOTS))), st.integers(1, 60), st.integers(1, 9)),
    min_size=1,
    max_size=14,
)  # steps after the one before; adapter, tokens to generate, tokens of the prompt


@settings(max_examples=60, deadline=None)
@given(arrivals=arrivals, room=st.integers(1, 2), limit_s=st.sampled_from([0.5, 1.0, 2.0]), reuses=st.booleans())
def test_nobody_waits_for_room_longer_than_the_guarantee(
    arrivals: list[tuple[int, str, int, int]], room: int, limit_s: float, reuses: bool
) -> None:
    """(1 + ceil(k / places)) limits for the k-th in line, and the steps in which prompts are computed."""
    server = rotating(room, max_adapter_wait_s=limit_s, max_sequences=16, max_batch_tokens=64, reuses_prefixes=reuses)
    accepted: list[Sequence] = []
    bound_s = (1 + math.ceil(len(SLOTS) / room)) * (limit_s + 3 * STEP_S)
    waits: dict[str, float] = {}  # since when each waiting sequence has not run

    def checked_step() -> None:
        step(server)
        for sequence in accepted:
            if sequence.status is SequenceStatus.WAITING:
                waits.setdefault(sequence.sequence_id, server.now_s)
                assert server.now_s - waits[sequence.sequence_id] <= bound_s
            else:
                waits.pop(sequence.sequence_id, None)

    for num_steps, version, max_tokens, num_prompt in arrivals:
        for _ in range(num_steps):
            checked_step()
        accepted.append(server.add(server.sequence(num_prompt, max_tokens, version)))
    while server.scheduler.num_running + server.scheduler.num_waiting:
        checked_step()
    assert [sequence.output_ids for sequence in accepted] == [alone(sequence) for sequence in accepted]
    assert_nothing_is_held(server)


@pytest.mark.parametrize("room", [1, 2])
def test_cyclic_demand_for_more_than_fit_serves_all_alike(room: int) -> None:
    server = rotating(room)
    streams = [server.add(server.sequence(version=version, max_tokens=150)) for version in "abc"]
    for _ in range(300):
        step(server)
    shares = [sequence.num_output_tokens for sequence in streams]
    assert max(shares) - min(shares) <= 2 * LIMIT_S / STEP_S
