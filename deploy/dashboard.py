"""The Grafana dashboard: rows of panels, each with its queries; `python -m deploy.dashboard` writes dashboard.json.

Owns what is drawn and where. Knows nothing about how Prometheus is reached. `tests/deploy` holds the file to this, each
query to the metrics of a live server, and has a real Prometheus answer all of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "grafana" / "dashboard.json"
_WIDTH, _HEIGHT = 24, 8  # of Grafana's grid, and of a panel in it
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_ON = 'instance=~"$instance"'


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and how each of its series is called: Grafana fills in `{{label}}`."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str  # as Grafana calls it
    queries: tuple[Query, ...]
    is_stacked: bool = False


def _panel(title: str, unit: str, *queries: tuple[str, str], is_stacked: bool = False) -> Panel:
    return Panel(title, unit, tuple(Query(expr, legend) for expr, legend in queries), is_stacked)


def _rate(metric: str, by: str = "", where: str = "") -> str:
    of = f"sum by ({by}) " if by else "sum"
    return f"{of}(rate({metric}{{{_ON}{where}}}[$__rate_interval]))"


def _sum(metric: str, by: str = "", where: str = "") -> str:
    return f"sum by ({by}) ({metric}{{{_ON}{where}}})" if by else f"sum({metric}{{{_ON}{where}}})"


def _quantiles(histogram: str, where: str = "") -> tuple[tuple[str, str], ...]:
    buckets = _rate(f"{histogram}_bucket", "le", where)
    return tuple(
        (f"histogram_quantile({q}, {buckets})", name) for q, name in ((0.5, "half"), (0.95, "95 %"), (0.99, "99 %"))
    )


def _mean(histogram: str) -> str:
    return f"{_rate(f'{histogram}_sum')} / {_rate(f'{histogram}_count')}"


def _top(metric: str) -> str:
    """The ten adapters with most of it."""
    return f"topk(10, {_rate(metric, 'adapter', _ADAPTER)})"


_ADAPTER = ', adapter=~"$adapter"'
_ON_DEVICE = f'{_ADAPTER}, tier="device"'
ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        _panel("Requests", "reqps", (_rate("graft_requests_total", "status"), "{{status}}"), is_stacked=True),
        _panel(
            "Tokens",
            "short",
            (_rate("graft_output_tokens_total"), "generated"),
            (_rate("graft_prompt_tokens_total"), "of prompts"),
        ),
        _panel(
            "Sequences",
            "short",
            (_sum("graft_sequences_running"), "running"),
            (_sum("graft_sequences_waiting"), "waiting"),
            (_sum("graft_sequences_short_of_room"), "waiting for room for their adapter"),
        ),
        _panel(
            "Refused and failed",
            "reqps",
            (_rate("graft_rejections_total", "reason"), "{{reason}}"),
            (_rate("graft_broken_answers_total", "reason"), "{{reason}} in mid-stream"),
            is_stacked=True,
        ),
        _panel(
            "Ends of sequences",
            "short",
            (_rate("graft_sequences_finished_total", "finish_reason"), "{{finish_reason}}"),
        ),
        _panel(
            "Uploads and merges",
            "short",
            (_rate("graft_uploads_total", "result"), "upload {{result}}"),
            (_rate("graft_merges_total", "result"), "merge {{result}}"),
        ),
    ),
    "Latency": (
        _panel("Time to the first token", "s", *_quantiles("graft_time_to_first_token_seconds")),
        _panel("Between tokens", "s", *_quantiles("graft_inter_token_latency_seconds")),
        _panel("Whole sequences", "s", *_quantiles("graft_sequence_seconds")),
        _panel(
            "Where a sequence's time goes, mean",
            "s",
            (_mean("graft_sequence_queue_seconds"), "in the queue"),
            (_mean("graft_sequence_prefill_seconds"), "prefill"),
            (_mean("graft_sequence_decode_seconds"), "decode"),
            is_stacked=True,
        ),
    ),
    "Batches": (
        _panel(
            "In one step, mean",
            "short",
            (_mean("graft_step_sequences"), "sequences"),
            (_mean("graft_step_adapters"), "adapters"),
            (_mean("graft_step_methods"), "methods"),
        ),
        _panel("Tokens in one step, mean", "short", (_mean("graft_step_tokens"), "tokens")),
        _panel("Duration of a step", "s", *_quantiles("graft_step_seconds")),
        _panel(
            "KV cache",
            "percentunit",
            (f"avg(graft_kv_usage_ratio{{{_ON}}})", "used"),
            (
                f"{_rate('graft_prefix_cache_hits_total')} / {_rate('graft_prefix_cache_queries_total')}",
                "prompt tokens found there",
            ),
        ),
        _panel(
            "Set back",
            "short",
            (_rate("graft_preemptions_total"), "sequences preempted"),
            (_rate("graft_adapter_rotations_total"), "adapters rotated"),
            (_rate("graft_steps_shed_total"), "steps short of memory"),
        ),
    ),
    "Adapters": (
        _panel(
            "Generated tokens by adapter",
            "short",
            (_top("graft_adapter_output_tokens_total"), "{{adapter}}"),
            is_stacked=True,
        ),
        _panel(
            "Sequences by adapter", "short", (_top("graft_adapter_sequences_total"), "{{adapter}}"), is_stacked=True
        ),
        _panel("Failures by adapter", "short", (_top("graft_adapter_failures_total"), "{{adapter}}")),
        _panel(
            "Running and waiting by adapter",
            "short",
            (f"topk(10, {_sum('graft_adapter_sequences_running', 'adapter', _ADAPTER)})", "{{adapter}} runs"),
            (f"topk(10, {_sum('graft_adapter_sequences_waiting', 'adapter', _ADAPTER)})", "{{adapter}} waits"),
        ),
        _panel(
            "On the device, bytes by adapter",
            "bytes",
            (f"topk(10, {_sum('graft_adapter_bytes', 'adapter', _ON_DEVICE)})", "{{adapter}}"),
            is_stacked=True,
        ),
        _panel(
            "Loaded, by method and tier",
            "short",
            (_sum("graft_adapter_loaded", "method, tier", _ADAPTER), "{{method}} on {{tier}}"),
            is_stacked=True,
        ),
    ),
    "Tiers": (
        _panel(
            "Where requests found their adapter",
            "short",
            (_rate("graft_adapter_lookups_total", "tier"), "{{tier}}"),
            is_stacked=True,
        ),
        _panel(
            "How many",
            "short",
            (_sum("graft_adapters"), "in all"),
            (_sum("graft_adapters_on_host"), "on host"),
            (_sum("graft_adapters_resident"), "on device"),
            (_sum("graft_adapter_places"), "have places there"),
            (_sum("graft_adapters_pinned"), "pinned"),
        ),
        _panel(
            "Moves",
            "short",
            (_rate("graft_adapter_loads_total"), "store to host"),
            (_rate("graft_adapter_promotions_total"), "host to device"),
            (_rate("graft_adapter_device_evictions_total"), "evicted from device"),
            (_rate("graft_adapter_host_evictions_total"), "evicted from host"),
            (_rate("graft_adapter_load_failures_total"), "loads failed"),
        ),
        _panel(
            "Time of a move, 95 %",
            "s",
            (
                f"histogram_quantile(0.95, {_rate('graft_adapter_load_seconds_bucket', 'le, transition')})",
                "{{transition}}",
            ),
        ),
        _panel(
            "Rank rows",
            "short",
            (_sum("graft_rank_rows"), "in use"),
            (_sum("graft_rank_rows_shared"), "of these, shared"),
            (_sum("graft_rank_row_uses"), "without sharing"),
        ),
        _panel(
            "Memory for adapters",
            "bytes",
            (_sum("graft_adapter_device_bytes"), "device"),
            (_sum("graft_adapter_device_capacity_bytes"), "device, at most"),
            (_sum("graft_adapter_host_bytes"), "host"),
            (_sum("graft_adapter_host_capacity_bytes"), "host, at most"),
            (_sum("graft_store_bytes"), "store"),
        ),
    ),
    "Process": (
        _panel(
            "Memory",
            "bytes",
            (_sum("process_resident_memory_bytes"), "of the process"),
            (_sum("graft_base_bytes"), "base"),
            (_sum("graft_kv_cache_bytes"), "KV cache"),
            (_sum("graft_device_memory_free_bytes"), "device, free"),
        ),
        _panel("Processor", "short", (_rate("process_cpu_seconds_total"), "cores")),
        _panel("Open files", "short", (_sum("process_open_fds"), "open")),
        _panel("Up", "short", (f'sum(up{{job="graft", {_ON}}})', "servers"), (_sum("graft_engine_up"), "engines")),
    ),
}


def panels() -> list[Panel]:
    return [panel for row in ROWS.values() for panel in row]


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    drawn: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        drawn.append({"type": "row", "title": title, "id": len(drawn) + 1, "gridPos": _place(top, 0, _WIDTH, 1)})
        top += 1
        per_line = 3 if len(row) % 3 == 0 else 2 if len(row) == 2 else min(len(row), 5)
        for number, panel in enumerate(row):
            width = _WIDTH // per_line
            place = _place(top + number // per_line * _HEIGHT, number % per_line * width, width, _HEIGHT)
            drawn.append(_drawn(panel, len(drawn) + 1, place))
        top += -(-len(row) // per_line) * _HEIGHT
    return {
        "title": "Graftserve",
        "uid": "graftserve",
        "schemaVersion": 39,
        "tags": ["graftserve"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "15s",
        "templating": {"list": _variables()},
        "panels": drawn,
    }


def _place(top: int, left: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.is_stacked else "none"}
    custom = {"fillOpacity": 30 if panel.is_stacked else 0, "stacking": stacking, "showPoints": "never"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "id": number,
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    asked = (("instance", "graft_engine_up", "server"), ("adapter", "graft_adapter_sequences_total", "adapter"))
    chosen = [
        {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _SOURCE,
            "query": f"label_values({metric}, {name})",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }
        for name, metric, label in asked
    ]
    return [{"name": "source", "label": "data source", "type": "datasource", "query": "prometheus"}, *chosen]


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
