"""A failure of a content that several owners have tells each of them of their own adapter, and of no other's."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from obstore.store import MemoryStore

from server.adapters.catalog import AdapterVersion
from server.adapters.format.content import CONFIG_FILE
from server.adapters.method import Edit, Lowered
from server.adapters.naming import label, told
from server.ground.errors import AdapterDamaged, AdapterNotFound, BadRequest, GraftError, Overloaded
from tests.adapters.asking import asked_by
from tests.adapters.folders import WIDTH, load_folder
from tests.adapters.replicas import Replica, files_of
from tests.adapters.test_registry import Build, House, build

__all__ = ["build"]

ONE = AdapterVersion("one", "a" * 64)


def test_a_label_becomes_the_name_that_who_asks_has_for_the_content() -> None:
    failure = Overloaded(f"The files of {label(ONE.digest)} and {label('b' * 64)} changed.", retry_after_s=7)
    own = told(failure, [ONE])
    assert own.message == str(own) == "The files of one@aaaaaaaaaaaa and @bbbbbbbbbbbb changed."
    assert isinstance(own, Overloaded)
    assert own.retry_after_s == 7
    assert label(ONE.digest) in failure.message, "which others are told, too"


@pytest.mark.parametrize("text", ["other@aaaaaaaaaaaa", "@aaaaaaaaaaaaa", "@aaaaaaaaaaa", "aaaaaaaaaaaa"])
def test_what_is_no_label_stays_as_it_is(text: str) -> None:
    assert told(GraftError(text), [ONE]).message == text


def shared(house: House | Replica) -> None:
    """Equal content of two owners: acme's `secret-*`, of which each was first, and beta's `mine-*`."""
    for owner, prefix in (("acme", "secret"), ("beta", "mine")):
        for seed in (1, 2):
            asked_by(owner, house.upload, f"{prefix}-{seed}", seed)


def messages(owner: str, *acts: Callable[[], object]) -> list[str]:
    found = []
    for act in acts:
        with pytest.raises(GraftError) as refused:
            asked_by(owner, act)
        found.append(refused.value.message)
    return found


def damage(house: House, *names: str) -> None:
    for name in names:
        (house.store.folder(name, house.store.current(name)) / CONFIG_FILE).write_text("{}", encoding="utf-8")


def cold(house: House) -> House:
    """After a restart, when nothing is on the host."""
    shared(house)
    return house.reopened()


def test_damaged_files_are_told_under_ones_own_name(build: Build) -> None:
    house = cold(build())
    damage(house, "secret-1", "mine-1")
    for owner, own, others in (("acme", "secret-1@", "mine"), ("beta", "mine-1@", "secret")):
        name = own.removesuffix("@")
        first = asked_by(owner, house.registry.lease, name)
        with first, pytest.raises(AdapterDamaged) as admitted:
            house.admit(first)
        verbs = (house.registry.lease, house.registry.verify, house.registry.load)
        heard = [admitted.value.message, *messages(owner, *(partial(verb, name) for verb in verbs))]
        assert all(own in message and others not in message for message in heard), heard
        house.now_s += 60
    house.registry.close()


def test_what_is_damaged_in_one_owners_folder_is_read_from_anothers(build: Build) -> None:
    house = cold(build())
    damage(house, "secret-1")
    asked_by("beta", house.registry.verify, "mine-1")
    damage(house, "mine-2")
    asked_by("beta", house.registry.verify, "mine-2")
    house.registry.close()


def test_a_read_for_a_merge_is_told_of_in_the_same_way(build: Build) -> None:
    house = cold(build())
    damage(house, "secret-1", "mine-1")
    with asked_by("beta", house.registry.hold, "mine-1") as lease, pytest.raises(AdapterDamaged, match="mine-1@"):
        house.registry.read(lease, load_folder)
    house.registry.close()


def test_an_equal_mix_that_failed_for_another_is_told_with_ones_own_parts(build: Build) -> None:
    def scales(folder: Path) -> Lowered:
        """What scales a site's input cannot be added to what scales its output."""
        field = "in_scale" if folder.parent.name.endswith("1") else "out_scale"
        return replace(load_folder(folder), edits={"layers.0.q_proj": Edit(**{field: torch.ones(WIDTH)})})

    house = build(load=load_folder)
    shared(house)
    house = house.reopened(load=scales)
    mix = asked_by("acme", house.registry.lease_mix, [("secret-1", 0.5), ("secret-2", 0.5)])
    assert mix is not None
    with mix, pytest.raises(BadRequest, match=r"secret-1@.* scales the input .* secret-2@.* its output"):
        house.admit(mix)
    with pytest.raises(BadRequest, match=r"mine-1@.* scales the input .* mine-2@.* its output") as refused:
        asked_by("beta", house.registry.lease_mix, [("mine-1", 0.5), ("mine-2", 0.5)])
    assert "secret" not in refused.value.message
    house.registry.close()


def test_damaged_objects_are_told_under_ones_own_name(tmp_path: Path) -> None:
    client = MemoryStore()
    first = Replica(client, tmp_path / "a")
    shared(first)
    for path in [*files_of(client, "secret-1"), *files_of(client, "mine-1")]:
        client.put(path, b"rubbish")
    second = Replica(client, tmp_path / "b")
    (heard,) = messages("beta", lambda: second.registry.verify("mine-1"))
    assert "mine-1@" in heard
    assert "secret" not in heard
    with pytest.raises(AdapterNotFound):
        asked_by("beta", second.registry.verify, "secret-1")
    for replica in (first, second):
        replica.close()
