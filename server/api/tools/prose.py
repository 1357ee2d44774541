"""Text around what is marked in it: finding a mark in text that comes in portions, and white space beside calls.

Knows nothing about what the marks mean.
"""

from server.api.tools.pieces import Content, Piece


class MarkFinder:
    """Finds the first `mark`, holding back what may be its beginning."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what comes before the mark for certain, what follows it); None for the latter as long as there is none."""
        text = self._held + text
        before, mark, after = text.partition(self._mark)
        if mark:
            self._held = ""
            return before, after
        num_held = next(n for n in range(min(len(self._mark) - 1, len(text)), -1, -1) if self._begins(text, n))
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str, num_chars: int) -> bool:
        return self._mark.startswith(text[len(text) - num_chars :])


class Prose:
    """The content of an answer that may have calls in it: white space beside a call belongs to neither."""

    def __init__(self) -> None:
        self._space = ""  # not said yet: a call may follow
        self._is_after_call = False

    def push(self, text: str) -> list[Piece]:
        text = self._space + text
        if self._is_after_call:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if not said:
            return []
        self._is_after_call = False
        return [Content(said)]

    def end_at_call(self) -> None:
        self._space = ""
        self._is_after_call = True

    def finish(self) -> list[Piece]:
        space, self._space = self._space, ""
        return [Content(space)] if space else []
