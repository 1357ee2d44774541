"""The values that the engine's parts exchange: what was asked, a generation in flight, a step's work, what came out.

Owns these shapes and the arithmetic of one sequence's tokens. Knows nothing about scheduling, tensors or text.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from server.adapters.positions import Reach, Span, parts_of
from server.engine.constraint import Constraint
from server.ground.errors import BadRequest, GraftError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request wants its tokens chosen. Ranges are checked where requests enter, not here."""

    max_tokens: int  # 0: score the prompt, generate nothing
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # of the most likely token's probability: less likely ones are left out
    seed: int | None = None
    stop: tuple[str, ...] = ()
    shown_tokens: frozenset[int] = frozenset()  # special tokens whose text the answer keeps
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end it as the model's own end does
    ignore_eos: bool = False
    min_tokens: int = 0  # before any end but by length
    allowed_token_ids: Listing[int] = ()  # none: all; an array is shared by all choices of a request
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    includes_stop: bool = False  # whether the text has the stop string or token that ended it
    priority: int = 0  # lower is admitted earlier
    logprobs: int | None = None  # alternatives listed beside each generated token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for the prompt's tokens


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SequenceStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class TokenLogprobs(NamedTuple):  # thousands may cross to another process at once, which dataclasses do slowly
    """A token's log-probability (None for the first of a prompt: nothing precedes it) and its best alternatives."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to one sequence: a plain value that may cross threads and processes."""

    sequence_id: str
    token_ids: tuple[int, ...] = ()  # the one that ends the sequence is among them
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of token_ids, when asked for
    # Sent when the whole prompt is scored: in one delta, or in several where they cross to another process.
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: GraftError | None = None  # why it failed, when the reason is ERROR
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # so far, these included
    num_cached_tokens: int = 0  # of the prompt: found in the cache, not computed
    queue_s: float = 0.0  # from its acceptance to its first step

    @property
    def is_terminal(self) -> bool:
        return self.finish_reason is not None


UNKNOWN_TOKEN = -(1 << 31)  # in place of a token that a step under way chooses; no virtual token has this id


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation in flight. The scheduler alone changes the fields below `constraint`; others read them.

    Known tokens are the virtual ones that its adapter puts before the prompt, the prompt, and the output so far; the
    first `num_computed_tokens` of them have their keys and values in `blocks`. A preempted sequence keeps its known
    tokens and computes again, the output too, what is not found in the cache; `prompt_ids` stays the original prompt,
    to which position rules refer. While a step runs that chooses its next token, that one counts as known already and
    stands last in `output_ids` as UNKNOWN_TOKEN.
    """

    sequence_id: str
    prompt_ids: list[int]
    params: SamplingParams
    version: Hashable | None = None  # of the adapter; None: the bare base
    edit_identity: str = ""  # tells its adapter's edits from all others, whatever the adapter is called; "": the base
    cache_salt: str | None = None  # keys and values are shared only among sequences of one salt
    constraint: Constraint | None = None  # the grammar that its output follows; the engine's loop moves it along
    output_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    slot: int = 0
    reach: Reach | None = None  # of its adapter, if that is on the device and has another than the whole sequence
    spans: tuple[Span, ...] | None = None  # where the adapter is applied; None: everywhere
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    arrival: int = -1  # its place in the order of arrival, given by the scheduler
    arrived_s: float = 0.0  # on the scheduler's clock
    short_since_s: float | None = None  # while it waits: since when its adapter has lacked room on the device
    has_started: bool = False  # whether it has ever run
    queue_s: float = 0.0  # from its arrival to its first step
    num_cached_tokens: int = 0  # of the prompt: found in the cache when it first ran
    block_keys: list[bytes] = field(default_factory=list)  # of its first full blocks, as many as were asked for

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise BadRequest("The prompt is empty; send at least one token.", param="prompt")
        if (self.version is None) != (self.edit_identity == ""):
            # Else the blocks of an adapter could be taken for the base's.
            raise ValueError(f"version is {self.version!r} and edit_identity is {self.edit_identity!r}: give both")

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def awaits_token(self) -> bool:
        """Whether its newest token is being chosen by a step under way."""
        return bool(self.output_ids) and self.output_ids[-1] == UNKNOWN_TOKEN

    @property
    def num_output_tokens(self) -> int:
        """Those that have been chosen."""
        return len(self.output_ids) - self.awaits_token

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens before the prompt that are the adapter's."""
        return 0 if self.reach is None else self.reach.num_virtual_tokens

    @property
    def num_first_tokens(self) -> int:
        """Tokens before the output: virtual ones and the prompt."""
        return self.num_virtual_tokens + len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known: virtual ones, prompt and output."""
        return self.num_first_tokens + len(self.output_ids)

    @property
    def max_total_tokens(self) -> int:
        """Tokens known at its longest possible end."""
        return self.num_first_tokens + self.params.max_tokens

    @property
    def num_pending(self) -> int:
        """Known tokens whose keys and values are not computed yet."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether more is pending than the one token that every decode step computes."""
        return self.num_pending > 1

    @property
    def last_position(self) -> int:
        """Position of the newest known token, counted from 0."""
        return self.num_tokens - 1

    @property
    def all_ids(self) -> list[int]:
        return self.token_ids(0, self.num_tokens)

    def take(self, slot: int, reach: Reach | None) -> None:
        """Takes the place on the device of its adapter, and what that has of a sequence."""
        self.slot, self.reach = slot, reach
        if reach is not None and reach.positions is not None and self.spans is None:
            self.spans = reach.positions.over(self.prompt_ids)  # once: a version's rule and a prompt do not change

    def slots(self, start: int, stop: int) -> list[int]:
        """The slot that edits each of the tokens at positions start..stop-1."""
        if self.spans is None or self.reach is None:
            return [self.slot] * (stop - start)
        of_part = (0, *self.reach.slots)
        return [of_part[part] for part in self._parts(self.spans, start, stop)]

    def edit_identities(self, start: int, stop: int) -> list[str]:
        """What edits each of these tokens, wherever it lies on the device."""
        if self.spans is None:
            return [self.edit_identity] * (stop - start)
        return [f"{self.edit_identity}#{part}" if part else "" for part in self._parts(self.spans, start, stop)]

    def _parts(self, spans: Listing[Span], start: int, stop: int) -> list[int]:
        return parts_of(spans, start - self.num_virtual_tokens, stop - self.num_virtual_tokens)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """The known tokens at positions start..stop-1, without building the whole list. Virtual ones are -1, -2, ..."""
        num_virtual, num_first = self.num_virtual_tokens, self.num_first_tokens
        virtual = [-1 - position for position in range(start, min(stop, num_virtual))]
        prompt = self.prompt_ids[max(start - num_virtual, 0) : max(stop - num_virtual, 0)]
        return virtual + prompt + self.output_ids[max(start - num_first, 0) : max(stop - num_first, 0)]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's share of one step: compute the known tokens at positions start .. start + num_tokens - 1.

    `samples`: the last of them is the newest known token, so its logits choose the next one. `wants_prompt_logits`:
    prompt log-probabilities were asked for and are not complete, so the logits of all these rows are needed; after a
    preemption in mid-prompt the same positions come again, so keep what is read from them by position. `copied_block`
    begins with the last of the virtual tokens, which are to be copied from there before the step writes anything.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    wants_prompt_logits: bool
    copied_block: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The last may be UNKNOWN_TOKEN, if the step before this one chooses it."""
        return self.sequence.token_ids(self.start, self.end)

    @property
    def slots(self) -> list[int]:
        """The slot that edits each of these tokens."""
        return self.sequence.slots(self.start, self.end)


@dataclass(frozen=True, slots=True)
class FailedSequence:
    """A sequence that the scheduler has ended because it cannot run, and the error to tell its user."""

    sequence: Sequence
    error: GraftError


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one step. `failed` need no work, only their terminal event."""

    sequences: tuple[ScheduledSequence, ...]
    failed: tuple[FailedSequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.sequences)
