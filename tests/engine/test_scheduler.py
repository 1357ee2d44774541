"""The scheduler: budgets, order, preemption, and one ending for every sequence.

The forward pass is played by `FakeRunner`, which keeps a real KV cache of token numbers: what a sequence reads through
its blocks decides its next token, so a lost, repeated or overwritten token changes the output.
"""

import pickle
from collections import Counter
from collections.abc import Hashable, Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.adapters.positions import Reach
from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import (
    Batch,
    Delta,
    FinishReason,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    TokenLogprobs,
)
from server.ground.errors import (
    AdapterRejected,
    BadRequest,
    ContextTooLong,
    GenerationFailed,
    Overloaded,
    RequestTimedOut,
    StartupRefused,
)

VOCABULARY = 24
EOS = 7
SLOTS: dict[Hashable, int] = {"a": 1, "b": 2, "c": 3}


def next_token(ids: list[int], slot: int) -> int:
    """The fake model: every earlier token, its position and the slot decide."""
    state = slot
    for position, token in enumerate(ids):
        state = (state * 31 + token * (position + 1) + 17) % 1_000_003
    return state % VOCABULARY


def alone(sequence: Sequence) -> list[int]:
    """What the fake model generates for a sequence that has the server to itself."""
    slot = 0 if sequence.version is None else SLOTS[sequence.version]
    output: list[int] = []
    while len(output) < sequence.params.max_tokens:
        output.append(next_token(sequence.prompt_ids + output, slot))
        if output[-1] == EOS and not sequence.params.ignore_eos:
            break
    return output


class FakeRunner:
    """Runs batches over a cache of token numbers, addressed through the block lists as the real one is."""

    def __init__(self, pool: BlockPool) -> None:
        self.block_size = pool.block_size
        self.cache = [[-1] * pool.block_size for _ in range(pool.num_blocks)]

    def run(self, batch: Batch) -> dict[str, int]:
        for item in batch.sequences:
            if item.copied_block is not None:
                place, num = divmod(item.sequence.num_virtual_tokens, self.block_size)
                self.cache[item.sequence.blocks[place]][:num] = self.cache[item.copied_block][:num]
        for item in batch.sequences:
            for position, token in enumerate(item.token_ids, start=item.start):
                block, offset = divmod(position, self.block_size)
                self.cache[item.sequence.blocks[block]][offset] = token
        sampled: dict[str, int] = {}
        for item in batch.sequences:
            if item.samples:
                read = [token for block in item.sequence.blocks for token in self.cache[block]]
                sampled[item.sequence.sequence_id] = next_token(
                    read[: item.start + item.num_tokens], item.sequence.slot
                )
        return sampled


class FakeResidency:
    """Adapters that are present, absent or broken as the test says; `room` bounds those held at once.

    The first in the alphabet is worth least, and what is pinned may not leave.
    """

    def __init__(self, room: int = 3) -> None:
        self.room = room
        self.absent: set[Hashable] = set()
        self.broken: set[Hashable] = set()
        self.pinned: set[Hashable] = set()
        self.holds: Counter[Hashable] = Counter()
        self.num_asked: Counter[Hashable] = Counter()
        self.reaches: dict[int, Reach] = {}

    def admit(self, version: Hashable) -> int | None:
        self.num_asked[version] += 1
        if version in self.broken:
            raise AdapterRejected(f"adapter {version} is broken")
        if version in self.absent or (not self.holds[version] and len(+self.holds) >= self.room):
            return None
        self.holds[version] += 1
        return SLOTS[version]

    def retire(self, version: Hashable) -> None:
        assert self.holds[version] > 0
        self.holds[version] -= 1

    def reach(self, slot: int) -> Reach | None:
        return self.reaches.get(slot)

    def num_virtual_tokens(self, version: Hashable) -> int | None:
        reach = None if version in self.absent else self.reaches.get(SLOTS[version])
        return None if version in self.absent else 0 if reach is None else reach.num_virtual_tokens

    def lacks_room(self, version: Hashable) -> bool:
        return version not in self.absent

    def least_valuable(self, versions: Iterable[Hashable]) -> Hashable | None:
        return min((version for version in versions if version not in self.pinned), key=str, default=None)


class Server:
    """A scheduler with everything around it, and how each sequence ended."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_sequences: int = 8,
        max_batch_tokens: int = 16,
        max_queued: int = 100,
        max_context: int = 1000,
        room: int = 3,
        reuses_prefixes: bool = False,
        queue_timeout_s: float | None = None,
        request_timeout_s: float | None = None,
        max_adapter_wait_s: float = 2.0,
    ) -> None:
        self.now_s = 0.0
        self.pool = BlockPool(num_blocks, block_size)
        self.residency = FakeResidency(room)
        self.limits = SchedulerLimits(
            max_sequences,
            max_batch_tokens,
            max_queued,
            max_context,
            queue_timeout_s,
            request_timeout_s,
            max_adapter_wait_s,
        )
        self.scheduler = Scheduler(
            self.limits,
            self.pool,
            self.residency,
            frozenset({EOS}),
            reuses_prefixes=reuses_prefixes,
            clock=lambda: self.now_s,
        )
        self.runner = FakeRunner(self.pool)
        self.endings: list[tuple[str, FinishReason]] = []
        self.ids = (f"s{number}" for number in count())

    def sequence(
        self,
        num_prompt: int = 3,
        max_tokens: int = 5,
        version: str | None = None,
        *,
        ignore_eos: bool = True,
        prompt_logprobs: int | None = None,
    ) -> Sequence:
        params = SamplingParams(max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        sequence_id = next(self.ids)
        prompt_ids = [(len(sequence_id) * 5 + int(sequence_id[1:]) * 7 + i * i) % VOCABULARY for i in range(num_prompt)]
        return Sequence(sequence_id, prompt_ids, params, version, edit_identity=version or "")

    def add(self, sequence: Sequence) -> Sequence:
        self.scheduler.add(sequence)
        return sequence

    def schedule(self) -> Batch:
        batch = self.scheduler.schedule()
        self.end(*(failed.sequence for failed in batch.failed))
        self.scheduler.check_integrity()
        return batch

    def commit(self, batch: Batch) -> None:
        self.end(*self.scheduler.commit(batch, self.runner.run(batch)))
        self.scheduler.check_integrity()

    def step(self) -> Batch:
        batch = self.schedule()
        self.commit(batch)
        return batch

    def step_until_preemption(self) -> Batch:
        for _ in range(100):
            batch = self.step()
            if self.scheduler.num_preemptions:
                return batch
        raise AssertionError("no preemption in 100 steps")

    def run_to_the_end(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.num_waiting} waiting, {self.scheduler.num_running} running for ever")

    def end(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            assert sequence.finish_reason is not None
            self.endings.append((sequence.sequence_id, sequence.finish_reason))


def shares(batch: Batch) -> dict[str, int]:
    return {item.sequence.sequence_id: item.num_tokens for item in batch.sequences}


def assert_nothing_is_held(server: Server) -> None:
    server.scheduler.check_integrity()
    assert server.pool.num_used == 0
    assert not +server.residency.holds


# Sequences and values


def test_a_sequence_knows_its_tokens_across_prompt_and_output() -> None:
    sequence = Sequence("s", [1, 2, 3], SamplingParams(4), output_ids=[4, 5], num_computed_tokens=2)
    assert sequence.all_ids == [1, 2, 3, 4, 5]
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens, sequence.num_tokens) == (3, 2, 5)
    assert (sequence.num_pending, sequence.is_prefilling) == (3, True)
    assert (sequence.last_position, sequence.max_total_tokens) == (4, 7)


def test_any_range_of_tokens_can_be_read() -> None:
    sequence = Sequence("s", [1, 2, 3], SamplingParams(4), output_ids=[4, 5])
    for start in range(6):
        for stop in range(start, 6):
            assert sequence.token_ids(start, stop) == sequence.all_ids[start:stop]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadRequest, match="prompt is empty"):
        Sequence("s", [], SamplingParams(4))


def test_a_delta_crosses_processes_and_knows_whether_it_is_the_last() -> None:
    scored = (TokenLogprobs(1, None), TokenLogprobs(2, -0.5, ((3, -0.1), (2, -0.5))))
    delta = Delta("s", (2,), "b", scored[1:], scored, FinishReason.LENGTH, None, 2, 1)
    assert pickle.loads(pickle.dumps(delta)) == delta
    assert delta.is_terminal
    assert not Delta("s", (2,), "b").is_terminal


@pytest.mark.parametrize("name", ["max_sequences", "max_batch_tokens", "max_queued", "max_context"])
def test_a_limit_below_one_is_refused_by_name(name: str) -> None:
    limits = {"max_sequences": 1, "max_batch_tokens": 1, "max_queued": 1, "max_context": 1, name: 0}
    with pytest.raises(StartupRefused, match=f"{name} is 0"):
        SchedulerLimits(**limits)


def test_a_token_budget_smaller_than_the_decodes_of_one_step_is_refused() -> None:
    with pytest.raises(StartupRefused, match=r"max_batch_tokens is 7 and max_sequences is 8"):
        SchedulerLimits(max_sequences=8, max_batch_tokens=7, max_queued=1, max_context=1)


# What a step contains


def test_a_short_prompt_is_computed_and_sampled_in_one_step() -> None:
    server = Server()
    sequence = server.add(server.sequence(num_prompt=3, max_tokens=2))
    (item,) = server.step().sequences
    assert (item.start, item.num_tokens, item.samples, item.wants_prompt_logits) == (0, 3, True, False)
    (item,) = server.step().sequences
    assert (item.start, item.num_tokens, item.samples) == (3, 1, True)
    assert item.token_ids == sequence.output_ids[:1]
    assert server.endings == [("s0", FinishReason.LENGTH)]
    assert sequence.output_ids == alone(sequence)
    assert_nothing_is_held(server)


def test_a_long_prompt_is_cut_in_chunks_beside_decodes_within_the_budget() -> None:
    server = Server(max_batch_tokens=8)
    server.add(server.sequence(num_prompt=2, max_tokens=9))
    server.add(server.sequence(num_prompt=3, max_tokens=9))
    server.add(server.sequence(num_prompt=17, max_tokens=9))
    seen = [server.step() for _ in range(5)]
    assert [shares(batch) for batch in seen] == [
        {"s0": 2, "s1": 3, "s2": 3},
        {"s0": 1, "s1": 1, "s2": 6},
        {"s0": 1, "s1": 1, "s2": 6},
        {"s0": 1, "s1": 1, "s2": 2},
        {"s0": 1, "s1": 1, "s2": 1},
    ]
    assert [batch.sequences[2].samples for batch in seen] == [False, False, False, True, True]
    assert all(batch.num_tokens <= 8 for batch in seen)


def test_decodes_come_before_chunks_even_of_older_sequences() -> None:
    server = Server(max_batch_tokens=4, max_sequences=2)
    server.add(server.sequence(num_prompt=9, version="a"))
    server.residency.absent = {"a"}
    server.add(server.sequence(num_prompt=2))
    server.step()
    server.residency.absent = set()
    assert shares(server.step()) == {"s1": 1, "s0": 3}
    assert shares(server.step()) == {"s1": 1, "s0": 3}


def test_seats_are_bounded() -> None:
    server = Server(max_sequences=2)
    for _ in range(3):
        server.add(server.sequence())
    server.step()
    assert (server.scheduler.num_running, server.scheduler.num_waiting) == (2, 1)
    server.run_to_the_end()
    assert [sequence_id for sequence_id, _ in server.endings] == ["s0", "s1", "s2"]


def test_scoring_alone_finishes_after_the_prompt_without_sampling() -> None:
    server = Server(max_batch_tokens=8)
    sequence = server.add(server.sequence(num_prompt=11, max_tokens=0, prompt_logprobs=1))
    items = [item for _ in range(2) for item in server.step().sequences]
    assert [(item.start, item.num_tokens, item.samples, item.wants_prompt_logits) for item in items] == [
        (0, 8, False, True),
        (8, 3, False, True),
    ]
    assert server.endings == [("s0", FinishReason.LENGTH)]
    assert sequence.output_ids == []


def test_prompt_logits_are_wanted_only_until_the_prompt_is_scored() -> None:
    server = Server()
    sequence = server.add(server.sequence(num_prompt=3, max_tokens=3, prompt_logprobs=0))
    wanted = [server.step().sequences[0].wants_prompt_logits for _ in range(3)]
    assert wanted == [True, False, False]
    assert sequence.finish_reason is FinishReason.LENGTH


# How sequences end


def test_an_end_of_sequence_token_stops_and_stays_in_the_output() -> None:
    server = Server()
    stopped = server.add(server.sequence(max_tokens=200, ignore_eos=False))
    going_on = server.add(server.sequence(max_tokens=200, ignore_eos=True))
    server.run_to_the_end()
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.output_ids[-1] == EOS
    assert going_on.finish_reason is FinishReason.LENGTH
    assert EOS in going_on.output_ids[:-1]


def test_only_the_first_ending_counts() -> None:
    server = Server()
    sequence = server.add(server.sequence(version="a"))
    server.step()
    assert server.scheduler.finish(sequence, FinishReason.STOP)
    assert not server.scheduler.finish(sequence, FinishReason.ERROR)
    assert server.scheduler.abort(sequence.sequence_id) is None
    assert sequence.finish_reason is FinishReason.STOP
    assert_nothing_is_held(server)


def test_a_sequence_that_was_never_added_cannot_be_finished() -> None:
    server = Server()
    with pytest.raises(ValueError, match="never added"):
        server.scheduler.finish(server.sequence(), FinishReason.STOP)


@pytest.mark.parametrize("num_steps", [0, 1, 3], ids=["waiting", "in mid-prompt", "decoding"])
def test_an_abort_frees_everything_at_once(num_steps: int) -> None:
    server = Server(max_batch_tokens=8)
    sequence = server.add(server.sequence(num_prompt=12, version="a"))
    for _ in range(num_steps):
        server.step()
    assert server.scheduler.abort(sequence.sequence_id) is sequence
    assert (sequence.status, sequence.finish_reason) == (SequenceStatus.FINISHED, FinishReason.ABORT)
    assert_nothing_is_held(server)
    assert shares(server.step()) == {}


def test_an_abort_while_a_step_runs_drops_its_token() -> None:
    server = Server()
    left, stays = server.add(server.sequence()), server.add(server.sequence())
    batch = server.schedule()
    sampled = server.runner.run(batch)
    server.scheduler.abort(left.sequence_id)
    assert server.scheduler.commit(batch, sampled) == []
    assert left.output_ids == []
    assert stays.output_ids == alone(stays)[:1]


def test_a_step_cannot_be_committed_twice() -> None:
    server = Server()
    server.add(server.sequence())
    batch = server.step()
    with pytest.raises(ValueError, match="has moved on"):
        server.commit(batch)


# What is refused at the door


def test_the_queue_is_bounded() -> None:
    server = Server(max_queued=2)
    server.add(server.sequence())
    server.add(server.sequence())
    with pytest.raises(Overloaded, match="max_queued is 2"):
        server.add(server.sequence())
    assert server.scheduler.num_waiting == 2
    server.step()
    server.add(server.sequence())


@pytest.mark.parametrize(("num_blocks", "max_context"), [(4, 1000), (1000, 16)], ids=["blocks", "context"])
def test_what_cannot_run_even_alone_is_refused_with_both_numbers(num_blocks: int, max_context: int) -> None:
    server = Server(num_blocks=num_blocks, block_size=4, max_context=max_context)
    assert server.scheduler.max_total_tokens == 16
    server.scheduler.check_fits(10, 6)
    with pytest.raises(ContextTooLong, match="prompt has 10 tokens and max_tokens is 7, together 17; .* at most 16"):
        server.scheduler.check_fits(10, 7)
    with pytest.raises(ContextTooLong):
        server.add(server.sequence(num_prompt=10, max_tokens=7))
    sequence = server.add(server.sequence(num_prompt=10, max_tokens=6))
    server.run_to_the_end()
    assert sequence.output_ids == alone(sequence)


def test_a_second_sequence_of_the_same_id_is_refused() -> None:
    server = Server()
    sequence = server.add(server.sequence())
    with pytest.raises(ValueError, match="already in flight"):
        server.add(Sequence(sequence.sequence_id, [1], SamplingParams(1)))


# Residencies


def test_a_cold_adapter_blocks_neither_the_base_nor_other_adapters() -> None:
    server = Server()
    server.residency.absent = {"a"}
    cold = server.add(server.sequence(version="a"))
    server.add(server.sequence())
    server.add(server.sequence(version="b"))
    assert set(shares(server.step())) == {"s1", "s2"}
    server.residency.absent = set()
    assert set(shares(server.step())) == {"s0", "s1", "s2"}
    assert cold.slot == SLOTS["a"]


def test_the_base_never_asks_for_a_residency() -> None:
    server = Server()
    sequence = server.add(server.sequence())
    server.run_to_the_end()
    assert sequence.slot == 0
    assert not server.residency.num_asked


def test_queued_sequences_hold_no_residency() -> None:
    server = Server(max_sequences=1)
    server.add(server.sequence(version="a"))
    server.add(server.sequence(version="b"))
    server.step()
    assert +server.residency.holds == Counter({"a": 1})
    server.run_to_the_end()
    assert_nothing_is_held(server)


def test_a_slow_load_holds_up_nobody() -> None:
    server = Server(max_sequences=16, max_batch_tokens=64)
    server.residency.absent = {"b"}
    cold = server.add(server.sequence(version="b"))
    for _ in range(100):
        server.now_s += 1
        other = server.add(server.sequence(version="a", max_tokens=1))
        server.step()
        assert other.finish_reason is FinishReason.LENGTH
    server.residency.absent = set()
    server.step()
    assert cold.status is SequenceStatus.RUNNING
    assert server.scheduler.num_rotations == server.scheduler.num_preemptions == 0
    server.run_to_the_end()
    assert_nothing_is_held(server)


def test_an_absent_adapter_is_asked_for_once_per_step() -> None:
    server = Server()
    server.residency.absent = {"a"}
    for _ in range(5):
        server.add(server.sequence(version="a"))
    server.step()
    assert server.residency.num_asked["a"] == 1


def test_an_adapter_that_failed_to_load_fails_its_sequences_with_its_error() -> None:
    server = Server()
    server.residency.broken = {"a"}
    broken = server.add(server.sequence(version="a"))
    server.add(server.sequence())
    batch = server.step()
    (failed,) = batch.failed
    assert failed.sequence is broken
    assert isinstance(failed.error, AdapterRejected)
    assert broken.finish_reason is FinishReason.ERROR
    assert set(shares(batch)) == {"s1"}


# Blocks and preemption


def test_the_newest_is_preempted_and_comes_back_at_its_place() -> None:
    server = Server(num_blocks=6, block_size=4)
    old = server.add(server.sequence(num_prompt=7, max_tokens=9))
    new = server.add(server.sequence(num_prompt=7, max_tokens=9, version="a"))
    server.step_until_preemption()
    assert old.status is SequenceStatus.RUNNING
    assert (new.status, new.blocks, new.num_computed_tokens, new.slot) == (SequenceStatus.WAITING, [], 0, 0)
    assert not +server.residency.holds
    later = server.add(server.sequence(num_prompt=1, max_tokens=9))
    tokens_before = list(new.output_ids)
    assert tokens_before
    server.run_to_the_end()
    assert new.output_ids[: len(tokens_before)] == tokens_before
    for sequence in (old, new, later):
        assert sequence.output_ids == alone(sequence)
    assert server.endings == [(f"s{i}", FinishReason.LENGTH) for i in range(3)]
    assert_nothing_is_held(server)


def test_recomputed_output_is_computed_like_a_prompt() -> None:
    server = Server(num_blocks=6, block_size=4)
    old = server.add(server.sequence(num_prompt=7, max_tokens=9))
    new = server.add(server.sequence(num_prompt=7, max_tokens=9, prompt_logprobs=1))
    server.step_until_preemption()
    server.scheduler.finish(old, FinishReason.STOP)
    (item,) = server.schedule().sequences
    assert (item.sequence, item.start, item.num_tokens, item.samples) == (new, 0, new.num_tokens, True)
    assert item.token_ids == new.all_ids
    assert not item.wants_prompt_logits
    assert (new.num_prompt_tokens, new.num_output_tokens) == (7, new.num_tokens - 7)


def test_a_chunk_takes_what_blocks_are_left_before_it_takes_those_of_others() -> None:
    server = Server(num_blocks=8, block_size=4, max_batch_tokens=12, max_sequences=2)
    server.add(server.sequence(num_prompt=28, max_tokens=4))
    server.add(server.sequence(num_prompt=8, max_tokens=4))
    assert shares(server.step()) == {"s0": 12}
    assert shares(server.step()) == {"s0": 12}
    assert shares(server.step()) == {"s0": 4}
    server.run_to_the_end()
    assert server.scheduler.num_preemptions == 0


def test_an_older_chunk_takes_back_the_blocks_and_the_tokens_of_a_newer_decode() -> None:
    server = Server(num_blocks=5, block_size=4, max_batch_tokens=6, max_sequences=2)
    server.residency.absent = {"a"}
    old = server.add(server.sequence(num_prompt=18, max_tokens=2, version="a"))
    new = server.add(server.sequence(num_prompt=4, max_tokens=9))
    server.step()
    server.residency.absent = set()
    assert shares(server.step_until_preemption()) == {"s0": 6}
    server.run_to_the_end()
    assert server.endings == [("s0", FinishReason.LENGTH), ("s1", FinishReason.LENGTH)]
    assert (old.output_ids, new.output_ids) == (alone(old), alone(new))


def test_a_prompt_that_waits_for_blocks_is_not_overtaken() -> None:
    server = Server(num_blocks=6, block_size=4, max_batch_tokens=64)
    server.add(server.sequence(num_prompt=12, max_tokens=8))
    server.add(server.sequence(num_prompt=15, max_tokens=2, version="a"))
    server.add(server.sequence(num_prompt=1, max_tokens=1))
    for _ in range(4):
        assert set(shares(server.step())) == {"s0"}
        assert not +server.residency.holds
    server.run_to_the_end()
    assert [sequence_id for sequence_id, _ in server.endings] == ["s0", "s2", "s1"]
    assert_nothing_is_held(server)


def test_a_newcomer_needs_the_block_of_its_next_step_too() -> None:
    server = Server(num_blocks=5, block_size=4)
    server.add(server.sequence(num_prompt=6, max_tokens=2))
    server.add(server.sequence(num_prompt=8, max_tokens=4))
    assert set(shares(server.schedule())) == {"s0", "s1"}
    assert server.pool.num_free == 0
    tight = Server(num_blocks=4, block_size=4)
    tight.add(tight.sequence(num_prompt=6, max_tokens=2))
    tight.add(tight.sequence(num_prompt=8, max_tokens=4))
    assert set(shares(tight.schedule())) == {"s0"}


def test_nothing_is_admitted_into_the_blocks_just_taken_from_a_sequence() -> None:
    server = Server(num_blocks=6, block_size=4)
    server.add(server.sequence(num_prompt=7, max_tokens=9))
    server.add(server.sequence(num_prompt=7, max_tokens=9, version="a"))
    server.step()
    server.residency.absent = {"a"}  # so that it cannot come back at once and is skipped
    for _ in range(2):
        server.step()
    server.add(server.sequence(num_prompt=1, max_tokens=1))
    assert set(shares(server.step_until_preemption())) == {"s0"}
    assert set(shares(server.step())) == {"s0", "s2"}


@pytest.mark.parametrize("num_steps", [0, 2], ids=["at admission", "while running"])
def test_a_sequence_alone_that_finds_no_block_fails_clearly(num_steps: int) -> None:
    """Blocks can be held from outside, so the check at the door is not enough to exclude this."""
    server = Server(num_blocks=6, block_size=4)
    sequence = server.add(server.sequence(num_prompt=7, max_tokens=12, version="a"))
    for _ in range(num_steps):
        server.step()
    outside = server.pool.allocate(server.pool.num_free)
    errors = [failed.error for _ in range(10) for failed in server.step().failed]
    assert [type(error) for error in errors] == [GenerationFailed]
    assert "enlarge the KV cache" in errors[0].message
    assert server.endings == [(sequence.sequence_id, FinishReason.ERROR)]
    server.pool.free(outside)
    assert_nothing_is_held(server)


# Blocks that are found again


def reusing(**limits: Any) -> Server:
    return Server(**{"block_size": 4, "max_batch_tokens": 64, "reuses_prefixes": True, **limits})


def like(sequence: Sequence, sequence_id: str, **changes: Any) -> Sequence:
    """A second sequence with the same prompt."""
    fields = {"prompt_ids": list(sequence.prompt_ids), "params": sequence.params, "version": sequence.version}
    version = changes.get("version", sequence.version)
    return Sequence(sequence_id, **{**fields, "edit_identity": version or "", **changes})


def ran(server: Server, sequence: Sequence) -> ScheduledSequence:
    """Adds a sequence, runs all to the end, and gives its share of its first step."""
    server.add(sequence)
    (item,) = server.step().sequences
    server.run_to_the_end()
    assert sequence.output_ids == alone(sequence)
    return item


def test_a_prompt_is_computed_from_where_the_cache_ends() -> None:
    server = reusing()
    first = server.sequence(num_prompt=11, max_tokens=2, version="a")
    assert ran(server, first).start == 0
    item = ran(server, like(first, "again"))
    assert (item.start, item.num_tokens, item.sequence.num_cached_tokens) == (8, 3, 8)
    assert (server.scheduler.num_queried_tokens, server.scheduler.num_hit_tokens) == (22, 8)
    assert_nothing_is_held(server)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    server = reusing()
    first = server.sequence(num_prompt=12, max_tokens=2)
    ran(server, first)
    assert ran(server, like(first, "again")).start == 8


def test_generated_tokens_are_found_as_well() -> None:
    server = reusing()
    first = server.sequence(num_prompt=6, max_tokens=8)
    ran(server, first)
    item = ran(server, like(first, "next turn", prompt_ids=[*first.all_ids, 1, 2]))
    assert item.start == 12  # of 6 + 8 tokens the last one was never computed


@pytest.mark.parametrize(
    "change",
    [
        {"version": "b"},
        {"version": None},
        {"cache_salt": "tenant"},
        {"edit_identity": "a at half its weight"},
        {"prompt_ids": [1, *range(1, 11)]},
        {"params": SamplingParams(2, ignore_eos=True, prompt_logprobs=0)},
    ],
    ids=["another adapter", "the base", "another salt", "another weight", "another first token", "to be scored"],
)
def test_nothing_is_shared_wrongly(change: dict[str, Any]) -> None:
    server = reusing()
    first = server.sequence(num_prompt=11, max_tokens=2, version="a")
    ran(server, first)
    assert ran(server, like(first, "again", **change)).start == 0
    assert server.scheduler.num_hit_tokens == 0


def test_a_prompt_to_be_scored_is_not_asked_for_but_serves_others() -> None:
    server = reusing()
    scored = server.sequence(num_prompt=11, max_tokens=2, prompt_logprobs=0)
    ran(server, scored)
    assert server.scheduler.num_queried_tokens == 0
    assert ran(server, like(scored, "again", params=SamplingParams(2, ignore_eos=True))).start == 8


def test_blocks_are_known_only_when_their_step_is_committed() -> None:
    server = reusing()
    first = server.add(server.sequence(num_prompt=11, max_tokens=4))
    batch = server.schedule()
    second = server.add(like(first, "second"))
    assert [item.start for item in server.scheduler.schedule().sequences if item.sequence is second] == [0]
    third = server.add(like(first, "third"))
    sampled = server.runner.run(batch)
    server.scheduler.commit(batch, sampled)
    assert [item.start for item in server.scheduler.schedule().sequences if item.sequence is third] == [8]
    server.scheduler.check_integrity()


def test_running_sequences_share_blocks_and_each_frees_only_its_hold() -> None:
    server = reusing()
    first = server.add(server.sequence(num_prompt=11, max_tokens=20))
    server.step()
    second = server.add(like(first, "second"))
    server.step()
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2:] != second.blocks[2:]
    assert server.pool.num_used == len({*first.blocks, *second.blocks})
    server.scheduler.abort(first.sequence_id)
    server.run_to_the_end()
    assert second.output_ids == alone(second)
    assert_nothing_is_held(server)


def test_what_cannot_be_trusted_is_not_found() -> None:
    server = reusing()
    bad = server.add(server.sequence(num_prompt=11, max_tokens=20))
    server.step()
    assert server.scheduler.discard(bad)
    assert not server.scheduler.discard(bad)
    assert ran(server, like(bad, "again")).start == 0
    assert bad.finish_reason is FinishReason.ERROR


def test_a_preempted_sequence_finds_its_own_blocks_and_is_no_hit() -> None:
    server = reusing(num_blocks=6)
    old = server.add(server.sequence(num_prompt=7, max_tokens=9))
    new = server.add(server.sequence(num_prompt=7, max_tokens=9))
    server.step_until_preemption()
    server.scheduler.finish(old, FinishReason.STOP)
    (item,) = server.schedule().sequences
    assert (item.sequence, item.start, new.num_cached_tokens) == (new, 8, 0)
    server.commit(Batch((item,)))
    server.run_to_the_end()
    assert new.output_ids == alone(new)
    assert server.scheduler.num_hit_tokens == 0


def test_without_reuse_nothing_is_remembered() -> None:
    server = Server(block_size=4, max_batch_tokens=64)
    first = server.sequence(num_prompt=11, max_tokens=2)
    ran(server, first)
    assert ran(server, like(first, "again")).start == 0
    assert (server.pool.num_kept, server.scheduler.num_queried_tokens) == (0, 0)


def test_an_adapter_cannot_pass_for_the_base() -> None:
    for version, identity in (("a", ""), (None, "a")):
        with pytest.raises(ValueError, match="edit_identity"):
            Sequence("s", [1], SamplingParams(1), version, edit_identity=identity)


# Time limits, on a clock that the test moves


def test_a_request_that_waits_too_long_to_start_is_refused_with_the_limit() -> None:
    server = Server(max_sequences=1, queue_timeout_s=10)
    running = server.add(server.sequence(max_tokens=5))
    waiting = server.add(server.sequence())
    server.step()
    server.now_s = 10
    assert not server.step().failed
    server.now_s = 10.5
    (failed,) = server.step().failed
    assert failed.sequence is waiting
    assert isinstance(failed.error, Overloaded)
    assert "queue_timeout is 10 s" in failed.error.message
    assert failed.error.retry_after_s == 5
    server.run_to_the_end()
    assert server.endings == [("s1", FinishReason.ERROR), ("s0", FinishReason.LENGTH)]
    assert running.output_ids == alone(running)


def test_the_wait_for_a_cold_adapter_counts_as_the_queue() -> None:
    server = Server(queue_timeout_s=10)
    server.residency.absent = {"a"}
    server.add(server.sequence(version="a"))
    server.step()
    server.now_s = 11
    assert [type(failed.error) for failed in server.step().failed] == [Overloaded]
    assert_nothing_is_held(server)


def test_a_preempted_sequence_has_started_and_may_wait_again() -> None:
    server = Server(num_blocks=6, block_size=4, queue_timeout_s=10)
    old = server.add(server.sequence(num_prompt=7, max_tokens=9))
    new = server.add(server.sequence(num_prompt=7, max_tokens=9))
    server.step_until_preemption()
    server.now_s = 100
    server.run_to_the_end()
    assert {old.finish_reason, new.finish_reason} == {FinishReason.LENGTH}


@pytest.mark.parametrize("num_steps", [0, 1, 3], ids=["waiting", "in mid-prompt", "decoding"])
def test_a_request_that_takes_too_long_fails_with_the_limit_wherever_it_is(num_steps: int) -> None:
    server = Server(max_batch_tokens=8, request_timeout_s=60)
    sequence = server.add(server.sequence(num_prompt=12, max_tokens=50, version="a"))
    for _ in range(num_steps):
        server.step()
    server.now_s = 60.5
    later = server.add(server.sequence())
    (failed,) = server.step().failed
    assert failed.sequence is sequence
    assert isinstance(failed.error, RequestTimedOut)
    assert failed.error.status == 504
    assert "request_timeout is 60 s" in failed.error.message
    assert f"had generated {sequence.num_output_tokens} of at most 50" in failed.error.message
    server.run_to_the_end()
    assert server.endings == [("s0", FinishReason.ERROR), (later.sequence_id, FinishReason.LENGTH)]
    assert_nothing_is_held(server)


@pytest.mark.parametrize("name", ["queue_timeout_s", "request_timeout_s", "max_adapter_wait_s"])
def test_a_time_limit_of_nothing_is_refused_by_name(name: str) -> None:
    for value in (0, -1, float("nan")):
        with pytest.raises(StartupRefused, match=f"{name} is"):
            SchedulerLimits(1, 1, 1, 1, **{name: value})


# Any order of events

versions = st.sampled_from([None, "a", "b", "c"])
requests = st.tuples(
    st.integers(1, 12),  # tokens of the prompt
    st.integers(0, 14),  # max_tokens
    versions,
    st.booleans(),  # ignore_eos
    st.sampled_from([None, 1]),  # prompt_logprobs
)


class Storm(RuleBasedStateMachine):
    """Arrivals, aborts, stop strings, adapters that come, go and break, under every shortage at once."""

    @initialize(
        num_blocks=st.integers(6, 10),
        block_size=st.integers(2, 4),
        max_sequences=st.integers(1, 5),
        spare_tokens=st.integers(0, 12),
        room=st.integers(1, 3),
        max_adapter_wait_s=st.sampled_from([0.5, 2.0, 8.0]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        spare_tokens: int,
        room: int,
        max_adapter_wait_s: float,
    ) -> None:
        self.server = Server(
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            max_batch_tokens=max_sequences + spare_tokens,
            max_queued=8,
            max_context=36,
            room=room,
            max_adapter_wait_s=max_adapter_wait_s,
        )
        self.accepted: list[Sequence] = []
        self.expected: dict[str, list[int]] = {}

    @rule(asked=st.lists(requests, min_size=1, max_size=4))
    def add(self, asked: list[tuple[int, int, str | None, bool, int | None]]) -> None:
        for num_prompt, max_tokens, version, ignore_eos, prompt_logprobs in asked:
            sequence = self.server.sequence(
                num_prompt, max_tokens, version, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs
            )
            try:
                self.server.add(sequence)
            except ContextTooLong:
                assert num_prompt + max_tokens > self.server.scheduler.max_total_tokens
            except Overloaded:
                assert self.server.scheduler.num_waiting >= self.server.limits.max_queued
            else:
                self.accepted.append(sequence)
                self.expected[sequence.sequence_id] = alone(sequence)

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.checked_step()

    @rule(data=st.data(), during_a_step=st.booleans())
    def abort(self, data: st.DataObject, during_a_step: bool) -> None:
        if not self.accepted:
            return
        sequence = data.draw(st.sampled_from(self.accepted))
        batch = self.server.schedule() if during_a_step else Batch(())
        sampled = self.server.runner.run(batch)
        is_over = sequence.status is SequenceStatus.FINISHED
        assert self.server.scheduler.abort(sequence.sequence_id) is (None if is_over else sequence)
        if not is_over:
            self.server.end(sequence)
        self.server.end(*self.server.scheduler.commit(batch, sampled))

    @rule(data=st.data())
    def find_a_stop_string(self, data: st.DataObject) -> None:
        running = [sequence for sequence in self.accepted if sequence.status is SequenceStatus.RUNNING]
        if running:
            sequence = data.draw(st.sampled_from(running))
            assert self.server.scheduler.finish(sequence, FinishReason.STOP)
            self.server.end(sequence)

    @rule(absent=st.sets(versions.filter(bool)), broken=st.sets(versions.filter(bool), max_size=1))
    def adapters_come_go_and_break(self, absent: set[Hashable], broken: set[Hashable]) -> None:
        self.server.residency.absent = absent
        self.server.residency.broken = broken

    def checked_step(self) -> None:
        oldest = min(self.running(), key=lambda sequence: sequence.arrival, default=None)
        num_computed = 0 if oldest is None else oldest.num_computed_tokens
        num_rotations = self.server.scheduler.num_rotations
        self.server.now_s += 1
        batch = self.server.step()
        assert batch.num_tokens <= self.server.limits.max_batch_tokens
        assert all(item.num_tokens > 0 for item in batch.sequences)
        if oldest is not None and num_rotations == self.server.scheduler.num_rotations:
            assert oldest.num_computed_tokens > num_computed or oldest.finish_reason is not None

    def running(self) -> list[Sequence]:
        return [sequence for sequence in self.accepted if sequence.status is SequenceStatus.RUNNING]

    @invariant()
    def what_is_held_is_what_runs(self) -> None:
        self.server.scheduler.check_integrity()
        assert +self.server.residency.holds == Counter(s.version for s in self.running() if s.version is not None)
        assert self.server.pool.num_used == sum(len(sequence.blocks) for sequence in self.running())

    @invariant()
    def every_token_is_the_one_generated_alone(self) -> None:
        for sequence in self.accepted:
            assert sequence.output_ids == self.expected[sequence.sequence_id][: sequence.num_output_tokens]

    def teardown(self) -> None:
        self.server.residency.absent = self.server.residency.broken = set()
        for _ in range(10_000):
            if all(sequence.status is SequenceStatus.FINISHED for sequence in self.accepted):
                break
            self.checked_step()
        assert_nothing_is_held(self.server)
        assert sorted(self.server.endings) == sorted((s.sequence_id, s.finish_reason) for s in self.accepted)
        for sequence in self.accepted:
            if sequence.finish_reason is FinishReason.LENGTH:
                assert sequence.num_output_tokens == sequence.params.max_tokens


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
