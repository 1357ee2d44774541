"""Which sequences run next, under the budgets of tokens, blocks and residencies.

Owns the waiting and the running sequences, their blocks and their residencies. Knows nothing about tensors, text, how
an adapter gets to the device, or who reads the tokens.

A step is `schedule`, then the forward pass, then `commit`. The next may be scheduled while the pass still runs, after
`advance`: its sequences then count the token that it chooses as known, though nobody knows which it is, and one that
turns out to have ended has been computed once in vain. In one step:

1. running sequences with one token to compute get it;
2. running sequences with more get a chunk of what the token budget leaves, in order of arrival;
3. waiting sequences are admitted, while a seat, tokens and blocks last: first those that have run before, then by
   priority (lower comes earlier), then in order of arrival.

A running sequence that needs a block when none is free takes it from the one of the lowest standing - the largest
priority, and of these the newest arrival; perhaps itself -, which goes back to the queue and later computes all its
known tokens again. So the running sequence of the highest standing is never preempted for blocks. And whatever has once
run ends: it waits ahead of all newcomers, of any priority, and where it lacks blocks, none of them starts.

Priority orders requests and not adapters: who has lacked room for its adapter for too long (below) comes first, as if
all priorities were equal. It does not bound how long the low ones wait for a seat; `queue_timeout_s` does.

Full blocks are found again by their keys (see `blocks.block_key`), by whoever begins with the same tokens under the
same edits: a newcomer, or a preempted sequence that comes back. They become known when the step that filled them is
committed, and nobody writes to them after that. The newest known token is always computed: its logits are needed.
Virtual tokens of an adapter that fill a block in part are copied from whoever has them.

A waiting sequence whose adapter is still loading, or finds no room on the device, is passed over: it holds up nobody.
But none lacks room for ever. One that has for `max_adapter_wait_s` is overdue, and residencies rotate:

- it comes first, and until it has started no adapter that nothing runs on is admitted to the room that becomes free;
- adapters that run give way, the least valuable first: their sequences are preempted, and later compute again;
- an adapter has its turn before it must give way: `max_adapter_wait_s` from the first sequence that it was admitted
  for, and until that sequence has computed a new token. So every turn is of use, and two adapters cannot drive one
  another out step by step.

A step that runs out of memory sheds load (`shed`): it is taken back, the next ones are half as large, and after many
that went well twice as large again.

With room for `p` of them at once, the adapter that is k-th in line so starts within (1 + ceil(k / p)) times the limit,
if computing a prompt takes no longer than that.
"""

import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from server.adapters.positions import Reach
from server.engine.blocks import BlockPool, block_key, root_key
from server.engine.sequence import (
    UNKNOWN_TOKEN,
    Batch,
    FailedSequence,
    FinishReason,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)
from server.ground.errors import (
    ContextTooLong,
    GenerationFailed,
    GraftError,
    Overloaded,
    RequestTimedOut,
    StartupRefused,
)

_CALM_STEPS = 50  # that must go well before steps that had to shrink may grow again
_RETRY_AFTER_S = 5  # a queue in which requests time out is not empty in a second


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_sequences: int  # running at once
    max_batch_tokens: int  # computed in one step
    max_queued: int  # waiting; preempted sequences come back beyond it
    max_context: int  # tokens, prompt and output together
    queue_timeout_s: float | None = None  # from arrival to the first step; None: no limit
    request_timeout_s: float | None = None  # from arrival to the end
    max_adapter_wait_s: float = 2.0  # without room for its adapter, before others must make some

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_batch_tokens", "max_queued", "max_context"):
            value = getattr(self, name)
            if value < 1:
                raise StartupRefused(f"{name} is {value}; set it to at least 1.", param=name)
        for name in ("queue_timeout_s", "request_timeout_s", "max_adapter_wait_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise StartupRefused(f"{name} is {value}; set it to more than 0, or leave it out.", param=name)
        if self.max_batch_tokens < self.max_sequences:
            raise StartupRefused(
                f"max_batch_tokens is {self.max_batch_tokens} and max_sequences is {self.max_sequences}, but each "
                "running sequence computes a token per step: raise max_batch_tokens or lower max_sequences.",
                param="max_batch_tokens",
            )


class Residency(Protocol):
    """An adapter's place on the device, as the scheduler needs it. To the scheduler a version is any hashable value."""

    def admit(self, version: Any) -> int | None:
        """One more hold on the adapter and its slot number; None, without a hold, while it is loading or has no room.

        Never blocks. Raises GraftError, without a hold, when the adapter cannot be applied.
        """

    def retire(self, version: Any) -> None:
        """Ends one hold."""

    def reach(self, slot: int) -> Reach | None:
        """What the adapter in a slot that is held does to a sequence's positions; None: one part, everywhere."""

    def num_virtual_tokens(self, version: Any) -> int | None:
        """How many tokens the adapter puts before every prompt; None while that is not known. Asks for no loading."""

    def lacks_room(self, version: Any) -> bool:
        """Whether `admit` gave None because adapters that are held leave it no room, and not because it is loading."""

    def least_valuable(self, versions: Iterable[Any]) -> Any | None:
        """Of these, all held, the one to go first where room is needed; None if none of them may leave the device."""


@dataclass(slots=True)
class _Step:
    """A batch in the making."""

    num_tokens_left: int
    now_s: float
    items: dict[str, ScheduledSequence] = field(default_factory=dict)  # by sequence id, in order
    failed: list[FailedSequence] = field(default_factory=list)
    has_preempted: bool = False
    overdue: Sequence | None = None  # that still waits for its adapter's turn

    def put(self, sequence: Sequence, num_tokens: int, copied_block: int | None = None) -> None:
        start = sequence.num_computed_tokens
        is_complete = num_tokens == sequence.num_pending
        self.items[sequence.sequence_id] = ScheduledSequence(
            sequence=sequence,
            start=start,
            num_tokens=num_tokens,
            samples=is_complete and sequence.params.max_tokens > 0,
            wants_prompt_logits=_wants_prompt_logits(sequence),
            copied_block=copied_block,
        )
        self.num_tokens_left -= num_tokens

    def drop(self, sequence: Sequence) -> None:
        item = self.items.pop(sequence.sequence_id, None)
        if item is not None:
            self.num_tokens_left += item.num_tokens


@dataclass(frozen=True, slots=True)
class _Turn:
    """An adapter's time on the device, from its first hold to the end of its last."""

    first: Sequence  # for which it was admitted
    begun_s: float

    def is_over(self, now_s: float, length_s: float) -> bool:
        """Whether it has had its time, and its first sequence a new token out of it (or another end)."""
        is_computing = self.first.status is SequenceStatus.RUNNING and self.first.is_prefilling
        return now_s - self.begun_s >= length_s and not is_computing


@dataclass(slots=True)
class _Ceiling:
    """How large steps may be since one ran out of memory."""

    max_sequences: int
    max_tokens: int
    num_calm: int = 0  # steps that went well under it

    @classmethod
    def below(cls, batch: Batch) -> "_Ceiling":
        return cls(max(len(batch.sequences) // 2, 1), max(batch.num_tokens // 2, 1))


class Scheduler:
    """Every sequence added ends in exactly one of: `commit` returns it, `Batch.failed` has it, `finish`, `abort`.

    Not thread-safe: it belongs to the engine's loop.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        residency: Residency,
        eos_ids: frozenset[int] = frozenset(),
        *,
        reuses_prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives seconds from any origin, for the time limits; `reuses_prefixes` False computes all anew."""
        self._limits = limits
        self._blocks = blocks
        self._residency = residency
        self._eos_ids = eos_ids
        self._reuses_prefixes = reuses_prefixes
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by `_turn_in_line`
        self._running: list[Sequence] = []  # by arrival
        self._num_holds: Counter[Hashable] = Counter()
        self._num_arrived = 0
        self._num_preemptions = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._turns: dict[Hashable, _Turn] = {}  # of the versions that are held
        self._num_rotations = 0
        self._advanced: Batch | None = None  # the step under way, if more has been booked than its end will tell
        self._ceiling: _Ceiling | None = None
        self._num_shed = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_short(self) -> int:
        """Of those waiting, those whose adapter finds no room on the device. Any thread: it may err by a sequence."""
        return sum(sequence.short_since_s is not None for sequence in tuple(self._waiting))

    @property
    def num_preemptions(self) -> int:
        """Preemptions since the start."""
        return self._num_preemptions

    @property
    def num_rotations(self) -> int:
        """Turns of adapters that ended for another's, since the start."""
        return self._num_rotations

    @property
    def num_shed(self) -> int:
        """Steps that were taken back for lack of memory, since the start."""
        return self._num_shed

    @property
    def num_queried_tokens(self) -> int:
        """Tokens of sequences that were looked up in the cache when they first ran, since the start."""
        return self._num_queried_tokens

    @property
    def num_hit_tokens(self) -> int:
        """Those of them that were found there, and not computed."""
        return self._num_hit_tokens

    @property
    def max_total_tokens(self) -> int:
        """The most tokens, prompt and output together, that one sequence may come to."""
        return min(self._limits.max_context, self._blocks.num_blocks * self._blocks.block_size)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises ContextTooLong when such a sequence could not run to its end even alone."""
        num_tokens = num_prompt_tokens + max_tokens
        if num_tokens > self.max_total_tokens:
            raise ContextTooLong(
                f"The prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together {num_tokens}; "
                f"a request may come to at most {self.max_total_tokens}. Shorten the prompt or lower max_tokens.",
                param="max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence into the queue. Raises Overloaded, ContextTooLong; then it is not accepted."""
        if sequence.sequence_id in self._sequences:
            raise ValueError(f"a sequence {sequence.sequence_id!r} is already in flight")
        self.check_fits(sequence.num_prompt_tokens, sequence.params.max_tokens)
        self._check_room_for_prompt(sequence)
        if len(self._waiting) >= self._limits.max_queued:
            raise Overloaded(
                f"The queue is full: max_queued is {self._limits.max_queued}. Retry in a moment.", reason="queue_full"
            )
        sequence.arrival = self._num_arrived
        sequence.arrived_s = self._clock()
        self._num_arrived += 1
        self._sequences[sequence.sequence_id] = sequence
        insort(self._waiting, sequence, key=_turn_in_line)

    def abort(self, sequence_id: str) -> Sequence | None:
        """Ends a sequence that its reader has left; None when it is not in flight (any more).

        Like `finish`, it may come at any time but between `schedule` and the launch of that batch's forward pass.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> bool:
        """Ends a sequence and frees what it holds; False, and no change, when it has ended before."""
        if sequence.status is SequenceStatus.FINISHED:
            return False
        if self._sequences.get(sequence.sequence_id) is not sequence:
            raise ValueError(f"sequence {sequence.sequence_id!r} was never added")
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        else:
            _remove(self._waiting, sequence, _turn_in_line)
        del self._sequences[sequence.sequence_id]
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        return True

    def discard(self, sequence: Sequence) -> bool:
        """As `finish`, for a sequence whose keys and values cannot be trusted: nobody finds its blocks again."""
        self._blocks.forget(sequence.blocks)
        return self.finish(sequence, FinishReason.ERROR)

    def schedule(self) -> Batch:
        """The next step's work, with its blocks allocated and its residencies held."""
        step = _Step(self._max_batch_tokens, self._clock())
        self._fail_timed_out(step)
        self._continue_running(step)
        # Else the blocks just taken from a sequence would go to one that has to give them back soon. And one that began
        # again in the step that preempted it would have other blocks than the step under way has filled.
        if not step.has_preempted and self._admit_overdue(step) and not step.has_preempted:
            self._admit_waiting(step)
        return Batch(tuple(step.items.values()), tuple(step.failed))

    def advance(self, batch: Batch) -> None:
        """Counts what a step computes as computed, and the tokens that it chooses as known, before it has ended.

        So the next one can be scheduled while it runs. `commit` of this very step comes next, before another advance.
        """
        assert self._advanced is None, "the step before has not been committed"
        for item in batch.sequences:
            sequence = item.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.status is SequenceStatus.WAITING or sequence.num_computed_tokens != item.start:
                raise ValueError(f"sequence {sequence.sequence_id!r} has moved on since this batch was scheduled")
            sequence.num_computed_tokens += item.num_tokens
            if item.samples:
                sequence.output_ids.append(UNKNOWN_TOKEN)
        self._advanced = batch

    def commit(self, batch: Batch, sampled: Mapping[str, int]) -> list[Sequence]:
        """Books a step that has run: `sampled` has a token for the id of each sequence of the batch that samples.

        Returns the sequences that this ended, by an end-of-sequence token (which stays in the output) or by length.
        Sequences that ended while the step ran are passed over. Raises ValueError for a step that is not the latest.
        """
        if self._advanced is not batch:
            self.advance(batch)
        self._advanced = None
        self._note_calm()
        ended: list[Sequence] = []
        for item in batch.sequences:
            sequence = item.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.status is SequenceStatus.RUNNING:  # else preempted since, and its blocks are others'
                self._remember_filled(item)
                self._remember_start(item)
            if item.samples:
                sequence.output_ids[-1] = sampled[sequence.sequence_id]
            reason = self._end_of(item)
            if reason is not None:
                self.finish(sequence, reason)
                ended.append(sequence)
        return ended

    def drop(self, batch: Batch) -> None:
        """Forgets a step that has failed. Its sequences have been ended before."""
        if self._advanced is batch:
            self._advanced = None

    def shed(self, batch: Batch, *, is_alone: bool = True) -> Sequence | None:
        """Takes back a step that ran out of memory before it changed anything; the next are at most half as large.

        The sequences of the lowest standing go back to the queue. Returns the one that needs more than there is even
        alone, token by token, if that was the step: it is the caller's to end. `is_alone` False: another step held
        memory as well, so the least step is tried once more.
        """
        self._num_shed += 1
        if len(batch.sequences) == batch.num_tokens == 1:
            return batch.sequences[0].sequence if is_alone else None
        self._ceiling = _Ceiling.below(batch)
        for item in batch.sequences:  # what was to be copied for it will not be asked for again
            if item.copied_block is not None and item.sequence.status is SequenceStatus.RUNNING:
                self._set_back(item.sequence)
        while len(self._running) > self._ceiling.max_sequences:
            self._set_back(max(self._running, key=_standing))
        return None

    def _note_calm(self) -> None:
        """Raises the ceiling after many steps without trouble, until it is none any more."""
        ceiling = self._ceiling
        if ceiling is None:
            return
        ceiling.num_calm += 1
        if ceiling.num_calm < _CALM_STEPS:
            return
        higher = _Ceiling(2 * ceiling.max_sequences, 2 * ceiling.max_tokens)
        is_gone = (
            higher.max_sequences >= self._limits.max_sequences and higher.max_tokens >= self._limits.max_batch_tokens
        )
        self._ceiling = None if is_gone else higher

    @property
    def _max_batch_tokens(self) -> int:
        limit = self._limits.max_batch_tokens
        return limit if self._ceiling is None else min(limit, self._ceiling.max_tokens)

    @property
    def _max_sequences(self) -> int:
        limit = self._limits.max_sequences
        return limit if self._ceiling is None else min(limit, self._ceiling.max_sequences)

    def check_integrity(self) -> None:
        """Asserts what holds between any two calls; for tests and for storms."""
        assert self._blocks.num_free + self._blocks.num_used == self._blocks.num_blocks
        self._blocks.check_integrity()
        assert len({block for sequence in self._running for block in sequence.blocks}) <= self._blocks.num_used
        assert self._num_holds == Counter(s.version for s in self._running if s.version is not None)
        assert self._num_holds.keys() == self._turns.keys()
        assert len(self._running) <= self._limits.max_sequences
        assert len(self._running) + len(self._waiting) == len(self._sequences)
        assert all(one.arrival < other.arrival for one, other in pairwise(self._running))
        assert all(_turn_in_line(one) < _turn_in_line(other) for one, other in pairwise(self._waiting))
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_pending > 0 or self._advanced is not None
            assert not sequence.awaits_token or self._advanced is not None
            assert len(sequence.blocks) >= self._blocks.num_blocks_for(sequence.num_computed_tokens)
            for number, block in enumerate(sequence.blocks):
                assert self._blocks.key_of(block) in (None, *sequence.block_keys[number : number + 1])
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.blocks
            assert sequence.num_computed_tokens == sequence.slot == 0

    def _end_of(self, item: ScheduledSequence) -> FinishReason | None:
        """`max_tokens` bounds the length; with an adapter's virtual tokens the context may end earlier."""
        sequence = item.sequence
        params, last = sequence.params, sequence.output_ids[-1] if sequence.output_ids else None
        is_eos = last in self._eos_ids and not params.ignore_eos
        is_whole = sequence.constraint is not None and sequence.constraint.is_complete
        if is_eos or is_whole or last in params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_whole(sequence, item.end) else None

    def _is_whole(self, sequence: Sequence, num_computed_tokens: int) -> bool:
        """Whether it has all tokens that it may have, once so many of them are computed."""
        is_longest = sequence.num_tokens == self._longest(sequence)
        return is_longest and num_computed_tokens >= sequence.num_first_tokens

    def _longest(self, sequence: Sequence) -> int:
        """Tokens known at its longest possible end."""
        return min(sequence.max_total_tokens, self.max_total_tokens)

    def _fail_timed_out(self, step: _Step) -> None:
        in_queue, in_all = self._limits.queue_timeout_s, self._limits.request_timeout_s
        if in_queue is None and in_all is None:
            return
        for sequence in (*self._running, *self._waiting):
            age_s = step.now_s - sequence.arrived_s
            if in_all is not None and age_s > in_all:
                self._fail(sequence, _timed_out(sequence, in_all), step)
            elif in_queue is not None and age_s > in_queue and not sequence.has_started:
                self._fail(sequence, _waited_too_long(in_queue), step)

    def _continue_running(self, step: _Step) -> None:
        decodes = [sequence for sequence in self._running if not sequence.is_prefilling]
        prefills = [sequence for sequence in self._running if sequence.is_prefilling]
        for sequence in decodes + prefills:
            if not step.num_tokens_left:
                return
            # One that is whole ends when the step under way is committed.
            if sequence.status is SequenceStatus.RUNNING and not self._is_whole(sequence, sequence.num_computed_tokens):
                self._continue_one(sequence, step)

    def _continue_one(self, sequence: Sequence, step: _Step) -> None:
        """Schedules as much of what is pending as tokens and blocks allow, at least one token, or preempts it."""
        num_room = self._make_room(sequence, step)
        if not num_room:
            return
        num_tokens = min(sequence.num_pending, step.num_tokens_left, num_room)
        num_blocks = self._blocks.num_blocks_for(sequence.num_computed_tokens + num_tokens)
        if num_blocks > len(sequence.blocks):
            sequence.blocks += self._blocks.allocate(num_blocks - len(sequence.blocks))
        step.put(sequence, num_tokens)

    def _num_room(self, sequence: Sequence) -> int:
        """Tokens that fit into the sequence's blocks and the free ones."""
        num_blocks = len(sequence.blocks) + self._blocks.num_free
        return num_blocks * self._blocks.block_size - sequence.num_computed_tokens

    def _make_room(self, sequence: Sequence, step: _Step) -> int:
        """Tokens that fit, at least one, at the cost of lower standings; 0 when the sequence itself had to go."""
        while True:
            num_room = self._num_room(sequence)
            if num_room:
                return num_room
            if len(self._running) == 1:
                self._fail(sequence, self._out_of_blocks(sequence), step)
                return 0
            lowest = max(self._running, key=_standing)
            self._preempt(lowest, step)
            if lowest is sequence:
                return 0

    def _admit_overdue(self, step: _Step) -> bool:
        """Starts the sequences that have lacked room for too long, at the cost of others. Whether more may start."""
        absent: set[Hashable] = set()  # being loaded or copied: nobody gives way for that
        for sequence in self._overdue(step.now_s):
            if sequence.short_since_s is None or sequence.version in absent or sequence.awaits_token:
                continue
            try:
                slot = self._hold_at_others_cost(sequence, step)
            except GraftError as error:
                self._fail(sequence, error, step)
                continue
            if slot is not None:
                if not self._start(sequence, slot, step):
                    return False
            elif self._residency.lacks_room(sequence.version):
                step.overdue = sequence
                return True
            else:
                absent.add(sequence.version)
        return True

    def _overdue(self, now_s: float) -> list[Sequence]:
        """The waiting sequences that have lacked room for `max_adapter_wait_s`, the one that has for longest first."""
        last_s = now_s - self._limits.max_adapter_wait_s
        found = [(s.short_since_s, s.arrival, s) for s in self._waiting if s.short_since_s is not None]
        return [sequence for since_s, _, sequence in sorted(found) if since_s <= last_s]

    def _hold_at_others_cost(self, sequence: Sequence, step: _Step) -> int | None:
        slot = self._hold(sequence, step)
        while slot is None and self._residency.lacks_room(sequence.version) and self._end_a_turn(step):
            slot = self._hold(sequence, step)
        return slot

    def _end_a_turn(self, step: _Step) -> bool:
        """Preempts all sequences of the least valuable adapter that has had its turn; False if there is none."""
        length_s = self._limits.max_adapter_wait_s
        had = [version for version, turn in self._turns.items() if turn.is_over(step.now_s, length_s)]
        version = self._residency.least_valuable(had)
        if version is None:
            return False
        for sequence in [sequence for sequence in self._running if sequence.version == version]:
            self._preempt(sequence, step)
        self._num_rotations += 1
        return True

    def _admit_waiting(self, step: _Step) -> None:
        absent: set[Hashable] = set()  # asked for in this step already
        short: set[Hashable] = set()  # for lack of room, or lest they take it
        for sequence in tuple(self._waiting):
            if not self._has_place(step):
                break
            if self._is_held_back(sequence, step):
                short.add(sequence.version)
                continue
            if sequence.version in absent or sequence.awaits_token:
                continue
            try:
                slot = self._hold(sequence, step)
            except GraftError as error:
                self._fail(sequence, error, step)
                continue
            if slot is None:
                absent.add(sequence.version)
            elif not self._start(sequence, slot, step):
                break
        self._note_short(short | set(filter(self._residency.lacks_room, absent)), step)

    def _has_place(self, step: _Step) -> bool:
        return step.num_tokens_left > 0 and len(self._running) < self._max_sequences

    def _is_held_back(self, sequence: Sequence, step: _Step) -> bool:
        """Whether it could take the room that becomes free for one that is overdue."""
        is_held = sequence.version is None or sequence.version in self._turns
        return step.overdue is not None and not is_held

    def _note_short(self, short: set[Hashable], step: _Step) -> None:
        """Begins the wait for room of every sequence of these adapters."""
        for sequence in self._waiting if short else ():
            if sequence.version in short and sequence.short_since_s is None:
                sequence.short_since_s = step.now_s

    def _end_wait_for_room(self, started: Sequence) -> None:
        """Its adapter has its turn: those that wait for the same one wait for a seat from now on."""
        for sequence in (started, *self._waiting) if started.short_since_s is not None else ():
            if sequence.version == started.version:
                sequence.short_since_s = None

    def _start(self, sequence: Sequence, slot: int, step: _Step) -> bool:
        """Runs a waiting sequence whose residency is held; False when it has to wait for a seat, tokens or blocks.

        Then those behind it must not take blocks either, or a long prompt would never find enough of them.
        """
        if not self._has_place(step):
            self._unhold(sequence.version)
            return False
        sequence.take(slot, self._residency.reach(slot) if slot else None)
        found = self._find(sequence)
        copied_block = self._find_start(sequence, len(found))
        num_found = len(found) * self._blocks.block_size if copied_block is None else sequence.num_virtual_tokens
        num_tokens = min(sequence.num_tokens - num_found, step.num_tokens_left)
        # The block of the step after this one is taken now, so that a newcomer is not preempted at once.
        num_ahead = min(num_found + num_tokens + 1, self._longest(sequence))
        num_blocks = self._blocks.num_blocks_for(num_ahead) - len(found)
        self._blocks.share(found)  # at once, lest they be given away as free ones
        if not self._blocks.can_allocate(num_blocks):
            self._blocks.free(found)
            self._unhold(sequence.version)
            sequence.slot = 0
            if self._running:
                return False
            self._fail(sequence, self._out_of_blocks(sequence), step)
            return True
        _remove(self._waiting, sequence, _turn_in_line)
        insort(self._running, sequence, key=_arrival)
        sequence.status = SequenceStatus.RUNNING
        sequence.blocks = found + self._blocks.allocate(num_blocks)
        sequence.num_computed_tokens = num_found
        self._end_wait_for_room(sequence)
        self._note_start(sequence, num_found, step.now_s)
        step.put(sequence, num_tokens, copied_block)
        return True

    def _note_start(self, sequence: Sequence, num_found: int, now_s: float) -> None:
        """What is told of the cache is told of first starts: a preempted sequence that finds itself is no hit."""
        if not sequence.has_started and self._may_reuse(sequence):
            sequence.num_cached_tokens = max(num_found - sequence.num_virtual_tokens, 0)
            self._num_queried_tokens += sequence.num_tokens
            self._num_hit_tokens += num_found
        if not sequence.has_started:
            sequence.queue_s = now_s - sequence.arrived_s
        sequence.has_started = True

    def _may_reuse(self, sequence: Sequence) -> bool:
        """Whether it may skip the computation of known blocks: not while the logits of all its rows are needed."""
        return self._reuses_prefixes and not _wants_prompt_logits(sequence)

    def _find(self, sequence: Sequence) -> list[int]:
        """The known blocks that a waiting sequence begins with, short of its newest token."""
        if not self._may_reuse(sequence):
            return []
        return self._blocks.find(self._keys(sequence, (sequence.num_tokens - 1) // self._blocks.block_size))

    def _find_start(self, sequence: Sequence, num_blocks: int) -> int | None:
        """A block that begins with the virtual tokens beyond the full blocks that were found, where these are all."""
        num_full, num_more = divmod(sequence.num_virtual_tokens, self._blocks.block_size)
        if not num_more or num_blocks != num_full or not self._may_reuse(sequence):
            return None
        return self._blocks.find_start(self._start_key(sequence))

    def _start_key(self, sequence: Sequence) -> bytes:
        """The key of the virtual tokens that fill a block in part."""
        num_full, num_virtual = sequence.num_virtual_tokens // self._blocks.block_size, sequence.num_virtual_tokens
        keys = list(self._keys(sequence, num_full))
        parent = keys[-1] if keys else root_key(sequence.cache_salt)
        at = num_full * self._blocks.block_size, num_virtual
        return block_key(parent, sequence.token_ids(*at), sequence.edit_identities(*at))

    def _remember_start(self, item: ScheduledSequence) -> None:
        """Makes known the block that virtual tokens fill in part, once they are computed."""
        sequence = item.sequence
        num_full, num_more = divmod(sequence.num_virtual_tokens, self._blocks.block_size)
        is_computed = item.start <= sequence.num_virtual_tokens <= item.end
        if num_more and is_computed and self._reuses_prefixes:
            self._blocks.remember_start(sequence.blocks[num_full], self._start_key(sequence))

    def _remember_filled(self, item: ScheduledSequence) -> None:
        """Makes the blocks known that a step has filled."""
        sequence = item.sequence
        first, stop = item.start // self._blocks.block_size, item.end // self._blocks.block_size
        if self._reuses_prefixes and first < stop:
            keys = list(self._keys(sequence, stop))
            for block, key in zip(sequence.blocks[first:stop], keys[first:], strict=True):
                self._blocks.remember(block, key)

    def _keys(self, sequence: Sequence, num_blocks: int) -> Iterator[bytes]:
        """The keys of the sequence's first full blocks, each computed when it is first asked for."""
        size, keys = self._blocks.block_size, sequence.block_keys
        for number in range(num_blocks):
            if number == len(keys):
                parent = keys[-1] if keys else root_key(sequence.cache_salt)
                at = number * size, (number + 1) * size
                keys.append(block_key(parent, sequence.token_ids(*at), sequence.edit_identities(*at)))
            yield keys[number]

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        step.drop(sequence)
        step.has_preempted = True
        self._set_back(sequence)

    def _set_back(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_turn_in_line)

    def _fail(self, sequence: Sequence, error: GraftError, step: _Step) -> None:
        self.finish(sequence, FinishReason.ERROR)
        step.failed.append(FailedSequence(sequence, error))

    def _stop(self, sequence: Sequence) -> None:
        """Takes a running sequence's seat, blocks and residency."""
        _remove(self._running, sequence, _arrival)
        self._blocks.free(sequence.blocks)
        self._unhold(sequence.version)
        sequence.blocks = []
        sequence.slot = 0
        sequence.num_computed_tokens = 0

    def _hold(self, sequence: Sequence, step: _Step) -> int | None:
        """Its slot, once its adapter is there for it. Raises GraftError where that cannot be, or would be of no use."""
        version = sequence.version
        if version is None:
            return 0
        self._check_room_for_prompt(sequence)  # first: nobody makes room for an adapter that then cannot be used
        slot = self._residency.admit(version)
        if slot is not None:
            self._num_holds[version] += 1
            self._turns.setdefault(version, _Turn(sequence, step.now_s))
        return slot

    def _unhold(self, version: Hashable | None) -> None:
        if version is None:
            return
        self._residency.retire(version)
        self._num_holds[version] -= 1
        if not self._num_holds[version]:
            del self._num_holds[version], self._turns[version]

    def _check_room_for_prompt(self, sequence: Sequence) -> None:
        """Raises ContextTooLong for a prompt that the adapter's virtual tokens, where known, leave no room."""
        num_virtual = None if sequence.version is None else self._residency.num_virtual_tokens(sequence.version)
        if not num_virtual:
            return
        num_tokens = num_virtual + sequence.num_prompt_tokens + min(sequence.params.max_tokens, 1)
        if num_tokens > self.max_total_tokens:
            raise ContextTooLong(
                f"The prompt has {sequence.num_prompt_tokens} tokens and the adapter puts {num_virtual} virtual ones "
                f"before it; a request may come to at most {self.max_total_tokens}. Shorten the prompt.",
                param="prompt",
            )

    def _out_of_blocks(self, sequence: Sequence) -> GenerationFailed:
        """For a sequence that runs alone: its blocks and the free ones are all that it can ever get."""
        num_usable = len(sequence.blocks) + self._blocks.num_free
        return GenerationFailed(
            f"The request has {sequence.num_tokens} tokens and needs more than the {num_usable} blocks of "
            f"{self._blocks.block_size} tokens that the KV cache can give it. Shorten it or enlarge the KV cache."
        )


def _wants_prompt_logits(sequence: Sequence) -> bool:
    """The first output token is sampled from the prompt's last row: with one, the whole prompt has been scored."""
    return sequence.params.prompt_logprobs is not None and not sequence.output_ids


def _waited_too_long(limit_s: float) -> Overloaded:
    return Overloaded(
        f"The request waited in the queue for longer than this server's limit (queue_timeout is {limit_s:g} s). "
        f"Retry in {_RETRY_AFTER_S} seconds.",
        retry_after_s=_RETRY_AFTER_S,
        reason="queue_timeout",
    )


def _timed_out(sequence: Sequence, limit_s: float) -> RequestTimedOut:
    return RequestTimedOut(
        f"The request took longer than this server's limit (request_timeout is {limit_s:g} s), and had generated "
        f"{sequence.num_output_tokens} of at most {sequence.params.max_tokens} tokens. Ask for fewer with max_tokens.",
        param="max_tokens",
    )


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _standing(sequence: Sequence) -> tuple[int, int]:
    """Lower is better."""
    return sequence.params.priority, sequence.arrival


def _turn_in_line(sequence: Sequence) -> tuple[bool, int, int]:
    return not sequence.has_started, *_standing(sequence)


def _remove(line: list[Sequence], sequence: Sequence, key: Callable[[Sequence], Any]) -> None:
    """`key` orders the line."""
    del line[bisect_left(line, key(sequence), key=key)]
