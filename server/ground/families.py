"""Every Prometheus metric of the server by name: its kind, its labels, its buckets, and what it tells.

Owns these definitions, in the order of docs/metrics.md, which is written from them. Knows nothing about who counts.

Labels come from closed sets (route templates, codes, reasons), never from what a request says; the one exception,
`adapter`, is bounded by `adapter_series`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Side = Literal["http", "engine"]

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_LONG_S = (0.005, 0.025, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 480)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

RESULTS = ("stored", "unchanged", "rejected", "failed", "abandoned")  # of an upload or a merge
_OUTCOMES = ("done", "failed", "cancelled")
_BROKEN_OFF = (
    "adapter_overflow",
    "engine_dead",
    "generation_failed",
    "internal_error",
    "out_of_memory",
    "overloaded",
    "request_timeout",
)
_FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `is_watched`: a state that is read at each scrape; else an event that is counted where it happens."""

    name: str  # as it is scraped: a counter's ends in _total
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # of a histogram
    is_watched: bool = False
    values: tuple[str, ...] = ()  # of its only label: each is there from the start, so that its first event is a rise
    side: Side = "http"  # of an event: where it happens, if the engine has a process of its own


def _counter(name: str, text: str, *labels: str, values: tuple[str, ...] = (), side: Side = "http") -> Family:
    return Family(name, "counter", text, labels, values=values, side=side)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...],
    *labels: str,
    values: tuple[str, ...] = (),
    side: Side = "http",
) -> Family:
    return Family(name, "histogram", text, labels, buckets, values=values, side=side)


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(name, "gauge", text, labels, is_watched=True)


def _total(name: str, text: str, *labels: str) -> Family:
    """A counter that the engine or the registry keeps itself."""
    return Family(name, "counter", text, labels, is_watched=True)


REQUESTS = (
    _counter("graft_requests_total", "HTTP requests answered.", "route", "status"),
    _histogram("graft_request_seconds", "From the request line to the last byte of the answer.", _LONG_S, "route"),
    _counter(
        "graft_rejections_total",
        "Requests answered with an error, by its code; a full server's by what is full.",
        "reason",
    ),
    _counter(
        "graft_broken_answers_total",
        "Streams that ended in an error event, after their status 200; by its code, these and rarer ones.",
        "reason",
        values=_BROKEN_OFF,
    ),
)

SEQUENCES = (
    _gauge("graft_sequences_running", "Sequences that take part in steps now."),
    _gauge("graft_sequences_waiting", "Accepted sequences that no step has taken yet, and preempted ones."),
    _gauge("graft_sequences_short_of_room", "Those of them whose adapter finds no room on the device."),
    _counter("graft_sequences_finished_total", "Sequences that ended.", "finish_reason", values=_FINISH_REASONS),
    _total(
        "graft_sequences_overflowed_total",
        "Sequences that ended because the output overflowed: no token could be chosen.",
    ),
    _counter(
        "graft_prompt_tokens_total",
        "Prompt tokens, counted when a sequence's prefill ends: those found in the KV cache, too.",
    ),
    _counter("graft_prompt_tokens_cached_total", "Those of them that were found in the KV cache, and not computed."),
    _counter("graft_output_tokens_total", "Tokens generated."),
    _histogram("graft_time_to_first_token_seconds", "From submission to a sequence's first token.", _FIRST_TOKEN_S),
    _histogram("graft_inter_token_latency_seconds", "Between two tokens of one sequence.", _SHORT_S),
    _histogram(
        "graft_time_per_output_token_seconds",
        "Mean over a finished sequence's tokens after its first.",
        _SHORT_S,
    ),
    _histogram("graft_sequence_queue_seconds", "From submission to a sequence's first step.", _FIRST_TOKEN_S),
    _histogram("graft_sequence_prefill_seconds", "From its first step to its first token.", _FIRST_TOKEN_S),
    _histogram("graft_sequence_decode_seconds", "From its first token to its end, if it finished.", _LONG_S),
    _histogram("graft_sequence_inference_seconds", "From its first step to its end, if it finished.", _LONG_S),
    _histogram("graft_sequence_seconds", "From submission to its end, if it finished.", _LONG_S),
    _histogram("graft_sequence_prompt_tokens", "Prompt tokens of a finished sequence.", _TOKENS),
    _histogram("graft_sequence_output_tokens", "Tokens that a finished sequence generated.", _TOKENS),
)

STEPS = (
    _total("graft_steps_total", "Steps that the engine has run."),
    _total("graft_steps_shed_total", "Steps that ran out of memory and were taken back, to be tried again smaller."),
    _histogram("graft_step_seconds", "Duration of one step.", _SHORT_S, side="engine"),
    _histogram("graft_step_sequences", "Sequences in one step.", _STEP_COUNTS, side="engine"),
    _histogram("graft_step_tokens", "Tokens in one step.", _STEP_TOKENS, side="engine"),
    _histogram(
        "graft_step_adapters",
        "Distinct adapters in one step, the base not counted.",
        (0, *_STEP_COUNTS),
        side="engine",
    ),
    _histogram(
        "graft_step_methods",
        "Distinct methods of the adapters in one step.",
        (0, *range(1, 9), 16, 32),
        side="engine",
    ),
    _total(
        "graft_preemptions_total",
        "Sequences set back to waiting because blocks ran out or another adapter had its turn.",
    ),
)

KV_CACHE = (
    _gauge("graft_kv_blocks", "Blocks of the KV cache in all."),
    _gauge("graft_kv_blocks_used", "Blocks in use."),
    _gauge("graft_kv_blocks_kept", "Free blocks whose content can still be found."),
    _gauge("graft_kv_usage_ratio", "Used share of the KV cache, 0 to 1."),
    _gauge("graft_kv_cache_info", "1; tokens in a block, and blocks, as labels.", "block_size", "num_blocks"),
    _total(
        "graft_prefix_cache_queries_total",
        "Tokens of sequences that were looked up in the KV cache when they first ran.",
    ),
    _total("graft_prefix_cache_hits_total", "Tokens of sequences that were found there, and not computed."),
)

ADAPTERS = (
    _gauge("graft_adapters", "Adapters that the server has."),
    _gauge("graft_adapters_on_host", "Adapter versions, and mixes of them, whose edits lie in host memory."),
    _gauge("graft_adapters_resident", "Adapter versions, and mixes of them, on the device."),
    _gauge(
        "graft_adapter_places",
        "Adapters on the device, and how many more have room, at the mean size of those that are known.",
    ),
    _gauge("graft_adapters_loading", "Adapter versions on their way from the store to host memory."),
    _gauge("graft_adapters_pinned", "Adapter versions that may leave neither host memory nor the device."),
    _gauge(
        "graft_adapters_quarantined",
        "Versions and mixes that are served to nobody, because the output overflowed with them too often.",
    ),
    _gauge(
        "graft_adapter_leases",
        "Holds of requests on adapter versions; a request for a mix holds each of its adapters.",
    ),
    _total(
        "graft_adapter_lookups_total",
        "Sequences by the best tier that had their adapter when they were asked for: store, host or device.",
        "tier",
    ),
    _total("graft_adapter_loads_total", "Adapters brought from the store to host memory."),
    _total("graft_adapter_load_failures_total", "Adapters that could not be brought to host memory."),
    _total("graft_adapter_promotions_total", "Adapters brought from host memory to the device."),
    _histogram(
        "graft_adapter_load_seconds",
        "Moves of adapters that succeeded: store_to_host or host_to_device.",
        _SHORT_S,
        "transition",
        values=("store_to_host", "host_to_device"),
        side="engine",
    ),
    _total(
        "graft_adapter_overflows_total", "Steps in which the output with an adapter overflowed, each adapter counted."
    ),
    _total("graft_adapter_unloads_total", "Adapters taken off the device and out of host memory by request."),
    _total("graft_adapter_device_evictions_total", "Adapters dropped from the device to make room."),
    _total("graft_adapter_host_evictions_total", "Adapters dropped from host memory to make room."),
    _total(
        "graft_adapter_rotations_total",
        "Adapters whose sequences were set back because another had waited for room as long as it may.",
    ),
)

EACH_ADAPTER = (
    _gauge(
        "graft_adapter_loaded",
        "1 on each tier (host, device) that has the adapter; of `other` their number.",
        "adapter",
        "tier",
        "method",
        "rank",
        "pinned",
    ),
    _gauge(
        "graft_adapter_bytes",
        "Bytes that it takes on a tier, tensors that it shares counted in full.",
        "adapter",
        "tier",
    ),
    _gauge(
        "graft_adapter_sequences_running", "Its sequences that take part in steps now, where it is in use.", "adapter"
    ),
    _gauge("graft_adapter_sequences_waiting", "Its accepted sequences that wait, where it is in use.", "adapter"),
    _total("graft_adapter_sequences_total", "Sequences that were asked of it.", "adapter"),
    _total("graft_adapter_failures_total", "Sequences of it that ended in an error.", "adapter"),
    _total(
        "graft_adapter_prompt_tokens_total",
        "Prompt tokens of its sequences, counted when their prefill ends.",
        "adapter",
    ),
    _total("graft_adapter_output_tokens_total", "Tokens generated with it.", "adapter"),
)

ARRIVALS = (
    _counter("graft_uploads_total", "Uploads that ended, by how.", "result", values=RESULTS),
    _counter("graft_merges_total", "Merges that ended, by how.", "result", values=RESULTS),
    _histogram("graft_merge_seconds", "Merges that were stored, their wait included.", _LONG_S),
    _counter(
        "graft_adapter_fetches_total",
        "Fetches from a source that ended, by how.",
        "outcome",
        values=_OUTCOMES,
        side="engine",
    ),
    _counter(
        "graft_adapter_fetched_bytes_total",
        "Bytes fetched from sources, those of failed fetches counted.",
        side="engine",
    ),
    _gauge("graft_adapter_fetches_running", "Adapters being fetched from a source."),
    _gauge("graft_adapter_fetches_waiting", "Adapters that wait to be fetched."),
)

MEMORY = (
    _gauge("graft_store_bytes", "What the adapters in the store take, all versions."),
    _gauge("graft_store_quota_bytes", "What they may take (--store-quota); 0 for no limit."),
    _gauge("graft_adapter_host_bytes", "Host memory that adapters take."),
    _gauge("graft_adapter_host_capacity_bytes", "Host memory that adapters may take (--host-memory)."),
    _gauge("graft_adapter_device_bytes", "Device memory that adapters take."),
    _gauge("graft_adapter_device_capacity_bytes", "Device memory that adapters may take (--adapter-memory)."),
    _gauge(
        "graft_adapter_copied_bytes",
        "Device memory, beside that, of the copies of ops' tensors that are kept from step to step.",
    ),
    _gauge("graft_rank_rows", "Rank rows of the device's adapter memory in use."),
    _gauge("graft_rank_rows_shared", "Those of them that serve in more than one place."),
    _gauge("graft_rank_row_uses", "Rows that there would be if each place had its own."),
    _gauge("graft_base_bytes", "Memory that the base's weights take."),
    _gauge("graft_kv_cache_bytes", "Memory that the KV cache takes, used or not."),
    _gauge("graft_device_memory_bytes", "Memory of the device that computes; a CPU's is the machine's."),
    _gauge("graft_device_memory_free_bytes", "What of it can still be taken, by any process."),
)

SERVER = (
    _gauge("graft_engine_up", "1 while the engine's thread lives."),
    _gauge("graft_draining", "1 while the server turns new requests away because it is going down."),
    _gauge("graft_build_info", "1; the server's version as a label.", "version"),
    _gauge("graft_base_info", "1; the base as labels.", "model", "quantization", "dtype", "device"),
)

# Before `process_...`, the Python client's figures of a process: of the engine's, where it has one of its own.
OTHER_PROCESS = "graft_engine"

SECTIONS: Mapping[str, tuple[Family, ...]] = {
    "Requests": REQUESTS,
    "Sequences and tokens": SEQUENCES,
    "Steps of the engine": STEPS,
    "KV cache": KV_CACHE,
    "Adapters": ADAPTERS,
    "Each adapter": EACH_ADAPTER,
    "Uploads, merges, fetches": ARRIVALS,
    "Memory": MEMORY,
    "The server": SERVER,
}
FAMILIES: Mapping[str, Family] = {family.name: family for section in SECTIONS.values() for family in section}
