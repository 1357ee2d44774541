"""The names under which gateways and dashboards that know vLLM ask for what this server measures (`vllm:...`).

Owns which of our metrics each of them is, and the metrics of adapters in vLLM's form. Nothing is counted twice: these
are made of ours at each scrape, with our buckets. Knows nothing about who counts.

The names are those of vLLM 0.33. Of adapters they are those that llm-d's router reads: `vllm:lora_requests_info`, which
the Gateway API Inference Extension's model server protocol defines, and the series of each loaded adapter that vLLM's
issue 51433 and llm-d-router's `lora-load-state-scorer` agree on. vLLM's own `lora_requests_info` has a series for every
combination of adapters that ever had requests; here it is one, and its adapters are those on the device.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from server.ground.adapter_series import AdapterState
from server.ground.exposition import Kept, exposition, head, line

# By our name: vLLM's, as it is scraped.
SAME: Mapping[str, str] = {
    "graft_sequences_running": "vllm:num_requests_running",
    "graft_sequences_waiting": "vllm:num_requests_waiting",
    "graft_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "graft_kv_cache_info": "vllm:cache_config_info",
    "graft_prompt_tokens_total": "vllm:prompt_tokens_total",
    "graft_prompt_tokens_cached_total": "vllm:prompt_tokens_cached_total",
    "graft_output_tokens_total": "vllm:generation_tokens_total",
    "graft_sequences_finished_total": "vllm:request_success_total",
    "graft_sequences_overflowed_total": "vllm:corrupted_requests_total",
    "graft_preemptions_total": "vllm:num_preemptions_total",
    "graft_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
    "graft_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
    "graft_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "graft_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "graft_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "graft_sequence_seconds": "vllm:e2e_request_latency_seconds",
    "graft_sequence_queue_seconds": "vllm:request_queue_time_seconds",
    "graft_sequence_inference_seconds": "vllm:request_inference_time_seconds",
    "graft_sequence_prefill_seconds": "vllm:request_prefill_time_seconds",
    "graft_sequence_decode_seconds": "vllm:request_decode_time_seconds",
    "graft_sequence_prompt_tokens": "vllm:request_prompt_tokens",
    "graft_sequence_output_tokens": "vllm:request_generation_tokens",
    "graft_step_tokens": "vllm:iteration_tokens_total",
    "graft_adapters_resident": "vllm:num_gpu_loaded_lora_adapters",
    "graft_adapters_on_host": "vllm:num_cpu_loaded_lora_adapters",
    "graft_adapter_places": "vllm:max_gpu_lora_adapters",
    "graft_adapter_load_seconds": "vllm:lora_adapter_load_seconds",
}
WAITING_BY_REASON, BY_SOURCE = "vllm:num_requests_waiting_by_reason", "vllm:prompt_tokens_by_source_total"
REJECTIONS = "vllm:admission_rejections_total"
ADMISSION_REASONS = ("queue_full", "queue_timeout")  # of our rejections: what the queue turned away
LOADED, REQUESTS_INFO = "vllm:lora_adapter_loaded", "vllm:lora_requests_info"
_LABELS = {"finish_reason": "finished_reason", "num_blocks": "num_gpu_blocks"}


class VllmNames:
    """vLLM's metrics, made of ours."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.time) -> None:
        """`model_name` is their label; `clock` gives Unix time."""
        self._own = {"model_name": model_name, "engine": "0"}
        self._clock = clock
        self._loaded = Kept(self._loaded_lines)

    def __call__(self, families: Iterable[Metric], adapters: Sequence[AdapterState]) -> str:
        """In Prometheus' text format; `adapters`: those that have series of their own."""
        ours = {f"{one.name}_total" if one.type == "counter" else one.name: one for one in families}
        same = exposition(_renamed(ours[name], theirs, self._own) for name, theirs in SAME.items() if name in ours)
        same += self._split(_Values(ours))
        (loaded,) = self._loaded.columns(adapters, ("",))
        told = "1 for each adapter that is loaded; the level is the best that has it."
        return same + head(LOADED, "gauge", told) + loaded + _requests_info(ours, adapters, self._clock())

    def _split(self, ours: "_Values") -> str:
        """What vLLM tells by a label that ours do not have."""
        num_short, num_cached = ours("graft_sequences_short_of_room"), ours("graft_prompt_tokens_cached_total")
        waiting = {"capacity": ours("graft_sequences_waiting") - num_short, "deferred": num_short}
        sources = {"local_compute": ours("graft_prompt_tokens_total") - num_cached, "local_cache_hit": num_cached}
        rejections = {reason: ours("graft_rejections_total", reason=reason) for reason in ADMISSION_REASONS}
        model = {"model_name": self._own["model_name"]}  # as vLLM, without an engine
        return (
            _by(
                WAITING_BY_REASON,
                "gauge",
                "Waiting sequences: for a seat, or for their adapter.",
                "reason",
                waiting,
                self._own,
            )
            + _by(
                BY_SOURCE, "counter", "Prompt tokens: computed, or found in the KV cache.", "source", sources, self._own
            )
            + _by(REJECTIONS, "counter", "Requests that the queue turned away.", "reason", rejections, model)
        )

    def _loaded_lines(self, adapter: AdapterState) -> tuple[str]:
        """One series for each adapter on host or device, at the better of the two."""
        if adapter.host_bytes is None and adapter.device_bytes is None:
            return ("",)
        labels = {
            "adapter_name": adapter.name,
            "level": "cpu" if adapter.device_bytes is None else "gpu",
            "pinned": str(adapter.is_pinned).lower(),
            "rank": "" if adapter.rank is None else str(adapter.rank),
        }
        return (line(LOADED, self._own | labels, 1),)


class _Values:
    """Of our metrics at this scrape."""

    def __init__(self, ours: Mapping[str, Metric]) -> None:
        self._ours = ours

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over the series of a metric that have these labels; 0 where there are none yet."""
        samples = self._ours[name].samples if name in self._ours else ()
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def _by(name: str, kind: str, told: str, label: str, values: Mapping[str, float], own: Mapping[str, str]) -> str:
    return head(name, kind, told) + "".join(line(name, {**own, label: one}, number) for one, number in values.items())


def _renamed(family: Metric, name: str, own: dict[str, str]) -> Metric:
    # A counter's family has no _total, and a histogram of vLLM's is called so.
    bare = name.removesuffix("_total") if family.type == "counter" else name
    renamed = Metric(bare, family.documentation, family.type)
    for sample in family.samples:
        labels = own | {_LABELS.get(label, label): value for label, value in sample.labels.items()}
        renamed.samples.append(Sample(bare + sample.name.removeprefix(family.name), labels, sample.value))
    return renamed


def _requests_info(ours: Mapping[str, Metric], adapters: Sequence[AdapterState], now_s: float) -> str:
    """One series: the adapters on the device, those that are waited for, and how many the device may hold."""
    on_device = {adapter.name for adapter in adapters if adapter.device_bytes is not None}
    waiting = {adapter.name for adapter in adapters if adapter.num_waiting} - on_device
    places = ours["graft_adapter_places"].samples[0].value if "graft_adapter_places" in ours else len(on_device)
    labels = {
        "max_lora": str(int(places)),
        "running_lora_adapters": ",".join(sorted(on_device)),
        "waiting_lora_adapters": ",".join(sorted(waiting)),
    }
    told = "Unix time of this scrape; the adapters on the device, and those to come."
    return head(REQUESTS_INFO, "gauge", told) + line(REQUESTS_INFO, labels, now_s)
