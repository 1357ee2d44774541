"""The engine: one thread that schedules, runs and commits steps, and hands what they produce to asyncio.

Owns the loop, the sequences in flight and the one ending that each of them gets. Its whole surface is `submit`,
`accept`, `abort`, `drain`, `stats` and `close`. Knows nothing about HTTP, names of adapters or where adapters are
stored.
"""

import asyncio
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakValueDictionary

from server.engine.blocks import BlockPool
from server.engine.choice import choose
from server.engine.chosen import NOT_FINITE, Chosen
from server.engine.constraint import Constraint
from server.engine.flight import DeltaStream, Flight, GenerationRequest, Outlet, Streams
from server.engine.masks import Masks, StepMasks
from server.engine.runner import Runner, StepLogits
from server.engine.scheduler import Scheduler
from server.engine.scores import StepScores
from server.engine.sequence import (
    Batch,
    Delta,
    FinishReason,
    Sequence,
    SequenceStatus,
    TokenLogprobs,
)
from server.engine.token_rules import ending_ids, token_rules
from server.ground.errors import AdapterFailed, BadRequest, GenerationFailed, GraftError, OutOfMemory, Overloaded
from server.ground.heap import give_back_free_memory
from server.model.exhaustion import free_device_memory, is_out_of_memory
from server.model.tokenizer import IncrementalDecoder, Tokenizer

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MAX_FAILED_STEPS = 10  # in a row; then the engine is taken to be lost, though its device answers
_GATHERING_S = 0.002  # an idle engine waits so long after it is woken: requests sent together share their first step
_FAREWELL_S = 5.0  # for a thread that hangs
_RESTED_S = 5.0  # without work: the server rests
_IDLE_POLL_S = 0.005  # while sequences wait for an adapter that is being loaded


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, for metrics."""

    num_sequences: int
    num_tokens: int
    num_adapters: int  # distinct, the base not counted
    num_methods: int  # of these adapters
    duration_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_in_flight: int  # accepted and not yet ended
    num_used_blocks: int
    num_blocks: int
    block_size: int
    num_preemptions: int
    num_rotations: int  # of adapters off the device, for others
    num_shed: int  # steps taken back for lack of memory
    num_steps: int
    num_kept_blocks: int  # free, with content that can still be found
    num_queried_tokens: int  # looked up in the cache when their sequences first ran
    num_hit_tokens: int  # of those, found there and not computed
    num_short: int  # of those waiting, for room for their adapter
    num_overflown: int  # ended because the output overflowed


@dataclass(slots=True)
class InFlight:
    """How many sequences of one adapter run and wait."""

    num_running: int = 0
    num_waiting: int = 0


@dataclass(slots=True)
class _Step:
    """A step under way, from its launch until its tokens have been read."""

    batch: Batch
    started_s: float
    num_methods: int  # of its adapters; known while its sequences are in flight
    logits: StepLogits
    chosen: Chosen | None = None
    scores: StepScores | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a part of a step failed, without the exception: that holds all that the step has allocated."""

    error: GraftError
    is_out_of_memory: bool


class Engine:
    """Runs one base's generations in a thread of its own, from construction to `close`.

    `observe` is called after every step, on the engine's thread. `overlaps`: the next step is scheduled, packed and
    launched while the device computes one, and what that one gave is read meanwhile. It pays where launching is not
    computing, on a GPU; a sequence that ends by a token is computed once more than needed. A turn of the loop that
    takes longer than `max_step_s` hangs: the engine is not alive then.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockPool,
        runner: Runner,
        tokenizer: Tokenizer,
        observe: Callable[[StepReport], None] = lambda report: None,
        *,
        overlaps: bool = False,
        max_step_s: float = math.inf,
    ) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._runner = runner
        self._tokenizer = tokenizer
        self._observe = observe
        self._overlaps = overlaps
        self._max_step_s = max_step_s
        self._turn_begun_s: float | None = None  # of the turn of the loop under way
        self._masks = Masks()
        self._under_way: _Step | None = None  # launched and chosen, not read yet; none between turns without overlap
        self._ended_s = 0.0  # when the last step ended
        self._num_failed = 0  # parts of steps in a row, with a device that still answers
        self._flights: dict[str, Flight] = {}
        self._lock = threading.Lock()  # the scheduler and the flights; never held while the device works
        self._aborts: deque[str] = deque()
        self._wake = threading.Event()
        # Each lives as long as somebody's sequence is in flight: a loop that is over is not held.
        self._streams: WeakValueDictionary[asyncio.AbstractEventLoop, Streams] = WeakValueDictionary()
        self._outbox: dict[Outlet, list[Delta]] = {}
        self._is_draining = False
        self._is_closing = False
        self._fault: str | None = None
        self._num_steps = 0
        self._num_overflown = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> DeltaStream:
        """Accepts a request and returns its deltas. Call it on the event loop that will read them.

        Raises ContextTooLong, Overloaded (queue full, draining) or GenerationFailed (engine lost); the lease then
        stays the caller's.
        """
        loop = asyncio.get_running_loop()
        streams = self._streams.get(loop)
        if streams is None:
            streams = self._streams[loop] = Streams(loop)
        stream = streams.open(request.sequence_id, self.abort)
        try:
            self.accept(request, streams)
        except BaseException:
            streams.forget(request.sequence_id)
            raise
        return stream

    def accept(self, request: GenerationRequest, outlet: Outlet) -> None:
        """As `submit`, from any thread, with the deltas handed over to `outlet`."""
        lease = request.lease
        sequence = Sequence(
            sequence_id=request.sequence_id,
            prompt_ids=list(request.prompt_ids),
            params=request.params,
            version=None if lease is None else lease.version,
            # Not the name: what is called differently and has the same content edits alike.
            edit_identity="" if lease is None else lease.version.digest,
            cache_salt=request.cache_salt,
            constraint=None if request.grammar is None else Constraint(request.grammar),
        )
        decoder = self._decoder(request)
        eos_ids = self._tokenizer.eos_ids
        rules, ends = token_rules(sequence, eos_ids), ending_ids(request.params, eos_ids)
        flight = Flight(sequence, lease, outlet, decoder, _random(request.params.seed), rules, ends)
        with self._lock:
            if self._fault is not None:
                raise dead(self._fault)
            if self.is_draining:
                raise Overloaded("the server is shutting down", retry_after_s=5, reason="shutting_down")
            self._scheduler.add(sequence)
            self._flights[sequence.sequence_id] = flight
        self._wake.set()

    def _decoder(self, request: GenerationRequest) -> IncrementalDecoder:
        params = request.params
        return self._tokenizer.decoder(
            request.prompt_ids,
            params.stop,
            shown=params.shown_tokens,
            min_tokens=params.min_tokens,
            includes_stop=params.includes_stop,
        )

    def abort(self, sequence_id: str) -> None:
        """Ends a sequence within one step; does nothing if it has ended. Any thread."""
        self._aborts.append(sequence_id)
        self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """Accepts nothing new and waits for what is in flight; aborts what is left after `timeout_s`."""
        with self._lock:
            self._is_draining = True
        deadline = time.monotonic() + timeout_s
        while self._flights and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for sequence_id in tuple(self._flights):
            self.abort(sequence_id)
        while self._flights and self.is_alive:
            await asyncio.sleep(0.005)

    def close(self) -> None:
        """Ends the thread; what is in flight fails. One that hangs is left to the end of the process."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(_FAREWELL_S if self._is_hung else None)
        if not self._thread.is_alive():
            self._masks.close()

    def abandon(self) -> None:
        """Fails what is in flight on an engine that is not alive, if nobody else has: its step may never end."""
        with self._lock:
            self._fault = self._fault or f"a step took longer than --step-timeout, {self._max_step_s:g} s"
            self._end_with_error(list(self._flights.values()), dead(self._fault))
        self._hand_over()

    @property
    def is_alive(self) -> bool:
        """Whether it can still end what it accepts: its thread runs, and no step hangs."""
        return self._fault is None and self._thread.is_alive() and not self._is_hung

    @property
    def _is_hung(self) -> bool:
        begun_s = self._turn_begun_s
        return begun_s is not None and time.monotonic() - begun_s > self._max_step_s

    @property
    def is_draining(self) -> bool:
        """Whether new requests are turned away because the server is going down."""
        return self._is_draining or self._is_closing

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_in_flight=len(self._flights),
            num_used_blocks=self._blocks.num_used,
            num_blocks=self._blocks.num_blocks,
            block_size=self._blocks.block_size,
            num_preemptions=self._scheduler.num_preemptions,
            num_rotations=self._scheduler.num_rotations,
            num_shed=self._scheduler.num_shed,
            num_steps=self._num_steps,
            num_kept_blocks=self._blocks.num_kept,
            num_queried_tokens=self._scheduler.num_queried_tokens,
            num_hit_tokens=self._scheduler.num_hit_tokens,
            num_short=self._scheduler.num_short,
            num_overflown=self._num_overflown,
        )

    def in_flight(self) -> dict[str, InFlight]:
        """The sequences in flight by the name of their adapter; one of a mix counts for each of its adapters."""
        found: dict[str, InFlight] = {}
        for flight in tuple(self._flights.values()):
            for name in flight.adapters:
                count = found.setdefault(name, InFlight())
                if flight.sequence.status is SequenceStatus.RUNNING:
                    count.num_running += 1
                else:
                    count.num_waiting += 1
        return found

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # whatever it is, a panic in Rust too: nobody must be left waiting
            log.exception("the engine's loop has ended")
            self._fault = f"{type(error).__name__}: {error}"
        with self._lock:
            why = Overloaded("The server is shutting down.") if self._fault is None else dead(self._fault)
            self._end_with_error(list(self._flights.values()), why)
        self._hand_over()

    def _loop(self) -> None:
        while not self._is_closing and self._fault is None:
            self._wake.clear()
            self._turn_begun_s = time.monotonic()
            batch = self._schedule()  # which may wait for the device, too
            is_idle = not batch.sequences and self._under_way is None
            if not is_idle:
                self._turn(batch)
            self._turn_begun_s = None
            self._hand_over()
            if is_idle and self._scheduler.num_waiting:
                self._wake.wait(_IDLE_POLL_S)  # for its adapter; all else sets the event
            elif is_idle:
                self._rest()

    def _rest(self) -> None:
        """Waits for work. Some time without any is the time to tidy up, for which everybody would have to wait."""
        if not self._wake.wait(_RESTED_S):
            self._runner.rest()
            give_back_free_memory()
            self._wake.wait()
        time.sleep(_GATHERING_S)

    def _schedule(self) -> Batch:
        with self._lock:
            while self._aborts:
                sequence = self._scheduler.abort(self._aborts.popleft())
                if sequence is not None:
                    self._end(self._flights[sequence.sequence_id], FinishReason.ABORT)
            batch = self._scheduler.schedule()
            for failed in batch.failed:
                flight = self._flights[failed.sequence.sequence_id]
                error = failed.error if flight.lease is None else flight.lease.told(failed.error)
                self._end(flight, FinishReason.ERROR, error)
            return batch

    def _turn(self, batch: Batch) -> None:
        """Launches a step, ends the one before it while the device computes, and has the new one's tokens chosen.

        In this order a choice knows all tokens before it, for grammars and penalties, and the device waits for the CPU
        only if ending a step takes longer than computing one. Where steps do not overlap, the new one ends here too.
        """
        before, self._under_way = self._under_way, None
        # Filled while the device computes, and from where the tokens before have led.
        masks = self._masks.begin(batch) if before is None else None
        step = _tried(batch, lambda: self._launch(batch, before)) if batch.sequences else None
        if before is not None:
            self._settle(before.batch, _tried(before.batch, lambda: self._end_step(before)), is_booked=True)
            masks = self._masks.begin(batch)
        if not isinstance(step, _Step):
            self._settle(batch, step, was_alone=before is None)
            return
        failure = _tried(batch, lambda: self._choose(step, masks))
        if failure is not None:
            self._settle(batch, failure)
        elif self._overlaps:
            self._under_way = step
        else:
            self._settle(batch, _tried(batch, lambda: self._end_step(step)), is_booked=True)

    def _settle(
        self, batch: Batch, failure: _Failure | None, *, is_booked: bool = False, was_alone: bool = True
    ) -> None:
        """After a part of a step has failed: so do its sequences, and the engine goes on.

        One that ran out of memory before it was booked is tried again, smaller, as long as it can be. `was_alone`
        False: another step's tensors were in memory beside it, which are gone by now.
        """
        if failure is None:
            return
        if failure.is_out_of_memory:
            free_device_memory()
        if failure.is_out_of_memory and not is_booked:
            with self._lock:
                hopeless = self._scheduler.shed(batch, is_alone=was_alone)
            if hopeless is None:
                return
            self._fail([hopeless], _needs_too_much(hopeless))
        else:
            self._fail([item.sequence for item in batch.sequences], failure.error)
        with self._lock:
            self._scheduler.drop(batch)
        self._num_failed += 1
        if self._num_failed == _MAX_FAILED_STEPS or not self._runner.is_device_alive():
            self._fault = f"{self._num_failed} steps failed in a row; see the log"

    def _fail(self, sequences: list[Sequence], error: GraftError) -> None:
        """Ends those of the sequences that are still in flight."""
        with self._lock:
            known = [self._flights.get(sequence.sequence_id) for sequence in sequences]
            self._end_with_error([flight for flight in known if flight is not None], error)

    def _launch(self, batch: Batch, before: _Step | None) -> _Step:
        started_s = time.perf_counter()
        logits = self._runner.run(batch, None if before is None else before.chosen)
        return _Step(batch, started_s, self._num_methods(batch), logits)

    def _num_methods(self, batch: Batch) -> int:
        flights = [self._flights.get(item.sequence.sequence_id) for item in batch.sequences]
        return len({flight.method for flight in flights if flight is not None} - {None})

    def _choose(self, step: _Step, masks: StepMasks | None) -> None:
        """Has the device choose and score the step's tokens, which its sequences count from here on."""
        step.chosen = choose(step.logits, self._flights, masks)
        step.scores = StepScores(step.logits, step.chosen)
        with self._lock:
            self._scheduler.advance(step.batch)

    def _end_step(self, step: _Step) -> None:
        """Waits for a step's tokens, books them and makes its deltas."""
        batch, logits = step.batch, step.logits
        assert step.chosen is not None
        assert step.scores is not None
        tokens = step.chosen.read()
        self._fail_overflown(step.scores, tokens)
        self._score_prompts(step.scores)
        scores = step.scores.read(tokens)
        self._follow_grammars(tokens, logits)
        with self._lock:
            ended = set(self._scheduler.commit(batch, tokens))
            for item in batch.sequences:
                if item.sequence.sequence_id in self._flights:
                    self._emit(item.sequence, tokens, scores, item.sequence in ended)
        self._num_failed = 0
        self._num_steps += 1
        num_adapters = len({item.sequence.version for item in batch.sequences} - {None})
        now_s = time.perf_counter()
        duration_s = now_s - max(step.started_s, self._ended_s)  # steps that overlap do not count a time twice
        self._ended_s = now_s
        report = StepReport(len(batch.sequences), batch.num_tokens, num_adapters, step.num_methods, duration_s)
        self._observe(report)

    def _fail_overflown(self, scores: StepScores, tokens: dict[str, int]) -> None:
        """Ends the sequences whose logits are not numbers: an adapter of extreme weights has overflown."""
        overflown = [name for name, token in tokens.items() if token == NOT_FINITE]
        overflown += [name for name, own in scores.prompts.items() if own is not None and not own.is_finite()]
        flights = {name: self._flights[name] for name in overflown if name in self._flights}
        if not flights:
            return
        with self._lock:
            leases = {flight.lease.version: flight.lease for flight in flights.values() if flight.lease is not None}
            for lease in leases.values():  # while they are held; once, however many of an adapter's sequences it were
                lease.blame()
            for flight in flights.values():
                self._end_with_error([flight], _overflown(flight))
            self._num_overflown += len(flights)

    def _follow_grammars(self, tokens: dict[str, int], logits: StepLogits) -> None:
        """Moves each grammar on by its sequence's new token; ends the sequences whose grammar cannot go on."""
        for item in logits.samplers:
            sequence = item.sequence
            if sequence.constraint is None or sequence.sequence_id not in self._flights:
                continue
            sequence.constraint.accept(tokens[sequence.sequence_id])
            fault = sequence.constraint.fault
            if fault is not None:
                with self._lock:
                    self._scheduler.finish(sequence, FinishReason.ERROR)
                    self._end(self._flights[sequence.sequence_id], FinishReason.ERROR, _unfollowable(sequence, fault))

    def _score_prompts(self, scores: StepScores) -> None:
        """Gives flights the scores of their prompts. Memory that ran out there fails those alone who asked for them."""
        for sequence_id, own in scores.prompts.items():
            flight = self._flights.get(sequence_id)
            if flight is None:
                continue
            if own is None:
                error = OutOfMemory("There was no memory to score the prompt: make it shorter.")
                self._fail([flight.sequence], error)
            else:
                flight.add_prompt_scores(*own.read())

    def _emit(
        self, sequence: Sequence, tokens: dict[str, int], scores: dict[str, TokenLogprobs], has_ended: bool
    ) -> None:
        flight = self._flights[sequence.sequence_id]
        token = tokens.get(sequence.sequence_id)
        reason = sequence.finish_reason if has_ended else None
        new = () if token is None else (token,)
        score = scores.get(sequence.sequence_id)
        delta = flight.advance(new, () if score is None else (score,), reason)
        if delta is None:
            return
        if delta.is_terminal:
            self._scheduler.finish(sequence, FinishReason.STOP)  # by a stop string; no change if it has ended before
            self._close_flight(flight)
        self._post(flight, delta)

    def _end(self, flight: Flight, reason: FinishReason, error: GraftError | None = None) -> None:
        """The terminal event of a sequence that the scheduler has ended outside of a commit."""
        self._close_flight(flight)
        self._post(flight, flight.end(reason, error))

    def _end_with_error(self, flights: list[Flight], error: GraftError) -> None:
        for flight in flights:
            self._scheduler.discard(flight.sequence)
            self._end(flight, FinishReason.ERROR, copy(error))  # one that is raised collects a traceback: each its own

    def _close_flight(self, flight: Flight) -> None:
        # The lease first, so that nothing is held any more once nothing is in flight.
        if flight.lease is not None:
            flight.lease.release()
        del self._flights[flight.sequence.sequence_id]

    def _post(self, flight: Flight, delta: Delta) -> None:
        self._outbox.setdefault(flight.outlet, []).append(delta)

    def _hand_over(self) -> None:
        """All deltas since the last step, with one call into each event loop."""
        with self._lock:  # a step that was given up may end just as `abandon` hands over
            outbox, self._outbox = self._outbox, {}
        for outlet, deltas in outbox.items():
            outlet.hand_over(deltas)


def _tried(batch: Batch, part: Callable[[], _T]) -> _T | _Failure:
    """What a part of a step gives, or why it failed."""
    try:
        return part()
    except Exception as error:
        size, said = (len(batch.sequences), batch.num_tokens), " ".join(str(error).split())
        if is_out_of_memory(error):
            log.warning("no memory for a step of %d sequences and %d tokens: %s", *size, said)
            return _Failure(OutOfMemory(f"There was no memory to read what the step gave: {said}"), True)
        log.exception("a step of %d sequences and %d tokens failed", *size)
        return _Failure(GenerationFailed(f"The step failed with {type(error).__name__}: {error}"), False)


def _random(seed: int | None) -> random.Random:
    """A generator per request. Python drops the sign of a seed; 5 and -5 are two seeds here."""
    return random.Random(None if seed is None else seed % 2**64)


def dead(fault: str) -> GenerationFailed:
    """What to raise, and to tell those who wait, once the engine has ended: why it did."""
    return GenerationFailed(f"The engine has stopped: {fault}", code="engine_dead")


def _needs_too_much(sequence: Sequence) -> OutOfMemory:
    return OutOfMemory(
        f"There was no memory for one more token after {sequence.num_computed_tokens}, with nothing else running: "
        "shorten the request, or start the server with a smaller --kv-memory or --adapter-memory."
    )


def _overflown(flight: Flight) -> GraftError:
    if flight.lease is None:
        return GenerationFailed("The base model's output overflowed; another --dtype may hold it.")
    return AdapterFailed(
        f"The model's output overflowed with the adapter {flight.lease.version}: its weights or its scaling are too "
        "large.",
        param="adapter",
    )


def _unfollowable(sequence: Sequence, fault: str) -> BadRequest:
    return BadRequest(
        f"The grammar could not be followed past {sequence.num_output_tokens} tokens: {fault}. Make it simpler: "
        "shorter regular expressions, fewer alternatives that begin alike.",
        code="invalid_grammar",
    )
