"""Sequences whose adapters have virtual tokens, or are applied at some positions only: scheduled, preempted, shared."""

import random

import pytest

from server.adapters.positions import FromInvocation, PromptEnds, Reach
from server.engine.sequence import FinishReason, SamplingParams, Sequence
from server.ground.errors import ContextTooLong
from tests.engine.test_scheduler import SLOTS, Server, alone, assert_nothing_is_held, next_token

NUM_VIRTUAL = 6
VIRTUAL = [-1, -2, -3, -4, -5, -6]


def with_virtual_tokens(**options: int) -> Server:
    server = Server(reuses_prefixes=True, **options)
    server.residency.reaches[SLOTS["a"]] = Reach((SLOTS["a"],), None, NUM_VIRTUAL)
    return server


def expected(sequence: Sequence) -> list[int]:
    """What the fake model generates alone after the virtual tokens and the prompt."""
    known = [*VIRTUAL, *sequence.prompt_ids]
    for _ in range(sequence.params.max_tokens):
        known.append(next_token(known, SLOTS["a"]))
    return known[NUM_VIRTUAL + len(sequence.prompt_ids) :]


def test_virtual_tokens_come_before_the_prompt() -> None:
    sequence = Sequence("s", [8, 9], SamplingParams(2), "a", "a", output_ids=[3])
    sequence.take(1, Reach((1,), None, 2))
    assert sequence.all_ids == [-1, -2, 8, 9, 3]
    assert (sequence.num_prompt_tokens, sequence.num_first_tokens, sequence.num_tokens) == (2, 4, 5)
    assert sequence.max_total_tokens == 6
    for start in range(6):
        for stop in range(start, 6):
            assert sequence.token_ids(start, stop) == sequence.all_ids[start:stop]


def test_they_are_computed_in_chunks_as_the_prompt_is() -> None:
    server = with_virtual_tokens(max_batch_tokens=8)
    sequence = server.add(server.sequence(num_prompt=5, max_tokens=4, version="a"))
    assert [item.token_ids for item in server.step().sequences] == [[*VIRTUAL, *sequence.prompt_ids[:2]]]
    server.run_to_the_end()
    assert sequence.output_ids == expected(sequence)
    assert_nothing_is_held(server)


def test_they_are_computed_again_after_a_preemption() -> None:
    server = with_virtual_tokens(num_blocks=6)
    first = server.add(server.sequence(num_prompt=3, max_tokens=7, version="a"))
    second = server.add(server.sequence(num_prompt=4, max_tokens=6, version="a"))
    server.run_to_the_end()
    assert server.scheduler.num_preemptions > 0
    assert [first.output_ids, second.output_ids] == [expected(first), expected(second)]
    assert_nothing_is_held(server)


def test_their_blocks_are_found_by_every_prompt_and_are_no_part_of_it() -> None:
    server = with_virtual_tokens()
    for num_prompt in (9, 3):
        sequence = server.add(server.sequence(num_prompt=num_prompt, max_tokens=3, version="a"))
        server.run_to_the_end()
        assert sequence.output_ids == expected(sequence)
    assert server.scheduler.num_hit_tokens == NUM_VIRTUAL  # a full block of four, and two copied out of another
    assert sequence.num_cached_tokens == 0


def test_what_is_copied_may_be_given_away_in_the_same_step() -> None:
    """The block that the virtual tokens lie in is free, and goes to another sequence of the step that copies it."""
    server = with_virtual_tokens(num_blocks=8)
    first = server.add(server.sequence(num_prompt=1, max_tokens=1, version="a"))
    server.run_to_the_end()
    others = [server.add(server.sequence(num_prompt=3, max_tokens=2, version="a")) for _ in range(2)]
    others.append(server.add(server.sequence(num_prompt=6, max_tokens=2)))
    copied = [item.copied_block for item in server.step().sequences]
    assert copied[0] is not None
    server.run_to_the_end()
    assert [s.output_ids for s in (first, *others[:2])] == [expected(s) for s in (first, *others[:2])]
    assert others[2].output_ids == alone(others[2])
    assert_nothing_is_held(server)


@pytest.mark.parametrize("seed", range(8))
def test_whoever_comes_and_goes_reads_the_virtual_tokens(seed: int) -> None:
    """Few blocks, preemptions, aborts: every answer is that of a sequence alone."""
    dice = random.Random(seed)
    server = with_virtual_tokens(num_blocks=9)
    added = []
    for _ in range(60):
        version = dice.choice(["a", "a", None])
        added.append(server.add(server.sequence(dice.randint(1, 9), dice.randint(1, 6), version)))
        for _ in range(dice.randint(0, 3)):
            server.step()
        if dice.random() < 0.1:
            gone = dice.choice(added)
            if server.scheduler.abort(gone.sequence_id) is not None:
                added.remove(gone)
    server.run_to_the_end()
    assert [s.output_ids for s in added] == [expected(s) if s.version else alone(s) for s in added]
    assert server.scheduler.num_preemptions > 0
    assert_nothing_is_held(server)


def test_a_prompt_that_they_leave_no_room_is_refused_at_the_door() -> None:
    server = with_virtual_tokens(max_context=12)
    sequence = server.sequence(num_prompt=7, max_tokens=3, version="a")
    with pytest.raises(ContextTooLong, match="7 tokens and the adapter puts 6 virtual ones"):
        server.scheduler.add(sequence)
    assert_nothing_is_held(server)


def test_an_adapter_that_loads_meanwhile_is_not_asked_for_its_place() -> None:
    """How many virtual tokens it has is known once it is loaded: in time to refuse before anybody makes room."""
    server = with_virtual_tokens(max_context=12, room=1)
    server.residency.absent.add("a")
    other = server.add(server.sequence(num_prompt=2, max_tokens=9, version="b"))
    sequence = server.add(server.sequence(num_prompt=7, max_tokens=3, version="a"))
    server.step()
    num_asked = server.residency.num_asked["a"]
    server.residency.absent.clear()
    server.now_s += 100  # it is overdue, and others would have to give way
    [failed] = server.step().failed
    assert failed.sequence is sequence
    assert isinstance(failed.error, ContextTooLong)
    assert "6 virtual ones" in failed.error.message
    assert server.residency.num_asked["a"] == num_asked
    server.run_to_the_end()
    assert other.output_ids == alone(other)
    assert (server.scheduler.num_preemptions, server.scheduler.num_rotations) == (0, 0)
    assert_nothing_is_held(server)


def test_an_answer_ends_where_the_context_does() -> None:
    server = with_virtual_tokens(max_context=12)
    sequence = server.add(server.sequence(num_prompt=4, max_tokens=8, version="a"))
    server.run_to_the_end()
    assert (sequence.finish_reason, len(sequence.output_ids)) == (FinishReason.LENGTH, 2)
    assert_nothing_is_held(server)


def test_a_sequence_that_finds_no_blocks_waits_without_a_slot() -> None:
    server = with_virtual_tokens(num_blocks=4)
    server.add(server.sequence(num_prompt=9, max_tokens=5))
    waiting = server.add(server.sequence(num_prompt=3, max_tokens=3, version="a"))
    server.step()
    assert waiting.slot == 0
    server.run_to_the_end()
    assert waiting.output_ids == expected(waiting)


# Positions


@pytest.fixture
def activated() -> Sequence:
    sequence = Sequence("s", [1, 2, 7, 3], SamplingParams(4), "a", "a", output_ids=[4])
    sequence.take(5, Reach((5,), FromInvocation((7,))))
    return sequence


def test_before_its_invocation_a_token_is_the_bases(activated: Sequence) -> None:
    assert activated.slots(0, 5) == [0, 0, 5, 5, 5]
    assert activated.edit_identities(1, 4) == ["", "a#1", "a#1"]


def test_each_part_has_its_slot_and_its_identity() -> None:
    sequence = Sequence("s", [1, 2, 3, 4], SamplingParams(4), "a", "a", output_ids=[4])
    sequence.take(3, Reach((3, 9), PromptEnds(1, 2, last_part=2)))
    assert sequence.slots(0, 5) == [3, 0, 9, 9, 0]
    assert sequence.edit_identities(0, 5) == ["a#1", "", "a#2", "a#2", ""]


def test_rules_are_about_the_prompt_whatever_stands_before_it() -> None:
    sequence = Sequence("s", [1, 2, 3, 4], SamplingParams(4), "a", "a")
    sequence.take(3, Reach((3,), PromptEnds(1, 1), 2))
    assert sequence.slots(0, 6) == [0, 0, 3, 0, 0, 3]


def test_an_adapter_without_rules_edits_every_token() -> None:
    sequence = Sequence("s", [1, 2], SamplingParams(4), "a", "a")
    sequence.take(3, None)
    assert (sequence.slots(0, 2), sequence.edit_identities(0, 2)) == ([3, 3], ["a", "a"])
