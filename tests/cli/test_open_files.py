"""How many connections fit under the process's limit of open files."""

import resource

import pytest

from server.cli.open_files import OTHER_FILES, room_for

Limits = tuple[int, int]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Limits]:
    """The limits in force, the last one now: not the process's own, which a test could not raise again."""
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    return limits


def test_a_limit_that_is_enough_is_left_alone(limits: list[Limits]) -> None:
    assert room_for(512) == 512
    assert limits == [(1024, 4096)]


def test_the_soft_limit_is_raised_as_far_as_that_needs(limits: list[Limits]) -> None:
    assert room_for(1000) == 1000
    assert limits[-1] == (1000 + OTHER_FILES, 4096)


def test_what_the_system_does_not_allow_is_not_promised(limits: list[Limits]) -> None:
    assert room_for(100_000) == 4096 - OTHER_FILES
    assert limits[-1] == (4096, 4096)
    limits.append((100, 100))
    assert room_for(4096) == 1


def test_no_limit_is_none(limits: list[Limits]) -> None:
    limits.append((1024, resource.RLIM_INFINITY))
    assert room_for(4096) == 4096
    limits.append((resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert room_for(10**6) == 10**6
