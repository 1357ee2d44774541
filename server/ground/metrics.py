"""The metrics of one server: where events are counted, and what a scrape is answered with.

Owns one CollectorRegistry per server, with a metric for each of `families`. What is an event is observed where it
happens (`count_*`, `observe_*`). What is a state is read at scrape time, so that it can never be stale: through `watch`
and, where it belongs together, `look_at`. Knows nothing about HTTP, engines or adapters.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.ground.adapter_series import AdapterSeries, AdapterState
from server.ground.exposition import exposition
from server.ground.families import FAMILIES, OTHER_PROCESS, Family, Side
from server.ground.heap import without_collections

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that says when it was made: nobody asks
MAX_ADAPTERS = 500  # with series of their own, where nobody says

# A watched metric's value or, where it has labels, one for each of their values.
Watched = float | Mapping[tuple[str, ...], float]


class Moment(NamedTuple):
    """What a scrape is told of the server's state."""

    values: Mapping[str, Watched] = {}  # by name, of families that are watched
    adapters: Sequence[AdapterState] = ()  # one for each that is loaded or in use
    gone: Collection[str] = ()  # of the names that were asked about: those that no adapter has any more
    families: Sequence[Metric] = ()  # that another process has collected


class Step(Protocol):
    """What is told of one step of the engine."""

    @property
    def num_sequences(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_adapters(self) -> int: ...
    @property
    def num_methods(self) -> int: ...
    @property
    def duration_s(self) -> float: ...


class Metrics:
    """The metrics of one server. All methods are safe from any thread."""

    def __init__(
        self,
        max_adapters: int = MAX_ADAPTERS,
        also: Callable[[Iterable[Metric], Sequence[AdapterState]], str] = lambda families, adapters: "",
        side: Side | None = None,
    ) -> None:
        """At most `max_adapters` adapters have series of their own. `also` writes further metrics, made of all others
        and of those adapters. `side`: whose events are observed here, where there is a process for each."""
        self.registry = CollectorRegistry()
        self._also = also
        self._counters = {family.name: self._counter(family) for family in _events("counter", side)}
        self._histograms = {family.name: self._histogram(family) for family in _events("histogram", side)}
        self.adapters = AdapterSeries(max_adapters)
        self._look: Callable[[Collection[str]], Moment] = lambda names: Moment()
        if side != "engine":
            ProcessCollector(registry=self.registry)

    def _counter(self, family: Family) -> Counter:
        counter = Counter(family.name, family.text, family.labels, registry=self.registry)
        for value in family.values:
            counter.labels(value)
        return counter

    def _histogram(self, family: Family) -> Histogram:
        labels, buckets = family.labels, family.buckets
        histogram = Histogram(family.name, family.text, labels, buckets=buckets, registry=self.registry)
        for value in family.values:
            histogram.labels(value)
        return histogram

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    # Requests

    def observe_request(self, route: str, status: int, duration_s: float) -> None:
        """One HTTP answer. `route` is the template ("/v1/adapters/{name}"), never the path that was sent."""
        self._counters["graft_requests_total"].labels(route, str(status)).inc()
        self._histograms["graft_request_seconds"].labels(route).observe(duration_s)

    def count_rejection(self, reason: str) -> None:
        """`reason` is an error's, of a closed set."""
        self._counters["graft_rejections_total"].labels(reason).inc()

    def count_broken_answer(self, reason: str) -> None:
        """As a rejection's `reason`, of an answer that failed when its status was out."""
        self._counters["graft_broken_answers_total"].labels(reason).inc()

    # Sequences

    def observe_first_token(self, wait_s: float, queue_s: float) -> None:
        """`wait_s` after a sequence's submission, of which `queue_s` before its first step."""
        self._observe("graft_time_to_first_token_seconds", wait_s)
        self._observe("graft_sequence_queue_seconds", queue_s)
        self._observe("graft_sequence_prefill_seconds", max(wait_s - queue_s, 0.0))

    def observe_next_tokens(self, num_tokens: int, wait_s: float) -> None:
        """`num_tokens` that came together, `wait_s` after the ones before: each counts with its share of the wait."""
        for _ in range(num_tokens):
            self._observe("graft_inter_token_latency_seconds", wait_s / num_tokens)

    def observe_finished(self, num_prompt_tokens: int, num_output_tokens: int, whole_s: float, queue_s: float) -> None:
        """A sequence that ended by a stop or its length, `whole_s` after its submission."""
        self._observe("graft_sequence_seconds", whole_s)
        self._observe("graft_sequence_inference_seconds", max(whole_s - queue_s, 0.0))
        self._observe("graft_sequence_prompt_tokens", num_prompt_tokens)
        self._observe("graft_sequence_output_tokens", num_output_tokens)

    def observe_decode(self, num_tokens: int, decode_s: float) -> None:
        """A sequence that ended `decode_s` after its first token, with `num_tokens` in all."""
        self._observe("graft_sequence_decode_seconds", decode_s)
        if num_tokens > 1:
            self._observe("graft_time_per_output_token_seconds", decode_s / (num_tokens - 1))

    def count_output_tokens(self, num_tokens: int) -> None:
        self._counters["graft_output_tokens_total"].inc(num_tokens)

    def count_prompt(self, num_tokens: int, num_cached: int) -> None:
        """A prefill has ended; `num_cached` of the prompt's tokens were found and not computed."""
        self._counters["graft_prompt_tokens_total"].inc(num_tokens)
        self._counters["graft_prompt_tokens_cached_total"].inc(num_cached)

    def count_finished(self, finish_reason: str) -> None:
        self._counters["graft_sequences_finished_total"].labels(finish_reason).inc()

    # Adapters

    def count_fetch(self, outcome: str) -> None:
        """`outcome` is "done", "failed" or "cancelled"."""
        self._counters["graft_adapter_fetches_total"].labels(outcome).inc()

    def count_fetched_bytes(self, num_bytes: int) -> None:
        self._counters["graft_adapter_fetched_bytes_total"].inc(num_bytes)

    def count_upload(self, result: str) -> None:
        """`result` is "stored", "unchanged", "rejected", "failed" or "abandoned"."""
        self._counters["graft_uploads_total"].labels(result).inc()

    def count_merge(self, result: str, duration_s: float) -> None:
        """As an upload's `result`; the duration of one that was stored is observed."""
        self._counters["graft_merges_total"].labels(result).inc()
        if result == "stored":
            self._observe("graft_merge_seconds", duration_s)

    def observe_load(self, transition: str, duration_s: float) -> None:
        """An adapter went from "store_to_host" or from "host_to_device"."""
        self._histograms["graft_adapter_load_seconds"].labels(transition).observe(duration_s)

    # The engine

    def step(self, report: Step) -> None:
        """The composition of one step's batch; called by the engine's thread."""
        self._observe("graft_step_seconds", report.duration_s)
        self._observe("graft_step_sequences", report.num_sequences)
        self._observe("graft_step_tokens", report.num_tokens)
        self._observe("graft_step_adapters", report.num_adapters)
        self._observe("graft_step_methods", report.num_methods)

    # Scrapes

    def watch(self, read: Callable[[], Mapping[str, Watched]]) -> None:
        """Publish state: `read` gives values by name, of families that are watched, and is called at each scrape."""
        self.registry.register(_StateCollector(read))

    def look_at(self, look: Callable[[Collection[str]], Moment]) -> None:
        """Publish what `look` tells: it is called once at each scrape, with the adapters' names that are counted."""
        self._look = look

    def include(self, pid: Callable[[], int]) -> None:
        """Publish the figures of another process."""
        ProcessCollector(namespace=OTHER_PROCESS, pid=pid, registry=self.registry)

    def collected(self) -> list[Metric]:
        """What another process publishes as a moment's `families`: all but that of `look_at`."""
        return list(self.registry.collect())

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        with without_collections():
            moment = self._look(self.adapters.names())
            families = [*self.registry.collect(), *_families(moment.values), *moment.families]
            adapters = self.adapters.shown(moment.adapters, moment.gone)
            return (exposition(families) + adapters.text + self._also(families, adapters.own)).encode()


def _events(kind: str, side: Side | None) -> Iterator[Family]:
    events = (family for family in FAMILIES.values() if family.kind == kind and not family.is_watched)
    return (family for family in events if side in (None, family.side))


def _families(values: Mapping[str, Watched]) -> Iterator[Metric]:
    for name, value in values.items():
        family = FAMILIES[name]
        made: Metric
        made = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(
            name, family.text, labels=family.labels
        )
        for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
            made.add_metric(labels, number)
        yield made


class _StateCollector(Collector):
    def __init__(self, read: Callable[[], Mapping[str, Watched]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        return _families(self._read())

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not read the state, which may not be there yet."""
        return iter(())
