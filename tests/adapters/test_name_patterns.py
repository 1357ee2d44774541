"""Patterns of names: they match as the shell's do, and sorted names are searched without a look at the others."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.name_patterns import NamePatterns, name_patterns, nearest

NAMES = st.lists(st.text("ab-1", min_size=1, max_size=4), unique=True, max_size=40).map(sorted)
PATTERNS = st.lists(st.text("ab-1*?", min_size=1, max_size=4), max_size=4).map(tuple)
SIMPLE = st.lists(st.text("ab-1", max_size=3).map(lambda begin: f"{begin}*"), max_size=4).map(tuple)


@given(PATTERNS, NAMES)
def test_a_pattern_has_the_names_that_a_shell_would_say(patterns: tuple[str, ...], names: list[str]) -> None:
    right = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    found = NamePatterns(patterns)
    assert [name for name in names if found.match(name)] == right
    assert found.within(names) == right
    assert found.within(tuple(names)) == right


@given(PATTERNS, NAMES, st.text("ab-1", max_size=4))
def test_what_is_near_is_what_a_pattern_has(patterns: tuple[str, ...], names: list[str], name: str) -> None:
    found = NamePatterns(patterns)
    near = found.near(names, name, 4)
    assert len(near) <= 4
    assert near == sorted(set(near) & set(found.within(names)))


@given(SIMPLE, NAMES, st.text("ab-1", max_size=4))
def test_what_is_near_are_the_names_beside(patterns: tuple[str, ...], names: list[str], name: str) -> None:
    found = NamePatterns((*patterns, "ab", "1"))
    assert found.near(names, name, 4) == nearest(found.within(names), name, 4)


@given(SIMPLE, NAMES, NAMES, st.text("ab-1", max_size=4))
def test_names_that_no_pattern_has_change_nothing(
    patterns: tuple[str, ...], names: list[str], others: list[str], name: str
) -> None:
    """Else who asks for names that are not there would learn how many there are that it may not know."""
    found = NamePatterns(patterns)
    mine = found.within(names)
    hidden = [other for other in others if not found.match(other)]
    assert found.near(sorted({*mine, *hidden}), name, 4) == found.near(mine, name, 4)


@pytest.mark.parametrize("pattern", ["*a" * 31, "?*" * 31 + "b", "a*" * 31 + "b"])
def test_a_pattern_of_many_wildcards_takes_no_time(pattern: str) -> None:
    assert not NamePatterns((pattern,)).match("a" * 62 + "-")


def test_a_keys_patterns_are_compiled_once() -> None:
    assert name_patterns(("acme-*", "x?")) is name_patterns(("acme-*", "x?"))


def test_among_thousands_of_names_those_beside_the_one_are_the_nearest() -> None:
    many = [f"name-{number:05d}" for number in range(5000)]
    near = nearest(many, "name-02500x", 64)
    assert "name-02500" in near
    assert len(near) == 64
    assert nearest(["few", "names"], "anything", 64) == ["few", "names"]
    assert nearest(many, "zzz", 64) == many[-32:]
