"""What a key has left of its limits: requests, tokens, and sequences at once.

Owns the counts, and what is told of them. Knows nothing about HTTP beyond the names of headers. Not safe for threads:
for the event loop alone, but for `Budgets.keep`.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar

from server.api.keys.key import Key, Limits
from server.ground.errors import BadRequest, RateLimited

_DAY_S = 86_400
_MINUTE_S = 60.0
Clock = Callable[[], float]


class Bucket:
    """`limit` at once, and as many again in each period, evenly. What is spent beyond it is owed."""

    def __init__(self, limit: int, period_s: float, clock: Clock) -> None:
        self.limit = limit
        self._rate = limit / period_s
        self._clock = clock
        self._level = float(limit)
        self._filled_s = clock()

    def spend(self, number: int) -> None:
        self._level = self._now() - number

    @property
    def remaining(self) -> int:
        return max(math.floor(self._now()), 0)

    @property
    def reset_s(self) -> float:
        """Until it is full."""
        return (self.limit - self._now()) / self._rate

    @property
    def wait_s(self) -> float:
        """Until it has one; 0 where it has."""
        return max(1 - self._now(), 0) / self._rate

    def _now(self) -> float:
        now_s = self._clock()
        self._level = min(self._level + max(now_s - self._filled_s, 0) * self._rate, self.limit)
        self._filled_s = now_s
        return self._level


class Day:
    """`limit` in each day of UTC. A clock that is set back gives nothing back."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit = limit
        self._clock = clock
        self._day = 0
        self._spent = 0

    def spend(self, number: int) -> None:
        self._spent = self._now() + number

    @property
    def remaining(self) -> int:
        return max(self.limit - self._now(), 0)

    @property
    def reset_s(self) -> float:
        return (max(self._day, int(self._clock() // _DAY_S)) + 1) * _DAY_S - self._clock()

    @property
    def wait_s(self) -> float:
        return 0.0 if self.remaining else self.reset_s

    def _now(self) -> int:
        day = int(self._clock() // _DAY_S)
        if day > self._day:
            self._day, self._spent = day, 0
        return self._spent


class Budget:
    """What one key has left. The counts begin with the server, and anew when the key's own limits change."""

    def __init__(self, limits: Limits, clock: Clock, wall_clock: Clock) -> None:
        self.limits = limits
        self.num_running = 0  # sequences; a request without any is as one
        requests, tokens, day = limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day
        self._requests = Bucket(requests, _MINUTE_S, clock) if requests is not None else None
        self._tokens = Bucket(tokens, _MINUTE_S, clock) if tokens is not None else None
        self._day = Day(day, wall_clock) if day is not None else None

    def begin(self) -> "Share":
        """Counts a request, as one sequence until it has more. Raises RateLimited, having counted nothing."""
        self.check_room(1)
        for named, unit in ((self._requests, "requests per minute"), (self._tokens, "tokens per minute")):
            if named is not None and named.wait_s:
                raise _spent(f"{named.limit} {unit}", named.wait_s)
        if self._day is not None and self._day.wait_s:
            raise _spent(f"{self._day.limit} tokens per day (of UTC)", self._day.wait_s)
        if self._requests is not None:
            self._requests.spend(1)
        self.num_running += 1
        return Share(self)

    def check_room(self, number: int) -> None:
        """Raises RateLimited where so many sequences more are too many at once."""
        most = self.limits.concurrent_requests
        if most is not None and self.num_running + number > most:
            raise RateLimited(
                f"This key may have {most} requests at once, each counted as its sequences (prompts times n), and "
                f"{self.num_running} run: wait for one."
            )

    def spend_tokens(self, number: int) -> None:
        """Of a prompt, or of an answer as it comes: one that has begun goes on to its end."""
        for named in (self._tokens, self._day):
            if named is not None:
                named.spend(number)

    def headers(self) -> Mapping[str, str]:
        """What is left, under OpenAI's names; of two limits of tokens the one that has less left."""
        shown: dict[str, Bucket | Day] = {"requests": self._requests} if self._requests is not None else {}
        tokens = [named for named in (self._tokens, self._day) if named is not None]
        shown |= {"tokens": min(tokens, key=lambda named: named.remaining)} if tokens else {}
        told = {}
        for unit, named in shown.items():
            told[f"x-ratelimit-limit-{unit}"] = str(named.limit)
            told[f"x-ratelimit-remaining-{unit}"] = str(named.remaining)
            told[f"x-ratelimit-reset-{unit}"] = f"{math.ceil(named.reset_s)}s"
        return told


class Share:
    """What one request has of its key's budget: as many places as it has sequences, until it ends."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._num_places = 1

    def widen(self, num_sequences: int, param: str) -> None:
        """Takes places for all sequences of the request, before they are submitted.

        Raises BadRequest (of the field `param`) for more than the key may ever have at once, RateLimited for more than
        it may have now; then the request has the places that it had.
        """
        most = self.budget.limits.concurrent_requests
        if most is not None and num_sequences > most:
            raise BadRequest(
                f"The request is for {num_sequences} sequences (prompts times n), and this key may have {most} at "
                f"once: split the request.",
                param=param,
            )
        more = max(num_sequences - self._num_places, 0)
        self.budget.check_room(more)
        self.budget.num_running += more
        self._num_places += more

    def end(self) -> None:
        """Gives the places back; does nothing the second time."""
        self.budget.num_running -= self._num_places
        self._num_places = 0


class Budgets:
    """The budgets of all keys: one for each that has asked for something."""

    def __init__(self, clock: Clock = time.monotonic, wall_clock: Clock = time.time) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._by_name: dict[str, Budget] = {}

    def of(self, key: Key) -> Budget:
        budget = self._by_name.get(key.name)
        if budget is None or budget.limits.of_key != key.limits.of_key:
            budget = self._by_name[key.name] = Budget(key.limits, self._clock, self._wall_clock)
        return budget

    def keep(self, names: Collection[str]) -> None:
        """Forgets the budgets of keys that are no longer there."""
        # In place, from a copy of the names: this is called in the thread that reads the file of keys.
        for name in tuple(self._by_name):
            if name not in names:
                self._by_name.pop(name, None)


_share: ContextVar[Share | None] = ContextVar("share", default=None)


def current_share() -> Share | None:
    """That of the request which is being answered here; None where no key is asked for."""
    return _share.get()


def spend_from(share: Share | None) -> None:
    """For the rest of the calling task, and what it begins."""
    _share.set(share)


def _spent(limit: str, wait_s: float) -> RateLimited:
    wait = max(math.ceil(wait_s), 1)
    return RateLimited(f"This key may use {limit}, and has used them: ask again in {wait} s.", retry_after_s=wait)
