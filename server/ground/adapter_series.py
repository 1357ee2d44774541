"""The series that carry an adapter's name: at most so many adapters at once, and none of one that has gone.

Owns which adapters have series of their own (a seat), the totals of each, and the sums of all others under `other`.
Knows nothing about tiers, requests or HTTP.

A seat is taken by the first event or scrape that meets an adapter, while there are free ones, and given back at the
first scrape that finds it on no tier and in no sequence. What happens to an adapter without a seat is counted under
`other` for good, so that no total ever falls; an adapter that comes back goes on from the total that it had.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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


class AdapterSeries(Collector):
    """Counts events by adapter, and publishes them with what `watch` reads. Safe for many threads."""

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self._lock = threading.Lock()
        self._seated: set[str] = set()
        self._totals = {OTHER: _Totals(), UNKNOWN: _Totals()}
        self._read: Callable[[], Sequence[AdapterState]] = tuple
        self._is_known: Callable[[str], bool] = lambda name: False

    def watch(self, read: Callable[[], Sequence[AdapterState]], is_known: Callable[[str], bool]) -> None:
        """`read` gives one state for each adapter that is loaded or in use, `is_known` whether a name still exists."""
        self._read, self._is_known = read, is_known

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

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not read a state that may not be there yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        states = self._read()
        with self._lock:
            self._reseat(states)
            own = [state for state in states if state.name in self._seated]
            rest = [state for state in states if state.name not in self._seated]
            totals = [(state.name, self._totals.get(state.name, _Totals())) for state in own]
            totals.append((OTHER, self._totals[OTHER]))
            counters = [*_counters(totals, self._totals[UNKNOWN].num_sequences)]
        return iter([*_gauges(own, rest), *counters])

    def _reseat(self, states: Sequence[AdapterState]) -> None:
        """Under the lock: those that have gone give their seats to those that stand, what is on the device first."""
        self._seated &= {state.name for state in states}
        for state in sorted(states, key=_standing):
            if state.name not in self._seated and not self._seat(state.name) and not self._has_free_seat():
                break
        gone = [name for name in self._totals if name not in self._seated and not self._stays(name)]
        for name in gone:
            del self._totals[name]

    def _has_free_seat(self) -> bool:
        return len(self._seated) < self.max_adapters

    def _stays(self, name: str) -> bool:
        return name in (OTHER, UNKNOWN) or self._is_known(name)


def _standing(state: AdapterState) -> tuple[bool, bool, bool, str]:
    return (state.device_bytes is None, not (state.num_running or state.num_waiting), not state.is_pinned, state.name)


def _gauges(own: Collection[AdapterState], rest: Collection[AdapterState]) -> Iterator[Metric]:
    loaded, taken, running, waiting = (
        GaugeMetricFamily(family.name, family.text, labels=family.labels)
        for family in (_LOADED, _BYTES, _RUNNING, _WAITING)
    )
    for state in own:
        rank, pinned = "" if state.rank is None else str(state.rank), str(state.is_pinned).lower()
        for tier, num_bytes in (("host", state.host_bytes), ("device", state.device_bytes)):
            if num_bytes is not None:
                loaded.add_metric((state.name, tier, state.method, rank, pinned), 1)
                taken.add_metric((state.name, tier), num_bytes)
        if state.num_running or state.num_waiting:
            running.add_metric((state.name,), state.num_running)
            waiting.add_metric((state.name,), state.num_waiting)
    if rest:
        on_host = [state.host_bytes for state in rest if state.host_bytes is not None]
        on_device = [state.device_bytes for state in rest if state.device_bytes is not None]
        for tier, sizes in (("host", on_host), ("device", on_device)):
            loaded.add_metric((OTHER, tier, "", "", ""), len(sizes))
            taken.add_metric((OTHER, tier), sum(sizes))
        running.add_metric((OTHER,), sum(state.num_running for state in rest))
        waiting.add_metric((OTHER,), sum(state.num_waiting for state in rest))
    yield from (loaded, taken, running, waiting)


def _counters(totals: Sequence[tuple[str, _Totals]], num_unknown: int) -> Iterator[Metric]:
    sequences, failures, prompts, outputs = (
        CounterMetricFamily(family.name, family.text, labels=family.labels)
        for family in (_SEQUENCES, _FAILURES, _PROMPT_TOKENS, _OUTPUT_TOKENS)
    )
    for name, total in totals:
        sequences.add_metric((name,), total.num_sequences)
        failures.add_metric((name,), total.num_failures)
        prompts.add_metric((name,), total.num_prompt_tokens)
        outputs.add_metric((name,), total.num_output_tokens)
    sequences.add_metric((UNKNOWN,), num_unknown)
    yield from (sequences, failures, prompts, outputs)
