"""Outcomes as tests want them: one token at a time, at times that are said."""

from typing import Any

from load_tests.outcome import End, Outcome
from load_tests.plan import Request


def request(number: int = 0, rank: int = 1, at_s: float = 0.0) -> Request:
    return Request(number, at_s, f"adapter-{rank}" if rank else None, rank, 16)


def completed(
    asked: Request | None = None, ttft_s: float = 0.1, gaps_s: tuple[float, ...] = (), **said: Any
) -> Outcome:
    """Sent on time; the first token `ttft_s` after that, the others after their gaps."""
    asked = asked or request()
    times = [asked.scheduled_s + ttft_s]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    plain: dict[str, Any] = {
        "end": End.COMPLETED,
        "sent_s": asked.scheduled_s,
        "ended_s": times[-1],
        "token_times_s": tuple(times),
        "num_prompt_tokens": 16,
        "num_output_tokens": len(times),
        "finish_reason": "length",
    }
    return Outcome(asked, **(plain | said))


def failed(asked: Request | None = None, error: str = "http_500", detail: str = "broken") -> Outcome:
    asked = asked or request()
    return Outcome(asked, End.FAILED, asked.scheduled_s, asked.scheduled_s + 0.2, error=error, detail=detail)


def cancelled(asked: Request | None = None) -> Outcome:
    asked = asked or request()
    return Outcome(asked, End.CANCELLED, asked.scheduled_s, asked.scheduled_s + 9.0)
