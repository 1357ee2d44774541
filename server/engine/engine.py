"""The engine: one thread that schedules, runs and commits steps, and hands what they produce to asyncio.

Owns the loop, the sequences in flight and the one ending that each of them gets. Its whole surface is `submit`,
`abort`, `drain`, `stats` and `close`. Knows nothing about HTTP, names of adapters or where adapters are stored.
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.blocks import BlockPool
from server.engine.constraint import Constraint
from server.engine.flight import DeltaStream, Flight, GenerationRequest
from server.engine.logits import edit_logits
from server.engine.masks import Masks, StepMasks
from server.engine.runner import Runner, StepLogits
from server.engine.sampler import SamplingRow, sample, token_logprobs
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Delta, FinishReason, ScheduledSequence, Sequence, TokenLogprobs
from server.engine.token_rules import ending_ids, token_rules
from server.ground.errors import BadRequest, GenerationFailed, GraftError, Overloaded
from server.ground.heap import give_back_free_memory
from server.model.tokenizer import IncrementalDecoder, Tokenizer

log = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 10  # in a row, with a device that still answers; then the engine is taken to be lost
_GATHERING_S = 0.002  # an idle engine waits so long after it is woken: requests sent together share their first step
_RESTED_S = 5.0  # without work: the server rests
_IDLE_POLL_S = 0.005  # while sequences wait for an adapter that is being loaded


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, for metrics."""

    num_sequences: int
    num_tokens: int
    num_adapters: int  # distinct, the base not counted
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
    num_steps: int
    num_kept_blocks: int  # free, with content that can still be found
    num_queried_tokens: int  # looked up in the cache when their sequences first ran
    num_hit_tokens: int  # of those, found there and not computed


class Engine:
    """Runs one base's generations in a thread of its own, from construction to `close`.

    `observe` is called after every step, on the engine's thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockPool,
        runner: Runner,
        tokenizer: Tokenizer,
        observe: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._runner = runner
        self._tokenizer = tokenizer
        self._observe = observe
        self._masks = Masks()
        self._flights: dict[str, Flight] = {}
        self._lock = threading.Lock()  # the scheduler and the flights; never held while the device works
        self._aborts: deque[str] = deque()
        self._wake = threading.Event()
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[DeltaStream, Delta]]] = {}
        self._is_draining = False
        self._is_closing = False
        self._fault: str | None = None
        self._num_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> DeltaStream:
        """Accepts a request and returns its deltas. Call it on the event loop that will read them.

        Raises ContextTooLong, Overloaded (queue full, draining) or GenerationFailed (engine lost); the lease then
        stays the caller's.
        """
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
        stream = DeltaStream(request.sequence_id, self.abort)
        decoder = self._decoder(request)
        loop = asyncio.get_running_loop()
        eos_ids = self._tokenizer.eos_ids
        rules, ends = token_rules(sequence, eos_ids), ending_ids(request.params, eos_ids)
        flight = Flight(sequence, lease, stream, loop, decoder, _random(request.params.seed), rules, ends)
        with self._lock:
            if self._fault is not None:
                raise GenerationFailed(f"the engine has stopped: {self._fault}", code="engine_dead")
            if self.is_draining:
                raise Overloaded("the server is shutting down", retry_after_s=5)
            self._scheduler.add(sequence)
            self._flights[sequence.sequence_id] = flight
        self._wake.set()
        return stream

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
        """Ends the thread; what is in flight fails."""
        self._is_closing = True
        self._wake.set()
        self._thread.join()
        self._masks.close()

    @property
    def is_alive(self) -> bool:
        return self._fault is None and self._thread.is_alive()

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
            num_steps=self._num_steps,
            num_kept_blocks=self._blocks.num_kept,
            num_queried_tokens=self._scheduler.num_queried_tokens,
            num_hit_tokens=self._scheduler.num_hit_tokens,
        )

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # whatever it is, a panic in Rust too: nobody must be left waiting
            log.exception("the engine's loop has ended")
            self._fault = f"{type(error).__name__}: {error}"
        with self._lock:
            self._end_with_error(list(self._flights.values()), self._fault or "The server is shutting down.")
        self._hand_over()

    def _loop(self) -> None:
        num_failed = 0
        while not self._is_closing and self._fault is None:
            self._wake.clear()
            batch = self._schedule()
            if batch.sequences:
                num_failed = 0 if self._try_step(batch) else num_failed + 1
                if num_failed == _MAX_FAILED_STEPS or (num_failed and not self._runner.is_device_alive()):
                    self._fault = f"{num_failed} steps failed in a row; see the log"
            self._hand_over()
            if not batch.sequences and self._scheduler.num_waiting:
                self._wake.wait(_IDLE_POLL_S)  # for its adapter; all else sets the event
            elif not batch.sequences:
                self._rest()

    def _rest(self) -> None:
        """Waits for work. Some time without any is the time to tidy up, for which everybody would have to wait."""
        if not self._wake.wait(_RESTED_S):
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
                self._end(self._flights[failed.sequence.sequence_id], FinishReason.ERROR, failed.error)
            return batch

    def _try_step(self, batch: Batch) -> bool:
        """Runs a step; when it fails, so do its sequences, and the engine goes on. Returns whether it ran."""
        try:
            self._step(batch)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(batch.sequences))
            with self._lock:
                known = [self._flights.get(item.sequence.sequence_id) for item in batch.sequences]
                flights = [flight for flight in known if flight is not None]
                self._end_with_error(flights, f"The step failed with {type(error).__name__}: {error}")
            return False
        return True

    def _step(self, batch: Batch) -> None:
        started = time.perf_counter()
        masks = self._masks.begin(batch)  # filled while the device computes
        logits = self._runner.run(batch)
        self._fail_overflown(logits)
        tokens = self._sample(logits, masks)
        self._follow_grammars(logits, tokens)
        scores = self._score(logits, tokens)
        with self._lock:
            ended = set(self._scheduler.commit(batch, tokens))
            for item in batch.sequences:
                if item.sequence.sequence_id in self._flights:
                    self._emit(item.sequence, tokens, scores, item.sequence in ended)
        self._num_steps += 1
        num_adapters = len({item.sequence.version for item in batch.sequences} - {None})
        duration_s = time.perf_counter() - started
        self._observe(StepReport(len(batch.sequences), batch.num_tokens, num_adapters, duration_s))

    def _fail_overflown(self, logits: StepLogits) -> None:
        """Ends the sequences whose logits are not numbers: an adapter of extreme weights has overflown."""
        overflown = []
        if logits.samplers:
            is_finite = logits.sampled.amax(dim=-1).isfinite().tolist()  # amax passes NaN on
            overflown = [item.sequence for item, is_fine in zip(logits.samplers, is_finite, strict=True) if not is_fine]
        scored = [name for name, rows in logits.scored.items() if not rows.amax(dim=-1).isfinite().all()]
        with self._lock:
            flights = {sequence.sequence_id: self._flights[sequence.sequence_id] for sequence in overflown}
            flights |= {name: self._flights[name] for name in scored}
            self._end_with_error(
                list(flights.values()), "The model's output overflowed: the adapter's weights or scaling are too large."
            )

    def _sample(self, logits: StepLogits, masks: StepMasks | None) -> dict[str, int]:
        """The next token of each sequence that samples, by sequence id."""
        if not logits.samplers:
            return {}
        rows = [self._sampling_row(item) for item in logits.samplers]
        allowed = logits.sampled if masks is None else masks.applied(logits)
        tokens = sample(edit_logits(allowed, rows), rows).tolist()
        return {item.sequence.sequence_id: token for item, token in zip(logits.samplers, tokens, strict=True)}

    def _sampling_row(self, item: ScheduledSequence) -> SamplingRow:
        params = item.sequence.params
        # One random number per sampled token of this request, so that a seed does not depend on the batch.
        flight = self._flights.get(item.sequence.sequence_id)  # None: it has just failed
        uniform = flight.random.random() if flight is not None and params.temperature > 0 else 0.0
        rules = None if flight is None else flight.rules
        return SamplingRow(params.temperature, params.top_p, params.top_k, uniform, params.min_p, rules)

    def _follow_grammars(self, logits: StepLogits, tokens: dict[str, int]) -> None:
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

    def _score(self, logits: StepLogits, tokens: dict[str, int]) -> dict[str, TokenLogprobs]:
        """Log-probabilities of the sampled tokens for which they are wanted; those of prompts go to their flights."""
        for sequence_id, rows in logits.scored.items():
            if sequence_id in self._flights:
                self._score_prompt(sequence_id, logits, rows.shape[0])
        scores = {}
        for row, item in enumerate(logits.samplers):
            sequence_id, num_top = item.sequence.sequence_id, item.sequence.params.logprobs
            if num_top is not None and sequence_id in self._flights:
                scores[sequence_id] = token_logprobs(logits.sampled[row : row + 1], [tokens[sequence_id]], num_top)[0]
        return scores

    def _score_prompt(self, sequence_id: str, logits: StepLogits, num_rows: int) -> None:
        """The row of a position scores the token after it, as far as that is still the prompt's."""
        flight = self._flights[sequence_id]
        sequence = flight.sequence
        end = sequence.num_computed_tokens + 1 + num_rows - sequence.num_virtual_tokens
        start = max(end - num_rows, 1)  # nothing is said of the prompt's first token, whatever stands before it
        following = sequence.prompt_ids[start : max(end, start)]
        rows = logits.scored[sequence_id][start - end + num_rows :][: len(following)]
        flight.add_prompt_scores(start, token_logprobs(rows, following, sequence.params.prompt_logprobs or 0))

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

    def _end_with_error(self, flights: list[Flight], error: str) -> None:
        for flight in flights:
            self._scheduler.discard(flight.sequence)
            self._end(flight, FinishReason.ERROR, GenerationFailed(error))

    def _close_flight(self, flight: Flight) -> None:
        # The lease first, so that nothing is held any more once nothing is in flight.
        if flight.lease is not None:
            flight.lease.release()
        del self._flights[flight.sequence.sequence_id]

    def _post(self, flight: Flight, delta: Delta) -> None:
        self._outbox.setdefault(flight.loop, []).append((flight.stream, delta))

    def _hand_over(self) -> None:
        """All deltas since the last step, with one call into each event loop."""
        for loop, deltas in self._outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody reads any more
                loop.call_soon_threadsafe(_deliver, deltas)
        self._outbox = {}


def _random(seed: int | None) -> random.Random:
    """A generator per request. Python drops the sign of a seed; 5 and -5 are two seeds here."""
    return random.Random(None if seed is None else seed % 2**64)


def _unfollowable(sequence: Sequence, fault: str) -> BadRequest:
    return BadRequest(
        f"The grammar could not be followed past {sequence.num_output_tokens} tokens: {fault}. Make it simpler: "
        "shorter regular expressions, fewer alternatives that begin alike.",
        code="invalid_grammar",
    )


def _deliver(deltas: list[tuple[DeltaStream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.put(delta)
