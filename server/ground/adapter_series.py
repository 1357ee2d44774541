"""The series that carry an adapter's name: at most so many adapters at once, and none of one that has gone.

Owns which adapters have series of their own (a seat), the totals of each, and the sums of all others under `other`.
Knows nothing about tiers, requests or HTTP.

A seat is taken by the first event or scrape that meets an adapter, while there are free ones, and given back at the
first scrape that finds it on no tier and in no sequence. What happens to an adapter without a seat is counted under
`other` for good, so that no total ever falls; an adapter that comes back goes on from the total that it had.
"""

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.ground.exposition import Kept, head, line, quoted
from server.ground.families import EACH_ADAPTER

OTHER = "other"  # the adapters without a seat; one that is called so never has one
UNKNOWN = "unknown"  # names that no adapter has
SERIES_PER_ADAPTER = 10  # at most
_LOADED, _BYTES, _RUNNING, _WAITING, _SEQUENCES, _FAILURES, _PROMPT_TOKENS, _OUTPUT_TOKENS = EACH_ADAPTER


class AdapterState(NamedTuple):  # made by the thousand at each scrape, which a dataclass takes four times as long for
    """An adapter that is on a tier above the store, or in use, at this moment; all its versions together."""

    name: str
    method: str = ""  # "" where nobody knows yet
    rank: int | None = None
    is_pinned: bool = False
    host_bytes: int | None = None  # None: it is not there
    device_bytes: int | None = None
    num_running: int = 0
    num_waiting: int = 0


@dataclass(slots=True)
class _Totals:
    num_sequences: int = 0
    num_failures: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    def told(self) -> tuple[int, int, int, int]:
        return self.num_sequences, self.num_failures, self.num_prompt_tokens, self.num_output_tokens


class _Told(NamedTuple):
    name: str
    num_sequences: int
    num_failures: int
    num_prompt_tokens: int
    num_output_tokens: int


class Shown(NamedTuple):
    """What one scrape tells of adapters."""

    text: str  # in Prometheus' format
    own: Sequence[AdapterState]  # those that have series of their own


class AdapterSeries:
    """Counts events by adapter, and tells them with what a scrape has found. Safe for many threads."""

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self._lock = threading.Lock()
        self._seated: set[str] = set()
        self._totals = {OTHER: _Totals(), UNKNOWN: _Totals()}
        self._gauge_lines = Kept(_gauge_lines)
        self._counter_lines = Kept(_counter_lines)

    # Events; a mix of several adapters counts for each of them

    def count_sequence(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._of(name).num_sequences += 1

    def count_unknown(self) -> None:
        """A sequence was asked of a name that no adapter has."""
        with self._lock:
            self._totals[UNKNOWN].num_sequences += 1

    def count_failure(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._of(name).num_failures += 1

    def count_tokens(self, names: Iterable[str], *, num_prompt: int = 0, num_output: int = 0) -> None:
        with self._lock:
            for name in names:
                totals = self._of(name)
                totals.num_prompt_tokens += num_prompt
                totals.num_output_tokens += num_output

    def _of(self, name: str) -> _Totals:
        """Under the lock: what an event is added to."""
        if name not in self._seated and not self._seat(name):
            return self._totals[OTHER]
        return self._totals.setdefault(name, _Totals())

    def _seat(self, name: str) -> bool:
        is_free = len(self._seated) < self.max_adapters and name not in (OTHER, UNKNOWN)
        if is_free:
            self._seated.add(name)
        return is_free

    # Scrapes

    def names(self) -> Sequence[str]:
        """The adapters that have totals: who scrapes finds out which of them are gone."""
        with self._lock:
            return [name for name in self._totals if name not in (OTHER, UNKNOWN)]

    def shown(self, states: Sequence[AdapterState], gone: Iterable[str] = ()) -> Shown:
        """`states`: one for each adapter that is loaded or in use; `gone`: those of `names` that no adapter has.

        What was counted for one that is gone is forgotten, once it is not in use any more.
        """
        with self._lock:
            self._reseat(states)
            self._forget(gone)
            own = [state for state in states if state.name in self._seated]
            rest = [state for state in states if state.name not in self._seated]
            totals = [_Told(state.name, *self._totals.get(state.name, _Totals()).told()) for state in own]
            others = _Told(OTHER, *self._totals[OTHER].told())
            num_unknown = self._totals[UNKNOWN].num_sequences
        unknown = (line(_SEQUENCES.name, {"adapter": UNKNOWN}, num_unknown), "", "", "")
        gauges = self._gauge_lines.columns(own, _lines_of_rest(rest))
        counters = self._counter_lines.columns([*totals, others], unknown)
        columns = zip(EACH_ADAPTER, (*gauges, *counters), strict=True)
        text = "".join([head(family.name, family.kind, family.text) + lines for family, lines in columns])
        return Shown(text, own)

    def _reseat(self, states: Sequence[AdapterState]) -> None:
        """Under the lock: those that have gone give their seats to those that stand, what is on the device first."""
        self._seated &= {state.name for state in states}
        if self._has_free_seat():
            standing = sorted([state for state in states if state.name not in self._seated], key=_standing)
            for state in standing:
                if not self._seat(state.name) and not self._has_free_seat():
                    break

    def _has_free_seat(self) -> bool:
        return len(self._seated) < self.max_adapters

    def _forget(self, gone: Iterable[str]) -> None:
        """Under the lock."""
        for name in gone:
            if name not in self._seated:  # a sequence may still run of one that was deleted
                self._totals.pop(name, None)


def _standing(state: AdapterState) -> tuple[bool, bool, bool, str]:
    return (state.device_bytes is None, not (state.num_running or state.num_waiting), not state.is_pinned, state.name)


def _gauge_lines(state: AdapterState) -> tuple[str, ...]:
    of_it = f"{{adapter={quoted(state.name)}"
    rank, pinned = "" if state.rank is None else state.rank, str(state.is_pinned).lower()
    told = f'method={quoted(state.method)},rank="{rank}",pinned="{pinned}"'
    loaded = taken = running = waiting = ""
    for tier, num_bytes in (("host", state.host_bytes), ("device", state.device_bytes)):
        if num_bytes is not None:
            loaded += f'{_LOADED.name}{of_it},tier="{tier}",{told}}} 1\n'
            taken += f'{_BYTES.name}{of_it},tier="{tier}"}} {num_bytes}\n'
    if state.num_running or state.num_waiting:
        running = f"{_RUNNING.name}{of_it}}} {state.num_running}\n"
        waiting = f"{_WAITING.name}{of_it}}} {state.num_waiting}\n"
    return loaded, taken, running, waiting


def _lines_of_rest(rest: Collection[AdapterState]) -> tuple[str, ...]:
    """Those without a seat, as one."""
    if not rest:
        return "", "", "", ""
    name, loaded, taken = {"adapter": OTHER}, "", ""
    on_host = [state.host_bytes for state in rest if state.host_bytes is not None]
    on_device = [state.device_bytes for state in rest if state.device_bytes is not None]
    for tier, sizes in (("host", on_host), ("device", on_device)):
        of_tier = name | {"tier": tier}
        loaded += line(_LOADED.name, of_tier | {"method": "", "rank": "", "pinned": ""}, len(sizes))
        taken += line(_BYTES.name, of_tier, sum(sizes))
    running = line(_RUNNING.name, name, sum(state.num_running for state in rest))
    waiting = line(_WAITING.name, name, sum(state.num_waiting for state in rest))
    return loaded, taken, running, waiting


def _counter_lines(told: _Told) -> tuple[str, ...]:
    of_it = f"{{adapter={quoted(told.name)}}}"
    return (
        f"{_SEQUENCES.name}{of_it} {told.num_sequences}\n",
        f"{_FAILURES.name}{of_it} {told.num_failures}\n",
        f"{_PROMPT_TOKENS.name}{of_it} {told.num_prompt_tokens}\n",
        f"{_OUTPUT_TOKENS.name}{of_it} {told.num_output_tokens}\n",
    )
