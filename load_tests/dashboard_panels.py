"""The dashboard's panels as one picture, drawn as Grafana would from what Prometheus answers.

Owns how a panel is drawn: its curves, its legend beside them, its units in words. Knows nothing about what was running.
"""

import io
import itertools
import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator
from PIL import Image

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
_WINDOW = "30s"
_VARIABLES = {"$__rate_interval": _WINDOW, "$instance": ".*", "$adapter": ".*"}
_PER_LINE = 3
_MAX_LEGEND = 12
_MAX_LEGEND_CHARS = 34
_DOTS_PER_INCH = 75
_NUM_COLOURS = 24  # of the file: a third of the bytes

Curve = tuple[str, list[tuple[float, float]]]  # its name, and pairs of Unix time and value


def answer(prometheus: str, expr: str, span: tuple[float, float], step_s: float) -> list[tuple[Mapping[str, str], Any]]:
    """Labels, and pairs of Unix time and value, of each series that an expression had in this time."""
    for variable, value in _VARIABLES.items():
        expr = expr.replace(variable, value)
    asked = urllib.parse.urlencode({"query": expr, "start": span[0], "end": span[1], "step": step_s})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{asked}", timeout=60) as told:
        found = json.loads(told.read())["data"]["result"]
    return [(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]


def draw(prometheus: str, span: tuple[float, float], step_s: float, path: Path) -> list[str]:
    """Every panel of the dashboard, in its order; the titles of those that show nothing but zeros, or nothing."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if "targets" in panel]
    num_lines = -(-len(panels) // _PER_LINE)
    figure = Figure(figsize=(5.4 * _PER_LINE, 2.3 * num_lines), layout="constrained")
    cells = list(figure.subplots(num_lines, _PER_LINE).flat)
    empty = []
    for axes, panel in zip(cells, panels, strict=False):
        curves = curves_of(panel, prometheus, span, step_s)
        _draw_panel(axes, panel, curves, span, step_s)
        if not any(value for _, points in curves for _, value in points if value == value):
            empty.append(panel["title"])
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=_DOTS_PER_INCH)
        Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    return empty


def curves_of(panel: Mapping[str, Any], prometheus: str, span: tuple[float, float], step_s: float) -> list[Curve]:
    return [
        (_legend(target["legendFormat"], labels), points)
        for target in panel["targets"]
        for labels, points in answer(prometheus, target["expr"], span, step_s)
    ]


def _draw_panel(
    axes: Axes, panel: Mapping[str, Any], curves: Sequence[Curve], span: tuple[float, float], step_s: float
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit, write = _UNITS[defaults["unit"]]
    axes.set_title(panel["title"] + (f", {unit}" if unit else ""), fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: write(value)))
    axes.grid(linewidth=0.3)
    times = [span[0] + step_s * number for number in range(int((span[1] - span[0]) / step_s) + 1)]
    rows = [on_grid(points, times) for _, points in curves]
    shown = _names(curves)
    elapsed = [at - span[0] for at in times]
    if rows and defaults["custom"]["stacking"]["mode"] == "normal":
        whole = [[0.0 if math.isnan(value) else value for value in row] for row in rows]
        axes.stackplot(elapsed, *whole, labels=shown, linewidth=0.5, alpha=0.8)
    else:
        for name, row in zip(shown, rows, strict=True):
            axes.plot(elapsed, row, label=name, linewidth=1.1)
    axes.set_ylim(bottom=0)
    if defaults["unit"] == "bytes":
        axes.yaxis.set_major_locator(MultipleLocator(2 ** max(0, math.ceil(math.log2(axes.get_ylim()[1] / 6)))))
    axes.set_xlim(0, elapsed[-1])
    if rows:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.04), frameon=False, labelspacing=0.25)


def _names(curves: Sequence[Curve]) -> list[str]:
    """For the legend: of curves that are not zero all along, or of all if there are no others; "_" for the rest."""
    is_some = [any(value for _, value in points) for _, points in curves]
    left = itertools.count()
    return [
        (name or "(none)")[:_MAX_LEGEND_CHARS] if (told or not any(is_some)) and next(left) < _MAX_LEGEND else "_"
        for told, (name, _) in zip(is_some, curves, strict=True)
    ]


def on_grid(points: Sequence[tuple[float, float]], times: Sequence[float]) -> list[float]:
    """The values at these times; NaN, which is a gap in the curve, where a series was not there."""
    values = {round(at, 1): value for at, value in points}
    return [values.get(round(at, 1), math.nan) for at in times]


def _plain(value: float) -> str:
    return f"{value:,.10g}"


def _bytes(value: float) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:.3g} {unit}"
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"


# By Grafana's name of a unit: what stands behind the title, and how a value is written.
_UNITS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "short": ("", _plain),
    "reqps": ("requests per second", _plain),
    "percentunit": ("", lambda value: f"{100 * value:.3g} %"),
    "bytes": ("", _bytes),
    "s": ("", _seconds),
}


def _legend(form: str, labels: Mapping[str, str]) -> str:
    for label in re.findall(r"\{\{(\w+)\}\}", form):
        form = form.replace(f"{{{{{label}}}}}", labels.get(label, ""))
    return form
