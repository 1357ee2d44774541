"""Errors cross from one process to the other with all that they say."""

import pickle
from collections.abc import Iterator

import pytest

from server.apart.portable import portable
from server.ground import errors
from server.ground.errors import AdapterOnItsWay, GraftError, Overloaded, RateLimited, StoreUnreachable
from server.model.grammar_trial import GrammarRefused

TOLD = ("message", "param", "code", "status", "type", "reason", "retry_after_s", "args")


def kinds(of: type[GraftError] = GraftError) -> Iterator[type[GraftError]]:
    yield of
    for kind in of.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def facts(error: BaseException) -> dict[str, object]:
    return {name: getattr(error, name) for name in TOLD if hasattr(error, name)}


def made(kind: type[GraftError]) -> GraftError:
    if issubclass(kind, RateLimited | StoreUnreachable):
        return kind("Wait.", retry_after_s=17)
    if issubclass(kind, Overloaded):
        return kind("Wait.", retry_after_s=17, reason="shutting_down")
    return kind("Change it.", param="prompt", code="special")


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_every_error_of_ours_says_the_same_over_there(kind: type[GraftError]) -> None:
    error = made(kind)
    try:
        raise error from ValueError("its cause")
    except GraftError as raised:
        crossed = pickle.loads(pickle.dumps(portable(raised)))
    assert type(crossed) is kind
    assert facts(crossed) == facts(error)


def test_there_is_one_of_every_kind() -> None:
    assert len(list(kinds())) > 25
    assert AdapterOnItsWay in kinds()


def test_a_system_error_keeps_its_number() -> None:
    crossed = portable(FileNotFoundError(2, "No such file", "there"))
    assert isinstance(crossed, FileNotFoundError)
    assert (crossed.errno, crossed.strerror, crossed.filename) == (2, "No such file", "there")


class Stubborn(Exception):
    """One that cannot be made again from what it was raised with."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [Stubborn("a", "b"), ValueError(lambda: None)], ids=["made", "held"])
def test_what_cannot_cross_is_told_all_the_same(error: Exception) -> None:
    crossed = portable(error)
    assert type(crossed) is RuntimeError
    assert type(error).__name__ in str(crossed)
    pickle.dumps(crossed)


def test_a_defect_says_where_it_was_raised() -> None:
    try:
        _ = {}["nowhere"]  # type: ignore[var-annotated]
    except KeyError as error:
        crossed = portable(error)
    assert "test_a_defect_says_where_it_was_raised" in "".join(crossed.__notes__)


@pytest.mark.parametrize("error", [GrammarRefused("no such thing"), KeyError("one of the registry's")], ids=repr)
def test_an_error_that_is_told_to_many_is_told_alike(error: Exception) -> None:
    """A refusal is kept, and every request with the same grammar meets it."""
    sizes = {len(pickle.dumps(portable(error))) for _ in range(20)}
    assert len(sizes) == 1
    assert not hasattr(error, "__notes__")


class Panic(BaseException):
    """As libraries in Rust raise it."""


def test_what_is_no_exception_crosses_as_one() -> None:
    crossed = portable(Panic("index out of bounds"))
    assert type(crossed) is RuntimeError
    assert "Panic: index out of bounds" in str(crossed)
