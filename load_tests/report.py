"""What a run amounts to: percentiles, the share within the limits, errors by kind; as JSON and as a Markdown table.

Owns the statistics and their names (docs/load-testing.md has them beside those of other tools). Knows nothing about
HTTP and clocks: it reads outcomes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.outcome import End, Outcome
from load_tests.plan import zipf_law

SCHEMA = "graftserve-load/1"
PERCENTS = (50, 90, 99)
MAX_LAG_SHARE = 0.05  # of the limit on the first token: a client that is later than this at p99 is part of the result


@dataclass(frozen=True, slots=True)
class Limits:
    """The service-level objective of one request: first token, and mean time per token after it."""

    ttft_s: float
    tpot_s: float

    def hold(self, outcome: Outcome) -> bool:
        return outcome.is_within(self.ttft_s, self.tpot_s)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between the two nearest ranks, linearly (as numpy's default, so as vLLM's benchmark); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary_ms(values_s: Iterable[float | None]) -> dict[str, float | int | None]:
    """Count, mean, percentiles and maximum in milliseconds; None in `values_s` is left out."""
    values = [1000 * value for value in values_s if value is not None]
    figures: dict[str, float | None] = {"mean": math.fsum(values) / len(values) if values else None}
    figures |= {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
    figures["max"] = max(values, default=None)
    return {"count": len(values)} | {name: _rounded(value) for name, value in figures.items()}


def popularity_groups(num_adapters: int) -> dict[str, range]:
    """Ranks of the most popular tenth, of the less popular half, and of those between; groups may be empty."""
    head, tail = math.ceil(num_adapters / 10), math.ceil(num_adapters / 2)
    return {
        "head": range(1, head + 1),
        "middle": range(head + 1, max(head, tail) + 1),
        "tail": range(max(head, tail) + 1, num_adapters + 1),
    }


def groups(outcomes: Sequence[Outcome], num_adapters: int) -> dict[str, list[Outcome]]:
    """All, by popularity, and by whether the adapter had been asked for in this run before."""
    parts = {"all": list(outcomes)}
    if not num_adapters:
        return parts
    for name, ranks in popularity_groups(num_adapters).items():
        parts[name] = [outcome for outcome in outcomes if outcome.request.rank in ranks]
    seen: set[int] = set()
    parts |= {"first_use": [], "later_use": []}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.request.number):
        parts["later_use" if outcome.request.rank in seen else "first_use"].append(outcome)
        seen.add(outcome.request.rank)
    return parts


def group_figures(outcomes: Sequence[Outcome], limits: Limits) -> dict[str, Any]:
    """Times are of the requests that completed; the share within the limits is of all that were sent."""
    completed = [outcome for outcome in outcomes if outcome.end is End.COMPLETED]
    return {
        "num_requests": len(outcomes),
        "num_completed": len(completed),
        "share_within_slo": _share(sum(map(limits.hold, outcomes)), len(outcomes)),
        "ttft_ms": summary_ms(outcome.ttft_s for outcome in completed),
        "ttft_from_sent_ms": summary_ms(outcome.ttft_from_sent_s for outcome in completed),
        "itl_ms": summary_ms(gap for outcome in completed for gap in outcome.gaps_s),
        "tpot_ms": summary_ms(outcome.tpot_s for outcome in completed),
        "e2el_ms": summary_ms(outcome.latency_s for outcome in completed),
    }


def totals(outcomes: Sequence[Outcome], elapsed_s: float, limits: Limits) -> dict[str, Any]:
    """Counts, and rates over the time from the start to the end of the last answer."""
    completed = [outcome for outcome in outcomes if outcome.end is End.COMPLETED]
    num_tokens = sum(outcome.num_tokens for outcome in completed)
    ends = Counter(outcome.end for outcome in outcomes)
    return {
        "num_sent": len(outcomes),
        "num_completed": ends[End.COMPLETED],
        "num_failed": ends[End.FAILED],
        "num_cancelled": ends[End.CANCELLED],
        "elapsed_s": _rounded(elapsed_s),
        "requests_per_s": _rounded(len(completed) / elapsed_s),
        "goodput_per_s": _rounded(sum(map(limits.hold, outcomes)) / elapsed_s),
        "output_tokens_per_s": _rounded(num_tokens / elapsed_s),
        "num_prompt_tokens": sum(outcome.num_prompt_tokens or 0 for outcome in completed),
        "num_output_tokens": num_tokens,
        "num_chunks": sum(len(outcome.token_times_s) for outcome in completed),
        "num_without_usage": sum(outcome.num_output_tokens is None for outcome in completed),
    }


def errors(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """By kind, the most frequent first: how many, and what the first of them said."""
    failed = [outcome for outcome in outcomes if outcome.end is End.FAILED]
    counts = Counter(outcome.error for outcome in failed)
    first = {outcome.error: outcome.detail for outcome in reversed(failed)}
    return {str(kind): {"count": count, "first": first[kind]} for kind, count in counts.most_common()}


def adapter_figures(
    outcomes: Sequence[Outcome], adapters: Sequence[str], zipf: float, limits: Limits
) -> list[dict[str, Any]]:
    """One entry per adapter, the most popular first."""
    of_rank: dict[int, list[Outcome]] = {rank: [] for rank in range(1, len(adapters) + 1)}
    for outcome in outcomes:
        of_rank[outcome.request.rank].append(outcome)
    return [
        {
            "rank": rank,
            "adapter": adapters[rank - 1],
            "expected_share": _rounded(expected, 5),
            "num_requests": len(asked),
            "num_within_slo": sum(map(limits.hold, asked)),
            "ttft_p50_ms": summary_ms(outcome.ttft_s for outcome in asked if outcome.end is End.COMPLETED)["p50"],
        }
        for (rank, asked), expected in zip(of_rank.items(), zipf_law(len(adapters), zipf), strict=True)
    ]


def report(
    outcomes: Sequence[Outcome], adapters: Sequence[str], zipf: float, elapsed_s: float, limits: Limits
) -> dict[str, Any]:
    """Everything that is computed from the outcomes; the caller adds what was asked, and of whom."""
    lag_ms = summary_ms(outcome.lag_s for outcome in outcomes)
    of_adapters = adapter_figures(outcomes, adapters, zipf, limits) if adapters else []
    asked = [entry for entry in of_adapters if entry["num_requests"]]
    good = sum(entry["num_within_slo"] == entry["num_requests"] for entry in asked)
    body = {
        "totals": totals(outcomes, elapsed_s, limits),
        "errors": errors(outcomes),
        "schedule_lag_ms": lag_ms,
        "num_adapters_asked": len(asked),
        "share_of_adapters_within_slo": _share(good, len(asked)),
        "groups": {name: group_figures(part, limits) for name, part in groups(outcomes, len(adapters)).items()},
        "adapters": of_adapters,
    }
    return body | {"warnings": warnings(body, limits)}


def warnings(body: Mapping[str, Any], limits: Limits) -> list[str]:
    """What a reader must know before the figures are believed."""
    found = []
    lag_ms, sums = body["schedule_lag_ms"]["p99"], body["totals"]
    if lag_ms is not None and lag_ms > 1000 * MAX_LAG_SHARE * limits.ttft_s:
        found.append(
            f"The client sent late (p99 {lag_ms:.0f} ms): part of the times is its own. Lower --rate, or give it a "
            f"machine of its own."
        )
    if sums["num_without_usage"]:
        found.append(
            f"{sums['num_without_usage']} answers came without a usage: their tokens are counted as chunks, which "
            f"may hold several tokens each."
        )
    if sums["num_cancelled"]:
        found.append(
            f"{sums['num_cancelled']} requests were cancelled unanswered: they are in the share within the limits, "
            f"but not in the times, which are too good by them."
        )
    return found


def table(whole: Mapping[str, Any]) -> str:
    """The figures of each group in Markdown, times in milliseconds; groups that nobody asked for are left out."""
    columns = (("ttft_ms", "TTFT", PERCENTS), ("itl_ms", "ITL", PERCENTS), ("tpot_ms", "TPOT", (50, 99)))
    titles = [f"{title} p{percent}" for _, title, percents in columns for percent in percents]
    lines = [_row(["requests", "sent", "completed", "within SLO", *titles]), "|---|" + "---:|" * (len(titles) + 3)]
    label = _labels(whole["workload"]["num_adapters"])
    for name, figures in whole["groups"].items():
        if figures["num_requests"]:
            share = f"{100 * figures['share_within_slo']:.1f} %"
            times = [_shown(figures[key][f"p{percent}"]) for key, _, percents in columns for percent in percents]
            sent, completed = str(figures["num_requests"]), str(figures["num_completed"])
            lines.append(_row([label(name), sent, completed, share, *times]))
    return "\n".join(lines)


def sentences(whole: Mapping[str, Any]) -> list[str]:
    """What the table does not hold."""
    sums, lag = whole["totals"], whole["schedule_lag_ms"]
    lines = [
        f"{sums['requests_per_s']:.2f} requests/s completed, {sums['goodput_per_s']:.2f} within the SLO; "
        f"{sums['output_tokens_per_s']:.0f} output tokens/s; {sums['elapsed_s']:.1f} s in all",
        f"schedule lag of the client: p50 {_shown(lag['p50'])} ms, p99 {_shown(lag['p99'])} ms",
    ]
    if whole["num_adapters_asked"]:
        share = 100 * whole["share_of_adapters_within_slo"]
        lines.append(
            f"{whole['num_adapters_asked']} of {whole['workload']['num_adapters']} adapters asked for; of "
            f"{share:.0f} % of these every request was within the SLO"
        )
    lines += [f"{kind}: {entry['count']}, first: {entry['first']}" for kind, entry in whole["errors"].items()]
    if sums["num_cancelled"]:
        lines.append(f"cancelled: {sums['num_cancelled']}")
    return lines + [f"warning: {warning}" for warning in whole["warnings"]]


def _labels(num_adapters: int) -> Callable[[str], str]:
    ranks = {name: ranks for name, ranks in popularity_groups(num_adapters).items() if ranks}
    words = {"first_use": "first use of its adapter", "later_use": "later use"}

    def label(name: str) -> str:
        if name in ranks:
            return f"{name} (ranks {ranks[name][0]} to {ranks[name][-1]})"
        return words.get(name, name)

    return label


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _share(part: int, whole: int) -> float | None:
    return _rounded(part / whole, 4) if whole else None


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
