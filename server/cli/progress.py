"""How far a long command has come: one line that is written over, on terminals only.

Owns how that looks. Knows nothing about what is being done.
"""

import sys

_WIDTH = 30


class ProgressBar:
    """A line on stderr, from the first call to the last; nothing at all where stderr is no terminal."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` steps are behind us."""
        if not sys.stderr.isatty():
            return
        filled = _WIDTH * done // max(total, 1)
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r{self._label} [{'#' * filled}{' ' * (_WIDTH - filled)}] {done}/{total}{end}")
        sys.stderr.flush()
