"""The module patterns of `rank_pattern` and `alpha_pattern`, matched in bounded time.

Owns a small regular-expression matcher for patterns that strangers upload: Python's own takes exponential time on
some of them. Knows nothing about configs and modules.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from server.ground.errors import AdapterRejected

_MAX_LENGTH = 512
_MAX_DEPTH = 8
# About a microsecond each. A name for each module of a 70B model takes 160 thousand in all; a plain general pattern, a
# few hundred per path.
_MAX_STEPS = 1_000_000
_MAX_STEPS_PER_PATH = 2_000  # in addition, so that models of many modules are not short of steps
_STEPS_PER_GENERAL = 1_000  # to read a general pattern
# Names and dots, escaped or not: nothing to choose from, and so nothing to compile.
_LITERAL = re.compile(r"(?:[\w.\-]|\\[.\-])+", re.ASCII)
_LITERAL_LETTER = re.compile(r"\\?.")
_LETTER = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS.\\\-_/^$*+?()\[\]{}|]|[^\\()\[\]{}|*+?^$]")
_REPEAT = re.compile(r"([*+?])|\{(\d{1,3})(?:(,)(\d{1,3})?)?\}")

Positions = frozenset[int]
# From the places where a part of a pattern may begin to the places where it may end.
Part = Callable[[str, Positions], Positions]


class ModulePatterns:
    """Patterns in the order of the file; the first that matches counts, as in PEFT.

    A general pattern follows all its possibilities at once, as a set of places in the path, so that it never goes
    back. The work of one object is bounded all the same, by the number of paths. For one thread.
    """

    def __init__(self, patterns: Iterable[str], field: str) -> None:
        """Raises AdapterRejected, naming `field`, for a pattern that is wrong or outside the supported syntax."""
        self._field = field
        self._steps = _MAX_STEPS
        self._matchers = [(pattern, self._matcher(pattern)) for pattern in patterns]

    def first(self, path: str) -> str | None:
        """The first pattern that is the whole path, or its end after a dot: re.match(r"(.*\\.)?(pattern)$", path).

        Raises AdapterRejected once the patterns have cost too much work.
        """
        self._steps += _MAX_STEPS_PER_PATH
        return next((pattern for pattern, matches in self._matchers if matches(path)), None)

    def _matcher(self, pattern: str) -> Callable[[str], bool]:
        if len(pattern) > _MAX_LENGTH:
            raise AdapterRejected(
                f"{self._field} in adapter_config.json has a pattern of {len(pattern)} characters; "
                f"the limit is {_MAX_LENGTH}."
            )
        if _LITERAL.fullmatch(pattern):
            literal = _literal(pattern)
            return lambda path: self._spend(1) and literal(path)
        self._spend(_STEPS_PER_GENERAL)
        part = _Parser(pattern, self._field, self._spend).parse()

        def matches(path: str) -> bool:
            starts = frozenset({0} | {place + 1 for place, letter in enumerate(path) if letter == "."})
            return len(path) in part(path, starts)

        return matches

    def _spend(self, num_steps: int) -> bool:
        self._steps -= num_steps
        if self._steps < 0:
            raise AdapterRejected(f"{self._field} in adapter_config.json is too costly to match: use fewer patterns.")
        return True


def _literal(pattern: str) -> Callable[[str], bool]:
    """Whether a path is the pattern, or ends in it after a dot. A bare dot is any letter, as in an expression."""
    if "." not in pattern and "\\" not in pattern:
        ending = "." + pattern
        return lambda path: path.endswith(ending) or path == pattern
    letters = _LITERAL_LETTER.findall(pattern)

    def matches(path: str) -> bool:
        start = len(path) - len(letters)
        if start < 0 or (start > 0 and path[start - 1] != "."):
            return False
        return all(letter in (".", own, "\\" + own) for letter, own in zip(letters, path[start:], strict=True))

    return matches


class _Parser:
    """Recursive descent over alternatives, sequences, groups, character classes, anchors and repeats."""

    def __init__(self, pattern: str, field: str, spend: Callable[[int], bool]) -> None:
        self._pattern = pattern
        self._field = field
        self._spend = spend
        self._at = 0

    def parse(self) -> Part:
        part = self._alternatives(0)
        if self._at < len(self._pattern):
            raise self._error()
        return part

    def _alternatives(self, depth: int) -> Part:
        if depth > _MAX_DEPTH:
            raise self._error()
        choices = [self._sequence(depth)]
        while self._skip("|"):
            choices.append(self._sequence(depth))
        return choices[0] if len(choices) == 1 else _any_of(choices)

    def _sequence(self, depth: int) -> Part:
        parts: list[Part] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            parts.append(self._repeated(self._single(depth)))
        return _in_order(parts)

    def _single(self, depth: int) -> Part:
        if self._skip("^"):
            return lambda path, starts: starts & {0}
        if self._skip("$"):
            return lambda path, starts: starts & {len(path)}
        if self._skip("(?:") or (not self._pattern.startswith("(?", self._at) and self._skip("(")):
            inside = self._alternatives(depth + 1)
            if not self._skip(")"):
                raise self._error()
            return inside
        return self._letter()

    def _letter(self) -> Part:
        found = _LETTER.match(self._pattern, self._at)
        if found is None:
            raise self._error()
        try:
            letter = re.compile(found.group())
        except re.error as error:
            raise self._error() from error
        self._at = found.end()
        spend = self._spend

        def step(path: str, starts: Positions) -> Positions:
            spend(1 + len(starts))
            return frozenset(at + 1 for at in starts if letter.match(path, at))

        return step

    def _repeated(self, part: Part) -> Part:
        found = _REPEAT.match(self._pattern, self._at)
        if found is None:
            return part
        self._at = found.end()
        sign, low, comma, high = found.groups()
        least = int(low or sign == "+")
        most = int(high) if high else least if low and not comma else 1 if sign == "?" else None
        if _REPEAT.match(self._pattern, self._at) or (most is not None and most < least):
            raise self._error()
        return _repeat(part, least, most, self._spend)

    def _skip(self, sign: str) -> bool:
        if not self._pattern.startswith(sign, self._at):
            return False
        self._at += len(sign)
        return True

    def _error(self) -> AdapterRejected:
        return AdapterRejected(
            f"{self._field} in adapter_config.json has a pattern that is wrong or not supported at character "
            f"{self._at}: {self._pattern:.80}. Write the module names out, or use plain groups, classes and repeats."
        )


def _any_of(choices: Sequence[Part]) -> Part:
    return lambda path, starts: frozenset().union(*(choice(path, starts) for choice in choices))


def _in_order(parts: Sequence[Part]) -> Part:
    def run(path: str, starts: Positions) -> Positions:
        for part in parts:
            starts = part(path, starts)
        return starts

    return run


def _repeat(part: Part, least: int, most: int | None, spend: Callable[[int], bool]) -> Part:
    def run(path: str, starts: Positions) -> Positions:
        for _ in range(least):
            spend(1)
            starts = part(path, starts)
        ends = fresh = starts
        # Only places not met before are tried again, so that a repeat ends after at most one round per character.
        for _ in range(len(path) if most is None else most - least):
            spend(1)
            fresh = part(path, fresh) - ends
            if not fresh:
                break
            ends |= fresh
        return ends

    return run
