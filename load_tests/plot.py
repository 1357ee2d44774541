"""The picture of a run: who waited how long, when, and who was asked for. Knows nothing about how it was measured.

Matplotlib is imported by this module alone, so that a run without `--plot` does not need it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from load_tests.outcome import End, Outcome
from load_tests.report import groups

_COLOURS = {"all": "#222222", "head": "#c1440e", "middle": "#4a7ba6", "tail": "#7a9a3a"}
_DOTS_PER_INCH = 80  # of a PNG: three panels in less than 100 kB


def draw(outcomes: Sequence[Outcome], whole: Mapping[str, Any], path: Path) -> None:
    """Writes PNG or SVG, by the suffix of `path`. Raises ValueError for a suffix that matplotlib does not know."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    parts = groups(outcomes, whole["workload"]["num_adapters"])
    limit_ms = whole["slo"]["ttft_ms"]
    _distribution(left, {name: parts[name] for name in _COLOURS if name in parts}, limit_ms)
    _course(middle, parts, limit_ms)
    _popularity(right, whole["adapters"])
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def _distribution(axes: Axes, parts: Mapping[str, Sequence[Outcome]], limit_ms: float) -> None:
    for name, part in parts.items():
        times = sorted(_ttft_ms(part))
        if times:
            shares = [(rank + 1) / len(times) for rank in range(len(times))]
            axes.step(times, shares, where="post", color=_COLOURS[name], label=f"{name} ({len(times)})")
    axes.axvline(limit_ms, color="grey", linestyle=":", label="SLO")
    axes.set(xscale="log", xlabel="time to first token, ms", ylabel="share of completed requests")
    axes.legend(fontsize="small")


def _course(axes: Axes, parts: Mapping[str, Sequence[Outcome]], limit_ms: float) -> None:
    """Each request where it was scheduled: a queue that builds up is a slope."""
    shown = [name for name in ("head", "middle", "tail") if name in parts] or ["all"]
    for name in shown:
        completed = [outcome for outcome in parts[name] if outcome.end is End.COMPLETED]
        times = [outcome.request.scheduled_s for outcome in completed]
        axes.plot(times, _ttft_ms(completed), ".", color=_COLOURS[name], label=name)
    lost = [outcome.request.scheduled_s for outcome in parts["all"] if outcome.end is not End.COMPLETED]
    if lost:
        axes.plot(lost, [limit_ms] * len(lost), "x", color="black", label="failed or cancelled")
    axes.axhline(limit_ms, color="grey", linestyle=":")
    axes.set(yscale="log", xlabel="scheduled arrival, s", ylabel="time to first token, ms")
    axes.legend(fontsize="small")


def _popularity(axes: Axes, adapters: Sequence[Mapping[str, Any]]) -> None:
    ranks = [entry["rank"] for entry in adapters]
    num_requests = sum(entry["num_requests"] for entry in adapters)
    axes.bar(ranks, [entry["num_requests"] for entry in adapters], color="#b9c7d6", label="asked")
    axes.plot(
        ranks, [entry["expected_share"] * num_requests for entry in adapters], color="#222222", label="Zipf's law"
    )
    axes.set(xlabel="adapter, by popularity", ylabel="requests")
    axes.legend(fontsize="small")


def _ttft_ms(outcomes: Sequence[Outcome]) -> list[float]:
    """Of the completed ones, in their order."""
    return [1000 * o.ttft_s for o in outcomes if o.end is End.COMPLETED and o.ttft_s is not None]
