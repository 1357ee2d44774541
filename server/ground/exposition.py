"""Metrics as Prometheus' text format, version 0.0.4.

Owns how a family, a sample and a label's value are written, and that lines of things that are as they were at the last
scrape are not written again. Knows nothing about what they tell.

prometheus_client's own writer looks at every name and label again for characters of other formats, which takes 50
microseconds a sample: half a second for the series of a thousand adapters. Ours come from `families`.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from typing import Generic, TypeVar

from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_ESCAPED_IN_HELP = str.maketrans({"\\": r"\\", "\n": r"\n"})
_T = TypeVar("_T", bound=Hashable)
_PLAIN = re.compile(r"[A-Za-z0-9._+/ -]*").fullmatch


def exposition(families: Iterable[Metric]) -> str:
    """The text of these families, in their order."""
    in_quotes, number = cache(quoted), cache(_number)  # most values stand in many samples
    return "".join(_text(family, in_quotes, number) for family in families)


def head(name: str, kind: str, told: str) -> str:
    """The two lines before a family's samples; `name` as it is scraped."""
    return f"# HELP {name} {told.translate(_ESCAPED_IN_HELP)}\n# TYPE {name} {kind}\n"


def quoted(value: str) -> str:
    """A label's value as it is written."""
    return '"' + (value if _PLAIN(value) else value.translate(_ESCAPED)) + '"'  # nearly all are plain, seen faster


def line(name: str, labels: Mapping[str, str], value: float) -> str:
    """One sample."""
    listed = ",".join(f"{label}={quoted(one)}" for label, one in labels.items())
    return f"{name}{{{listed}}} {_number(value)}\n"


class Kept(Generic[_T]):
    """The lines of many things, of which most are at each scrape as they were at the last."""

    def __init__(self, write: Callable[[_T], tuple[str, ...]]) -> None:
        """`write`: a thing's lines, a column for each family; "" where it has none."""
        self._write = write
        self._last: Mapping[_T, tuple[str, ...]] = {}

    def columns(self, things: Iterable[_T], *more: tuple[str, ...]) -> tuple[str, ...]:
        """The lines of all these (at least one, or `more`), by family."""
        last, write = self._last, self._write
        self._last = {thing: last.get(thing) or write(thing) for thing in things}
        return tuple(map("".join, zip(*self._last.values(), *more, strict=True)))


def _text(family: Metric, in_quotes: Callable[[str], str], number: Callable[[float], str]) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    lines = [head(name, family.type, family.documentation)]
    for sample_name, labels, value, *_ in family.samples:
        listed = ",".join([f"{label}={in_quotes(one)}" for label, one in labels.items()])
        lines.append(f"{sample_name}{{{listed}}} {number(value)}\n" if listed else f"{sample_name} {number(value)}\n")
    return "".join(lines)


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))  # a bool is a number, too
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
