"""Scheduler, blocks and rank rows together, through storms of everything that can happen to them, checked at each turn.

The forward pass is played by a cache whose cells hold what keys and values would: a state that depends on the token, on
what edits it, on the salt and on the cell before it. A model knows the state that each sequence needs at each position
and what each known block stands for, so a block that is reused wrongly, written to while known, or given away too early
fails at once. The device is played by the real row allocator.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from server.adapters.device.rows import RowAllocator
from server.adapters.positions import Reach
from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import (
    UNKNOWN_TOKEN,
    Batch,
    FinishReason,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)
from server.ground.errors import AdapterRejected, ContextTooLong, GraftError, Overloaded, RequestTimedOut

VOCABULARY = 12
EOS = 7
NAMES = ("a", "b", "c", "d")
WIDTHS = {"a": ((16, 3), (40, 2)), "b": ((16, 5),), "c": ((40, 4), (8, 6)), "d": ((24, 9),)}  # (width, rows) by name
BUFFER, SLAB = 360, 60  # elements: about two of the four adapters at once
UNWRITTEN = -1
GARBAGE = -2
# Few beginnings and few tails, so that sequences share blocks often.
STEMS = tuple(tuple((i * 5 + n * n * (i + 2)) % VOCABULARY for n in range(26)) for i in range(3))


@dataclass(frozen=True)
class Version:
    """A name's content at one time; `number` grows with each replacement."""

    name: str
    number: int

    @property
    def identity(self) -> str:
        return f"{self.name}/{self.number}"


def following(state: int, token: int, identity: str, salt: str | None) -> int:
    """The state at a position: of the one before it, and of all that keys and values there depend on."""
    return crc32(f"{state} {token} {identity} {salt}".encode())


def states(sequence: Sequence, ids: list[int]) -> list[int]:
    found: list[int] = []
    for token in ids:
        before = found[-1] if found else 0
        found.append(following(before, token, sequence.edit_identity, sequence.cache_salt))
    return found


def alone(sequence: Sequence) -> list[int]:
    """What the fake model generates for a sequence that has the server to itself."""
    known = states(sequence, sequence.prompt_ids)
    output: list[int] = []
    while len(output) < sequence.params.max_tokens:
        output.append(known[-1] % VOCABULARY)
        known.append(following(known[-1], output[-1], sequence.edit_identity, sequence.cache_salt))
        if output[-1] == EOS and not sequence.params.ignore_eos:
            break
    return output


class Shelf:
    """A device of rank rows that adapters share: residency as the registry gives it, eviction included."""

    def __init__(self) -> None:
        self.rows = RowAllocator(BUFFER, SLAB)
        self.resident: dict[Version, list[tuple[int, list[int]]]] = {}  # (width, rows); the longest unused first
        self.slots: dict[Version, int] = {}
        self.holds: Counter[Version] = Counter()
        self.loading: set[str] = set()
        self.broken: set[str] = set()
        self.num_evictions = 0

    def admit(self, version: Version) -> int | None:
        if version.name in self.broken:
            raise AdapterRejected(f"adapter {version.name} is broken")
        if version not in self.resident and (version.name in self.loading or not self._place(version)):
            return None
        self.resident[version] = self.resident.pop(version)
        self.holds[version] += 1
        return self.slots[version]

    def retire(self, version: Version) -> None:
        assert self.holds[version] > 0
        self.holds[version] -= 1

    def reach(self, slot: int) -> Reach | None:
        return None

    def num_virtual_tokens(self, version: Version) -> int:
        return 0

    def lacks_room(self, version: Version) -> bool:
        return version.name not in self.loading

    def least_valuable(self, versions: Iterable[Version]) -> Version | None:
        return min(versions, key=str, default=None)

    def evict_one(self) -> bool:
        victim = next((version for version in self.resident if not self.holds[version]), None)
        if victim is None:
            return False
        for width, rows in self.resident.pop(victim):
            self.rows.free(width, rows)
        del self.slots[victim]
        self.num_evictions += 1
        return True

    def _place(self, version: Version) -> bool:
        while not self.rows.can_allocate(WIDTHS[version.name]):
            if not self.evict_one():
                return False
        self.resident[version] = [(width, self.rows.allocate(width, count)) for width, count in WIDTHS[version.name]]
        self.slots[version] = next(n for n in range(1, 99) if n not in self.slots.values())
        return True

    def check(self) -> None:
        rows = self.rows
        assert rows.used_elements + rows.free_elements + rows.waste_elements == rows.num_elements
        assert rows.num_used_rows == sum(len(some) for held in self.resident.values() for _, some in held)
        assert set(+self.holds) <= self.resident.keys() == self.slots.keys()


class World:
    """A scheduler and what stands around it, the sequences that it accepted, and what must be true of them."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_sequences: int, spare_tokens: int, overlaps: bool
    ) -> None:
        self.overlaps = overlaps
        self.under_way: tuple[Batch, dict[str, int]] | None = None  # a step that has not been committed, what it chose
        self.now_s = 0.0
        self.shelf = Shelf()
        self.pool = BlockPool(num_blocks, block_size)
        limits = SchedulerLimits(
            max_sequences,
            max_batch_tokens=max_sequences + spare_tokens,
            max_queued=8,
            max_context=48,
            queue_timeout_s=40,
            request_timeout_s=60,
        )
        self.limits = limits
        self.scheduler = Scheduler(limits, self.pool, self.shelf, frozenset({EOS}), clock=lambda: self.now_s)
        self.cells = [[UNWRITTEN] * block_size for _ in range(num_blocks)]
        self.versions = {name: Version(name, 0) for name in NAMES}
        self.accepted: list[Sequence] = []  # and not yet seen to end
        self.needed: dict[str, list[int]] = {}  # the state at each position, by sequence id
        self.outputs: dict[str, list[int]] = {}
        self.scored: dict[str, set[int]] = {}  # positions of a prompt whose logits were computed, by sequence id
        self.meanings: dict[bytes, tuple[int, ...]] = {}  # the states that a key stands for
        self.endings: Counter[FinishReason] = Counter()
        self.num_added = self.num_steps = self.num_computed = 0
        self.num_timed_out = self.num_waited_too_long = 0

    # What may happen

    def add(
        self, stem: int, num_stem: int, tail: int, max_tokens: int, name: str | None, salt: str | None, scored: bool
    ) -> None:
        version = None if name is None else self.versions[name]
        prompt = [*STEMS[stem][:num_stem], *([tail] * (tail % 3))]
        scores = 1 if scored else None
        params = SamplingParams(max_tokens, ignore_eos=tail % 2 == 0, priority=tail % 3 - 1, prompt_logprobs=scores)
        identity = "" if version is None else version.identity
        sequence = Sequence(f"s{self.num_added}", prompt, params, version, edit_identity=identity, cache_salt=salt)
        try:
            self.scheduler.add(sequence)
        except ContextTooLong:
            assert len(prompt) + max_tokens > self.scheduler.max_total_tokens
        except Overloaded:
            assert self.scheduler.num_waiting >= self.limits.max_queued
        else:
            self.num_added += 1
            self.accepted.append(sequence)
            output = alone(sequence)
            self.outputs[sequence.sequence_id] = output
            self.needed[sequence.sequence_id] = states(sequence, prompt + output)

    def step(self, fate: str = "fine", pick: int = 0) -> None:
        """A step: fine, failed on the device, without memory, or fine but for one sequence that overflows or leaves."""
        batch = self.scheduler.schedule()
        for failed in batch.failed:
            self._note_failure(failed.error)
            self._end(failed.sequence)
        self.num_steps += 1
        self.num_computed += batch.num_tokens
        is_broken = fate in ("failed", "exhausted")
        if is_broken:
            self._write_garbage(batch)
        sampled = {} if is_broken else {item.sequence.sequence_id: self._compute(item) for item in batch.sequences}
        self._commit_what_is_under_way()
        if is_broken:
            self._give_up(batch, fate)
            return
        going = self._going(batch)
        if going and fate in ("overflown", "aborted"):
            sequence = going[pick % len(going)]
            if fate == "overflown":
                self._discard(sequence)
            else:
                assert self.scheduler.abort(sequence.sequence_id) is sequence
                self._end(sequence)
        self.scheduler.advance(batch)
        self.under_way = batch, sampled
        if not self.overlaps:
            self._commit_what_is_under_way()

    def _give_up(self, batch: Batch, fate: str) -> None:
        hopeless = self._going(batch)
        if fate == "exhausted":
            found = self.scheduler.shed(batch) if batch.sequences else None
            hopeless = [sequence for sequence in hopeless if sequence is found]
        for sequence in hopeless:
            self._discard(sequence)

    def _going(self, batch: Batch) -> list[Sequence]:
        """Those of its sequences that the end of the step before has not ended."""
        return [item.sequence for item in batch.sequences if item.sequence.status is not SequenceStatus.FINISHED]

    def _commit_what_is_under_way(self) -> None:
        if self.under_way is not None:
            batch, sampled = self.under_way
            self.under_way = None
            for sequence in self.scheduler.commit(batch, sampled):
                self._end(sequence)

    def abort(self, pick: int) -> None:
        if self.accepted:
            sequence = self.accepted[pick % len(self.accepted)]
            assert self.scheduler.abort(sequence.sequence_id) is sequence
            assert self.scheduler.abort(sequence.sequence_id) is None
            self._end(sequence)

    def find_a_stop_string(self, pick: int) -> None:
        if self.running:
            sequence = self.running[pick % len(self.running)]
            assert self.scheduler.finish(sequence, FinishReason.STOP)
            self._end(sequence)

    def replace(self, name: str) -> None:
        """New requests get other content under the same name; those under way keep theirs."""
        self.versions[name] = Version(name, self.versions[name].number + 1)

    def load_slowly(self, names: set[str], broken: set[str]) -> None:
        self.shelf.loading, self.shelf.broken = names, broken

    def wait(self, duration_s: float) -> None:
        self.now_s += duration_s

    # What must be true

    @property
    def running(self) -> list[Sequence]:
        return [sequence for sequence in self.accepted if sequence.status is SequenceStatus.RUNNING]

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.shelf.check()
        assert +self.shelf.holds == Counter(s.version for s in self.running if s.version is not None)
        assert self.pool.num_used == len({block for sequence in self.running for block in sequence.blocks})
        for sequence in self.accepted:
            chosen = sequence.output_ids[: sequence.num_output_tokens]
            assert chosen == self.outputs[sequence.sequence_id][: sequence.num_output_tokens]
            self._check_keys(sequence)
        for sequence in self.running:
            assert self._read(sequence) == self._needed(sequence)
        for block, cells in enumerate(self.cells):
            key = self.pool.key_of(block)
            assert key is None or tuple(cells) == self.meanings[key]

    def finish_all(self) -> None:
        """With nothing in the way any more, everything ends."""
        self.load_slowly(set(), set())
        for _ in range(3000):
            if not self.accepted:
                break
            self.step()
            self.check()
        self.step()
        assert not self.accepted
        assert (self.pool.num_used, self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0, 0)
        assert self.endings.total() == self.num_added
        while self.shelf.evict_one():
            pass
        assert self.shelf.rows.used_elements == 0

    def _needed(self, sequence: Sequence) -> list[int]:
        return self.needed[sequence.sequence_id][: sequence.num_computed_tokens]

    def _read(self, sequence: Sequence) -> list[int]:
        """The states of the computed tokens, through the block list."""
        return [state for block in sequence.blocks for state in self.cells[block]][: sequence.num_computed_tokens]

    def _check_keys(self, sequence: Sequence) -> None:
        """A key stands for one content, whoever has it."""
        size, needed = self.pool.block_size, self.needed[sequence.sequence_id]
        for number, key in enumerate(sequence.block_keys):
            meaning = tuple(needed[number * size : (number + 1) * size])
            assert self.meanings.setdefault(key, meaning) == meaning

    def _compute(self, item: ScheduledSequence) -> int:
        """Fills the cells of the item's tokens, each from the cell before it; returns the token that follows."""
        sequence, size = item.sequence, self.pool.block_size
        assert item.start == sequence.num_computed_tokens
        assert item.num_tokens > 0
        if item.wants_prompt_logits:
            self.scored.setdefault(sequence.sequence_id, set()).update(range(item.start, item.start + item.num_tokens))
        state = self._read(sequence)[-1] if item.start else 0
        for position, token in enumerate(item.token_ids, start=item.start):
            self._require_private(sequence, position // size)
            if token == UNKNOWN_TOKEN:  # the device has it
                assert self.under_way is not None
                token = self.under_way[1][sequence.sequence_id]
            state = following(state, token, sequence.edit_identity, sequence.cache_salt)
            self.cells[sequence.blocks[position // size]][position % size] = state
        return state % VOCABULARY

    def _write_garbage(self, batch: Batch) -> None:
        for item in batch.sequences:
            for position in range(item.start, item.start + item.num_tokens):
                block, offset = divmod(position, self.pool.block_size)
                self._require_private(item.sequence, block)
                self.cells[item.sequence.blocks[block]][offset] = GARBAGE

    def _require_private(self, writer: Sequence, number: int) -> None:
        """What is written to is nobody else's, and is not known."""
        block = writer.blocks[number]
        assert self.pool.key_of(block) is None
        assert [sequence for sequence in self.running if block in sequence.blocks] == [writer]

    def _discard(self, sequence: Sequence) -> None:
        blocks = list(sequence.blocks)
        assert self.scheduler.discard(sequence)
        assert all(self.pool.key_of(block) is None for block in blocks)
        self._end(sequence)

    def _note_failure(self, error: GraftError) -> None:
        self.num_timed_out += isinstance(error, RequestTimedOut)
        self.num_waited_too_long += isinstance(error, Overloaded)

    def _end(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self.endings[sequence.finish_reason] += 1
        self.accepted.remove(sequence)
        self._check_keys(sequence)
        if sequence.finish_reason is FinishReason.LENGTH:
            assert sequence.output_ids == self.outputs[sequence.sequence_id]
            if sequence.params.prompt_logprobs is not None:
                assert self.scored[sequence.sequence_id] == set(range(sequence.num_prompt_tokens))


# Drawn by hypothesis, which finds the shortest way to a failure

names = st.sampled_from(NAMES)
FATES = ("fine", "fine", "fine", "failed", "overflown", "aborted", "exhausted")
WORLDS = {
    "num_blocks": st.integers(8, 16),
    "block_size": st.integers(2, 5),
    "max_sequences": st.integers(1, 5),
    "spare_tokens": st.integers(0, 12),
    "overlaps": st.booleans(),
}
REQUESTS = st.tuples(
    st.integers(0, len(STEMS) - 1),
    st.integers(1, 26),
    st.integers(0, VOCABULARY - 1),
    st.integers(0, 14),
    st.none() | names,
    st.sampled_from([None, None, "tenant"]),
    st.sampled_from([False, False, True]),
)


class Storm(RuleBasedStateMachine):
    num_steps = 0  # over all examples

    @initialize(**WORLDS)
    def start(self, num_blocks: int, block_size: int, max_sequences: int, spare_tokens: int, overlaps: bool) -> None:
        self.world = World(
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            spare_tokens=spare_tokens,
            overlaps=overlaps,
        )

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, requests: list[tuple[int, int, int, int, str | None, str | None, bool]]) -> None:
        for request in requests:
            self.world.add(*request)

    @rule(times=st.integers(1, 10))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.world.step()
            self.world.check()

    @rule(fate=st.sampled_from(FATES[3:]), pick=st.integers(0, 4))
    def step_badly(self, fate: str, pick: int) -> None:
        self.world.step(fate, pick)

    @rule(pick=st.integers(0, 12))
    def abort(self, pick: int) -> None:
        self.world.abort(pick)

    @rule(pick=st.integers(0, 4))
    def find_a_stop_string(self, pick: int) -> None:
        self.world.find_a_stop_string(pick)

    @rule(name=names)
    def replace(self, name: str) -> None:
        self.world.replace(name)

    @rule(loading=st.sets(names), broken=st.sets(names, max_size=1))
    def load_slowly(self, loading: set[str], broken: set[str]) -> None:
        self.world.load_slowly(loading, broken)

    @rule()
    def evict(self) -> None:
        self.world.shelf.evict_one()

    @rule(duration_s=st.sampled_from([1, 20, 45]))
    def wait(self, duration_s: float) -> None:
        self.world.wait(duration_s)

    @invariant()
    def all_is_well(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_all()
            type(self).num_steps += self.world.num_steps


def test_any_order_of_events_leaves_all_as_it_must_be() -> None:
    Storm.num_steps = 0
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Storm, settings=settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=checks)
    )
    # Each example begins with a world and nearly each adds to it: far more steps than examples are the rule.
    assert Storm.num_steps > 60


# Drawn by dice, thousands of steps of one world


def random_turn(world: World, dice: random.Random) -> None:
    """A few arrivals, then a step; now and then something else."""
    for _ in range(dice.choice((0, 0, 0, 1, 1, 2))):
        world.add(
            stem=dice.randrange(len(STEMS)),
            num_stem=dice.randint(1, 26),
            tail=dice.randrange(VOCABULARY),
            max_tokens=dice.randrange(15),
            name=dice.choice((None, *NAMES)),
            salt=dice.choice((None, None, "tenant")),
            scored=dice.random() < 0.2,
        )
    event = dice.randrange(100)
    if event < 4:
        world.abort(dice.randrange(12))
    elif event < 8:
        world.find_a_stop_string(dice.randrange(4))
    elif event < 14:
        world.replace(dice.choice(NAMES))
    elif event < 22:
        loading = {name for name in NAMES if dice.random() < 0.3}
        world.load_slowly(loading, {dice.choice(NAMES)} if dice.random() < 0.2 else set())
    elif event < 30:
        world.wait(dice.choice((1, 5, 30)))
    elif event < 34:
        world.shelf.evict_one()
    world.step(dice.choice(FATES) if dice.random() < 0.1 else "fine", dice.randrange(4))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_two_thousand_steps_of_a_storm(seed: int, overlaps: bool) -> None:
    dice = random.Random(seed)
    world = World(
        num_blocks=dice.randint(12, 18),
        block_size=dice.randint(2, 5),
        max_sequences=dice.randint(3, 6),
        spare_tokens=dice.randint(4, 14),
        overlaps=overlaps,
    )
    while world.num_steps < 2000:
        random_turn(world, dice)
        world.check()
    scheduler = world.scheduler
    assert (
        min(
            scheduler.num_preemptions,
            scheduler.num_rotations,
            world.shelf.num_evictions,
            scheduler.num_hit_tokens,
            scheduler.num_shed,
            world.num_timed_out,
            world.num_waited_too_long,
            world.num_added - 400,
            *(world.endings[reason] for reason in FinishReason),
        )
        > 0
    ), "a storm that leaves something out"
    world.finish_all()


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_sequence_whose_adapter_gave_way_does_not_start_again_in_that_step(
    monkeypatch: pytest.MonkeyPatch, overlaps: bool, num_steps: int
) -> None:
    """Two give way for one, and the smaller fits again: a step under way has filled blocks that it has no more."""
    module = sys.modules[__name__]
    widths = {"a": ((8, 8),), "b": ((8, 8),), "c": ((8, 40),), "d": ((8, 32),)}
    for name, value in (("WIDTHS", widths), ("BUFFER", 384), ("SLAB", 64)):
        monkeypatch.setattr(module, name, value)
    num_rotations = 0
    for num_prompt in (1, 3, 5, 7):
        world = World(num_blocks=40, block_size=3, max_sequences=5, spare_tokens=3, overlaps=overlaps)
        world.add(0, 3, 0, 14, "a", None, False)
        world.add(1, 3, 0, 14, "c", None, False)
        world.step()
        world.add(2, num_prompt, 0, 9, "d", None, False)
        world.step()
        world.add(0, 26, 0, 9, "a", "tenant", False)
        for _ in range(num_steps):
            world.step()
        world.wait(3)
        for _ in range(4):
            world.step()
            world.check()
        num_rotations += world.scheduler.num_rotations
        world.finish_all()
    assert num_rotations > 0
