"""A picture of one number for each layer, as bars: PNG, SVG or PDF.

Owns how that looks, and what is said where it cannot be drawn. Knows nothing about what the numbers mean. Matplotlib is
imported by this module alone, and only when a picture is asked for.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.ground.errors import StartupRefused

_SUFFIXES = (".png", ".svg", ".pdf")
_COLOUR, _PALE = "#4a7ba6", "#c9d3dd"
_DOTS_PER_INCH = 80
_MAX_LABELS = 40  # below one another


@dataclass(frozen=True, slots=True)
class Bars:
    """What is drawn: one bar for each label, from above to below; those that are not `is_strong` are pale."""

    title: str
    axis: str
    labels: Sequence[str]
    values: Sequence[float]
    is_strong: Sequence[bool]


def check_plot(path: Path) -> None:
    """Raises StartupRefused, before any work is done, where `draw_bars` could not write `path`."""
    if path.suffix.lower() not in _SUFFIXES:
        raise StartupRefused(f"--plot {path}: a picture's name ends in {', '.join(_SUFFIXES)}; choose one of these")
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StartupRefused(f"--plot {path}: it cannot be written; give a file in a folder that exists and is yours")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise StartupRefused(
            f"--plot needs {error.name}: pip install 'graftserve[plot]', or leave --plot out; the table says the same"
        ) from None


def draw_bars(bars: Bars, path: Path) -> None:
    """Writes the picture; an old one is replaced. Raises StartupRefused if the disk refuses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.22 * max(4, len(bars.labels))), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars.labels))
    colours = [_COLOUR if is_strong else _PALE for is_strong in bars.is_strong]
    axes.barh(places, list(bars.values), color=colours)
    step = -(-len(bars.labels) // _MAX_LABELS)
    axes.set_yticks(list(places)[::step], list(bars.labels)[::step], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set(title=bars.title, xlabel=bars.axis)
    try:
        figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise StartupRefused(f"--plot {path} cannot be written: {error.strerror or error}") from error
