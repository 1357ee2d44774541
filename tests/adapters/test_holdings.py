"""An owner's room in the store: what counts, until when, and what an upload adds to it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from server.ground.errors import StorageFull
from tests.adapters.asking import asked_by
from tests.adapters.replicas import Replica
from tests.adapters.test_registry import House


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with ExitStack() as closing:

        def make(**options: int) -> House:
            house = House(tmp_path, **options)  # type: ignore[arg-type]
            closing.callback(house.registry.close)
            return house

        yield make


@pytest.fixture
def house(make: Callable[..., House]) -> House:
    return make()


def uploaded(house: House, name: str, seed: int, *, room: int, rank: int = 2, owner: str = "acme") -> int:
    """The bytes of an adapter that an owner has uploaded who may have `room` bytes in all."""
    info = asked_by(owner, house.upload, name, seed, rank=rank, replace=True, limits={"max_bytes": room})
    return info.content_bytes


@pytest.fixture
def size(house: House) -> int:
    """The bytes of each adapter here, whatever its seed: an owner of its own has one."""
    return uploaded(house, "of-another", 100, room=1 << 30, owner="beta")


def announced(house: House, num_bytes: int, name: str | None = None, **limits: int) -> None:
    asked_by("acme", house.registry.check_room, num_bytes, name, limits=limits)


def test_a_deleted_version_counts_until_the_last_request_on_it_has_ended(house: House, size: int) -> None:
    uploaded(house, "legal", 1, room=size)
    with asked_by("acme", house.registry.lease, "legal"):
        asked_by("acme", house.registry.delete, "legal")
        with pytest.raises(StorageFull, match=rf"They take {size} \({size} of them deleted ones") as refused:
            uploaded(house, "next", 2, room=size)
        assert refused.value.code == "quota_exceeded"
        with pytest.raises(StorageFull):
            announced(house, size, "next", max_bytes=size)
    uploaded(house, "next", 2, room=size)


def test_a_deleted_name_is_no_longer_one_of_those_that_an_owner_may_have(house: House) -> None:
    limits = {"max_adapters": 1}
    asked_by("acme", house.upload, "legal", 1, limits=limits)
    with pytest.raises(StorageFull):
        announced(house, 0, "next", **limits)
    with asked_by("acme", house.registry.lease, "legal"):
        asked_by("acme", house.registry.delete, "legal")
        asked_by("acme", house.upload, "next", 2, limits=limits)
    asked_by("acme", house.upload, "next", 3, replace=True, limits=limits)


def test_what_is_replaced_goes_on_to_count_because_it_is_kept(house: House, size: int) -> None:
    uploaded(house, "legal", 1, room=size)
    with pytest.raises(StorageFull, match=f"they would take {2 * size}"):
        uploaded(house, "legal", 2, room=size)
    uploaded(house, "legal", 2, room=2 * size)


def test_a_version_that_an_upload_pushes_out_does_not_count(make: Callable[..., House], size: int) -> None:
    house = make(max_versions=2)
    for seed in range(4):
        uploaded(house, "legal", seed, room=2 * size)
    announced(house, size, "legal", max_bytes=2 * size)
    announced(house, size, max_bytes=2 * size)
    kept = asked_by("acme", house.registry.describe, "legal").versions
    with asked_by("acme", house.registry.lease, f"legal@{kept[0]}"), pytest.raises(StorageFull):
        uploaded(house, "legal", 9, room=2 * size)  # nor does it go where a request holds it
    with pytest.raises(StorageFull):
        uploaded(house, "other", 9, room=2 * size)


def test_content_that_a_name_has_already_adds_nothing(house: House, size: int) -> None:
    for seed in (1, 2, 1, 1, 2):
        uploaded(house, "legal", seed, room=2 * size)
    uploaded(house, "legal", 1, room=size)  # though the limit is lower now
    announced(house, size, "legal", max_bytes=size)
    announced(house, size, max_bytes=size)


def test_what_is_stored_and_what_is_announced_are_refused_together(house: House, size: int) -> None:
    uploaded(house, "legal", 1, room=size)
    announced(house, size, "next", max_bytes=2 * size)
    with pytest.raises(StorageFull, match=f"may take {2 * size} bytes.* They take {size}, .* take {2 * size + 1}: del"):
        announced(house, size + 1, "next", max_bytes=2 * size)
    with pytest.raises(StorageFull):
        announced(house, size + 1, max_bytes=2 * size)  # under whatever name: it is no version of any
    announced(house, size, max_bytes=2 * size)


def test_nobody_elses_adapters_count_and_the_operator_has_no_limit(house: House, size: int) -> None:
    house.upload("the-operators", 1)
    uploaded(house, "legal", 2, room=size)
    asked_by(None, house.upload, "more", 3, limits={"max_bytes": 1, "max_adapters": 1})


def test_room_that_another_server_has_made_is_seen_before_an_upload_is_refused(tmp_path: Path) -> None:
    client = MemoryStore()
    first, second = Replica(client, tmp_path / "a"), Replica(client, tmp_path / "b")
    asked_by("acme", first.upload, "legal", 1)
    second.registry.refresh()
    limits = {"max_adapters": 1}
    with pytest.raises(StorageFull):
        asked_by("acme", second.registry.check_room, 0, "next", limits=limits)
    asked_by("acme", first.registry.delete, "legal")
    asked_by("acme", second.registry.check_room, 0, "next", limits=limits)
    for replica in (first, second):
        replica.close()
