"""Every Prometheus metric of the server: its name, its help, its labels, its buckets.

Owns the definitions and one CollectorRegistry per server. What is an event is observed where it happens (`count_*`,
`observe_*`); what is a state is read at scrape time through `watch`, so that it can never be stale. Labels come from
closed sets (route templates, status codes, finish reasons), never from request strings. Knows nothing about HTTP,
engines or adapters.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that says when it was made: nobody asks
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# State that the engine and the registry keep themselves: read when Prometheus asks.
GAUGES: Mapping[str, str] = {
    "graft_sequences_running": "Sequences that take part in steps now.",
    "graft_sequences_waiting": "Accepted sequences that no step has taken yet.",
    "graft_kv_blocks_used": "Blocks of the KV cache in use.",
    "graft_kv_blocks": "Blocks of the KV cache in all.",
    "graft_kv_usage_ratio": "Used share of the KV cache, 0 to 1.",
    "graft_adapters": "Adapters that the server has.",
    "graft_adapters_on_host": "Adapter versions whose edits lie in host memory.",
    "graft_adapters_resident": "Adapter versions on the device.",
    "graft_adapters_loading": "Adapter versions on their way from the store to host memory.",
    "graft_adapters_pinned": "Adapter versions that may leave neither host memory nor the device.",
    "graft_adapters_quarantined": "Adapter versions and mixes not served, as the output overflowed too often.",
    "graft_store_bytes": "What the adapters in the store take, all versions.",
    "graft_store_quota_bytes": "What they may take (--store-quota); 0 for no limit.",
    "graft_adapter_host_bytes": "Host memory that adapters take.",
    "graft_adapter_device_bytes": "Device memory that adapters take.",
    "graft_adapter_device_capacity_bytes": "Device memory that adapters may take.",
    "graft_adapter_copied_bytes": "Device memory beside that for copies kept from step to step.",
    "graft_adapter_leases": "Holds of requests on adapter versions.",
    "graft_adapter_fetches_running": "Adapters being fetched from a source.",
    "graft_adapter_fetches_waiting": "Adapters that wait to be fetched.",
}
TOTALS: Mapping[str, str] = {
    "graft_preemptions_total": "Sequences set back to waiting because blocks ran out or another adapter had its turn.",
    "graft_steps_shed_total": "Steps that ran out of memory and were taken back, to be tried again smaller.",
    "graft_prefix_cache_queries_total": "Tokens of sequences that were looked up in the KV cache when they first ran.",
    "graft_prefix_cache_hits_total": "Tokens of sequences that were found there, and not computed.",
    "graft_steps_total": "Steps that the engine has run.",
    "graft_adapter_loads_total": "Adapters brought from the store to host memory.",
    "graft_adapter_load_failures_total": "Adapters that could not be brought to host memory.",
    "graft_adapter_promotions_total": "Adapters brought from host memory to the device.",
    "graft_adapter_overflows_total": "Steps in which the output with an adapter overflowed, each adapter counted.",
    "graft_adapter_unloads_total": "Adapters taken off the device and out of host memory by request.",
    "graft_adapter_device_evictions_total": "Adapters dropped from the device to make room.",
    "graft_adapter_host_evictions_total": "Adapters dropped from host memory to make room.",
    "graft_adapter_rotations_total": "Adapters whose sequences were set back because another had waited for room.",
}

_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_REQUEST_S = (0.005, 0.025, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 480)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Step(Protocol):
    """What is told of one step of the engine."""

    @property
    def num_sequences(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_adapters(self) -> int: ...
    @property
    def duration_s(self) -> float: ...


class Metrics:
    """The metrics of one server. All methods are safe from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("graft_requests", "HTTP requests answered.", ("route", "status"))
        self._request_s = self._histogram(
            "graft_request_seconds", "From the request line to the last byte of the answer.", _REQUEST_S, ("route",)
        )
        self._finished = self._counter("graft_sequences_finished", "Sequences that ended.", ("finish_reason",))
        self._prompt_tokens = self._counter("graft_prompt_tokens", "Prompt tokens of sequences that ended.")
        self._output_tokens = self._counter("graft_output_tokens", "Tokens generated.")
        self._first_token_s = self._histogram(
            "graft_time_to_first_token_seconds", "From submission to a sequence's first token.", _FIRST_TOKEN_S
        )
        self._next_token_s = self._histogram(
            "graft_inter_token_latency_seconds", "Between two tokens of one sequence.", _NEXT_TOKEN_S
        )
        self._step_s = self._histogram("graft_step_seconds", "Duration of one step.", _NEXT_TOKEN_S)
        self._step_sequences = self._histogram("graft_step_sequences", "Sequences in one step.", _STEP_COUNTS)
        self._step_tokens = self._histogram("graft_step_tokens", "Tokens in one step.", _STEP_TOKENS)
        self._step_adapters = self._histogram(
            "graft_step_adapters", "Distinct adapters in one step, the base not counted.", (0, *_STEP_COUNTS)
        )

        self._fetches = self._counter("graft_adapter_fetches", "Fetches from a source that ended.", ("outcome",))
        self._fetched_bytes = self._counter("graft_adapter_fetched_bytes", "Bytes fetched from sources.")

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def observe_request(self, route: str, status: int, duration_s: float) -> None:
        """One HTTP answer. `route` is the template ("/v1/adapters/{name}"), never the path that was sent."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(duration_s)

    def observe_first_token(self, wait_s: float) -> None:
        self._first_token_s.observe(wait_s)

    def observe_next_tokens(self, num_tokens: int, wait_s: float) -> None:
        """`num_tokens` that came together, `wait_s` after the ones before: each counts with its share of the wait."""
        for _ in range(num_tokens):
            self._next_token_s.observe(wait_s / num_tokens)

    def count_output_tokens(self, num_tokens: int) -> None:
        self._output_tokens.inc(num_tokens)

    def count_finished(self, finish_reason: str, num_prompt_tokens: int) -> None:
        self._finished.labels(finish_reason).inc()
        self._prompt_tokens.inc(num_prompt_tokens)

    def count_fetch(self, outcome: str) -> None:
        """`outcome` is "done", "failed" or "cancelled"."""
        self._fetches.labels(outcome).inc()

    def count_fetched_bytes(self, num_bytes: int) -> None:
        self._fetched_bytes.inc(num_bytes)

    def step(self, report: Step) -> None:
        """The composition of one step's batch; called by the engine's thread."""
        self._step_s.observe(report.duration_s)
        self._step_sequences.observe(report.num_sequences)
        self._step_tokens.observe(report.num_tokens)
        self._step_adapters.observe(report.num_adapters)

    def watch(self, read: Callable[[], Mapping[str, float]]) -> None:
        """Publish state: `read` gives values by metric name (of GAUGES and TOTALS) and is called at each scrape."""
        self.registry.register(_StateCollector(read))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)


class _StateCollector(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            if name in GAUGES:
                yield GaugeMetricFamily(name, GAUGES[name], value=value)
            else:
                yield CounterMetricFamily(name, TOTALS[name], value=value)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not read the state, which may not be there yet."""
        return iter(())
