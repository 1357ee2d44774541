"""Patterns of names, in which `*` stands for any characters and `?` for one: which names they have.

Owns the match, and the search of sorted names, of which it looks at those alone that begin as a pattern does. Knows
nothing about adapters or owners.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fnmatch import translate
from functools import lru_cache

_END = "\x7f"  # comes after every character that a name may have


class NamePatterns:
    """Names that at least one of some patterns has."""

    def __init__(self, patterns: Sequence[str]) -> None:
        exact = {pattern for pattern in patterns if not _has_wildcard(pattern)}
        others = [each for each in patterns if each not in exact and not _is_prefix(each)]
        self._prefixes = _disjoint({each[:-1] for each in patterns if _is_prefix(each)})
        self._exact = frozenset(name for name in exact if not name.startswith(self._prefixes))
        self._others = re.compile("|".join(map(translate, others))) if others else None

    def match(self, name: str) -> bool:
        """Whether a pattern has this name."""
        is_simple = name in self._exact or name.startswith(self._prefixes)
        return is_simple or (self._others is not None and self._others.match(name) is not None)

    def within(self, names: Sequence[str]) -> list[str]:
        """Of sorted names without repetition those that a pattern has, sorted.

        Where wildcards are at the ends of patterns alone, no other name is looked at.
        """
        if self._others is not None:
            return [name for name in names if self.match(name)]
        return [name for begin, end in sorted(self._spans(names)) for name in names[begin:end]]

    def near(self, names: Sequence[str], name: str, most: int) -> list[str]:
        """Of sorted names without repetition that a pattern has, at most `most` that lie beside `name`, sorted.

        Names that only a pattern with a wildcard before its end has are left out. To find them, all names would have to
        be looked at; and to stop early would tell how many there are that no pattern has.
        """
        spans = sorted(self._spans(names))
        num_before = sum(bisect_left(names, name, begin, end) - begin for begin, end in spans)
        first, last = _window(num_before, sum(end - begin for begin, end in spans), most)
        found: list[str] = []
        num_passed = 0
        for begin, end in spans:
            found += names[begin + max(first - num_passed, 0) : begin + max(min(last - num_passed, end - begin), 0)]
            num_passed += end - begin
        return found

    def _spans(self, names: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Where the names lie that the simple patterns have: no two overlap."""
        for prefix in self._prefixes:
            yield bisect_left(names, prefix), bisect_left(names, prefix + _END)
        for name in self._exact:
            at = bisect_left(names, name)
            yield at, at + (at < len(names) and names[at] == name)


@lru_cache(maxsize=4096)
def name_patterns(patterns: tuple[str, ...]) -> NamePatterns:
    """Those of a key, compiled once."""
    return NamePatterns(patterns)


def nearest(names: Sequence[str], name: str, most: int) -> Sequence[str]:
    """Of sorted names at most `most`, those before and after where `name` would be."""
    first, last = _window(bisect_left(names, name), len(names), most)
    return names[first:last]


def _window(at: int, number: int, most: int) -> tuple[int, int]:
    """Begin and end of at most `most` of `number` things around the place `at`; of all where they are no more."""
    if number <= most:
        return 0, number
    return max(at - most // 2, 0), min(at + most // 2, number)


def _has_wildcard(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


def _is_prefix(pattern: str) -> bool:
    return pattern[-1:] == "*" and not _has_wildcard(pattern[:-1])


def _disjoint(prefixes: set[str]) -> tuple[str, ...]:
    """Without those that begin as another does."""
    return tuple(one for one in prefixes if not any(one != other and one.startswith(other) for other in prefixes))
