"""The versions of a name: the history, the way back, and what running requests keep."""

import os

import pytest

from server.adapters.format.content import CONFIG_FILE
from server.adapters.sources import LocalFolder
from server.ground.errors import AdapterDamaged, AdapterNotFound, BadRequest, Conflict, GraftError
from tests.adapters.folders import write_folder
from tests.adapters.test_registry import Build, build, is_content_on

__all__ = ["build"]  # the fixture


def test_the_history_lists_what_is_kept_the_newest_first(build: Build) -> None:
    house = build()
    digests = [house.upload("legal", seed, replace=True).digest for seed in range(3)]
    infos = house.registry.versions("legal")
    assert [info.digest for info in infos] == digests[::-1]
    assert all(info.versions[-1] == digests[-1] for info in infos)
    with pytest.raises(AdapterNotFound):
        house.registry.versions("lega")


def test_going_back_is_one_call_and_going_forward_another(build: Build) -> None:
    house = build()
    first, second = (house.upload("legal", seed, replace=True).digest for seed in (1, 2))
    info, before = house.registry.roll_back("legal")
    assert (info.digest, before.digest, info.versions) == (first, second, (second, first))
    info, before = house.registry.roll_back("legal")
    assert (info.digest, before.digest) == (second, first)


def test_going_back_survives_a_restart(build: Build) -> None:
    house = build()
    digests = [house.upload("legal", seed, replace=True).digest for seed in (1, 2, 3)]
    house.registry.roll_back("legal", digests[0][:8])
    after = house.reopened()
    info = after.registry.describe("legal")
    assert (info.digest, info.versions) == (digests[0], (digests[1], digests[2], digests[0]))
    with after.registry.lease("legal") as lease:
        assert is_content_on(after, lease, 1)
    after.registry.close()
    assert os.listdir(house.store.root / ".incoming") == []


def test_running_requests_keep_their_version_over_a_rollback(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    house.upload("legal", 2, replace=True)
    with house.registry.lease("legal") as old:
        house.registry.roll_back("legal")
        with house.registry.lease("legal") as new:
            assert is_content_on(house, old, 2)
            assert is_content_on(house, new, 1)


def test_a_rollback_to_the_current_version_changes_nothing(build: Build) -> None:
    house = build()
    digests = tuple(house.upload("legal", seed, replace=True).digest for seed in (1, 2))
    info, before = house.registry.roll_back("legal", digests[1])
    assert (info.digest, before.digest, info.versions) == (digests[1], digests[1], digests)


def test_there_may_be_nothing_to_go_back_to(build: Build) -> None:
    house = build({"legal": 1})
    with pytest.raises(Conflict, match="no earlier version"):
        house.registry.roll_back("legal")
    with pytest.raises(AdapterNotFound, match="has no version 000000"):
        house.registry.roll_back("legal", "000000")
    with pytest.raises(BadRequest, match="hex digits"):
        house.registry.roll_back("legal", "latest")
    with pytest.raises(AdapterNotFound, match="Did you mean legal"):
        house.registry.roll_back("legals")


def test_a_version_that_cannot_be_loaded_does_not_become_current(build: Build) -> None:
    house = build()
    first, second = (house.upload("legal", seed, replace=True).digest for seed in (1, 2))
    house.registry.unload(f"legal@{first}")
    (house.store.folder("legal", first) / CONFIG_FILE).write_text('{"peft_type": "OTHER"}', encoding="utf-8")
    with pytest.raises(AdapterDamaged, match=r"legal@[0-9a-f]{12} in the store are damaged"):
        house.registry.roll_back("legal")
    assert house.registry.describe("legal").digest == second == house.store.current("legal")


def test_a_disk_that_refuses_leaves_the_name_as_it_was(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = build()
    _, second = (house.upload("legal", seed, replace=True).digest for seed in (1, 2))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(house.store, "_write_index", refuse)
        with pytest.raises(GraftError, match="No space left"):
            house.registry.roll_back("legal")
    assert house.registry.describe("legal").digest == second == house.store.current("legal")
    assert os.listdir(house.store.root / ".incoming") == []


def test_what_is_read_in_place_has_no_way_back(build: Build) -> None:
    scratch = build().root
    house = build(sources=(LocalFolder("mine", write_folder(scratch / "mine", 1)),))
    assert len(house.registry.versions("mine")) == 1
    with pytest.raises(Conflict, match="read in place"):
        house.registry.roll_back("mine")


def test_uses_are_counted_by_version_and_the_registrys_own_looks_are_none(build: Build) -> None:
    house = build()
    first = house.upload("legal", 1)
    house.registry.verify("legal")
    house.registry.load("legal")
    assert (first.num_requests, house.registry.describe("legal").last_used) == (0, None)
    house.registry.lease("legal").release()
    house.upload("legal", 2, replace=True)
    house.registry.lease("legal").release()
    house.registry.lease(f"legal@{first.digest[:12]}").release()
    new, old = house.registry.versions("legal")
    assert (new.num_requests, old.num_requests) == (1, 2)
    assert old.last_used is not None
    assert new.last_used is not None
    assert old.last_used >= first.created
