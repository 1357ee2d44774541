"""Tables for terminals: aligned plain text.

Owns widths and wrapping. Knows nothing about what is in the cells.
"""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
_GAP = "  "
_MIN_COLUMN = 16  # a column is not wrapped below this


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows under a header, cells aligned to the left, or to the right in the columns numbered in `right`.

    Nothing is cut: a row that is too long for the terminal is longer than the terminal.
    """
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return _GAP.join(cells).rstrip() + "\n"

    return "".join(map(aligned, lines))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """One fact per line behind its name; a long one goes on in the next line, under itself."""
    told = list(pairs)
    width = max((len(name) for name, _ in told), default=0)
    return "".join(_fact(name.ljust(width), text) for name, text in told)


def _fact(name: str, text: str) -> str:
    lead = name + _GAP
    lines = textwrap.wrap(
        text, max(WIDTH - len(lead), _MIN_COLUMN), break_long_words=False, break_on_hyphens=False
    ) or [""]
    return "".join((lead if not place else " " * len(lead)) + line + "\n" for place, line in enumerate(lines))
