"""How one request went, as the client saw it. Knows nothing about how it was asked or what is made of it."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from load_tests.plan import Request


class End(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"  # the server's answer was an error, or broken; `error` says which
    CANCELLED = "cancelled"  # the client gave up waiting


@dataclass(frozen=True, slots=True)
class Outcome:
    """All times are seconds after the start of the run."""

    request: Request
    end: End
    sent_s: float
    ended_s: float  # of the last event, the error or the cancellation
    token_times_s: tuple[float, ...] = ()  # one per chunk with text; a chunk may bring several tokens
    num_prompt_tokens: int | None = None  # as the server counted; None if it did not say
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # the kind, a word that can be counted
    detail: str | None = None  # the error in full

    @property
    def lag_s(self) -> float:
        """How late the client sent it."""
        return self.sent_s - self.request.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """From the scheduled arrival to the first token: a client that is late does not hide a server that is slow."""
        return self.token_times_s[0] - self.request.scheduled_s if self.token_times_s else None

    @property
    def ttft_from_sent_s(self) -> float | None:
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.request.scheduled_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between one chunk with text and the next."""
        return tuple(later - earlier for earlier, later in pairwise(self.token_times_s))

    @property
    def num_tokens(self) -> int:
        """Output tokens; chunks stand in for them where the server does not say."""
        return len(self.token_times_s) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None where there is no second."""
        if not self.token_times_s or self.num_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_tokens - 1)

    def is_within(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether it completed with its first token and its mean time per token within the limits."""
        if self.end is not End.COMPLETED or self.ttft_s is None:
            return False
        return self.ttft_s <= ttft_s and (self.tpot_s or 0.0) <= tpot_s
