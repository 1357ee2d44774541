"""A change is held to the owner that the store has at that moment: another server may have been there just before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from server.adapters.elsewhere import LOOK_MEMORY_S
from server.adapters.store.folder_store import Record, Store
from server.ground.errors import AdapterNotFound, Conflict, Forbidden, GraftError
from tests.adapters.asking import asked_by
from tests.adapters.folders import incoming_from, write_folder
from tests.adapters.replicas import Replica, files_of
from tests.adapters.test_registry import House


class Pair:
    """Two servers on one store. `second` has not seen what `before_write` does when it decides on its own change."""

    first: House | Replica
    second: House | Replica

    def before_write(self, act: Callable[[], object]) -> None:
        raise NotImplementedError


class OnFolder(Pair):
    """A server reads a folder when it starts, and never again."""

    def __init__(self, root: Path, closing: ExitStack) -> None:
        self.first, self.second = House(root / "a"), House(root / "a")
        for house in (self.first, self.second):
            closing.callback(house.registry.close)

    def before_write(self, act: Callable[[], object]) -> None:
        act()


class OnBucket(Pair):
    """A server looks at a bucket before each change; what comes after that look is what it has not seen."""

    def __init__(self, root: Path, closing: ExitStack) -> None:
        self.client = MemoryStore()
        self.first, self.second = Replica(self.client, root / "a"), Replica(self.client, root / "b")
        for replica in (self.first, self.second):
            closing.callback(replica.close)

    def before_write(self, act: Callable[[], object]) -> None:
        assert isinstance(self.second, Replica)
        self.second.registry.refresh()
        wire = self.second.wire

        def intervene(verb: str, path: str) -> None:
            if verb != "list":
                wire.before = lambda verb, path: None
                act()

        wire.before = intervene


@pytest.fixture(params=[OnFolder, OnBucket])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as closing:
        yield request.param(tmp_path, closing)


def owners(house: House | Replica, name: str) -> list[str | None]:
    """Whose the versions of a name are in the store."""
    return [version.record.owner for version in house.store.versions(name)]


def refusal(owner: str, act: Callable[[], object]) -> GraftError:
    with pytest.raises(GraftError) as refused:
        asked_by(owner, act)
    return refused.value


@pytest.mark.parametrize(("seed", "replace"), [(2, False), (2, True), (1, False), (1, True)])
def test_a_name_that_was_taken_a_moment_ago_is_refused_as_one_that_is_known(
    pair: Pair, seed: int, replace: bool
) -> None:
    pair.before_write(lambda: asked_by("acme", pair.first.upload, "legal", 1))
    late = refusal("beta", lambda: pair.second.upload("legal", seed, replace=replace))
    known = refusal("beta", lambda: pair.first.upload("legal", seed, replace=replace))
    assert isinstance(late, Conflict)
    assert (late.message, late.code, late.param) == (known.message, known.code, known.param)
    assert late.code == "name_unavailable"
    assert "acme" not in late.message
    assert owners(pair.first, "legal") == ["acme"]


def test_what_was_sent_for_a_name_that_was_taken_meanwhile_is_removed(tmp_path: Path) -> None:
    with ExitStack() as closing:
        pair = OnBucket(tmp_path, closing)
        assert isinstance(pair.second, Replica)
        wire = pair.second.wire

        def intervene(verb: str, path: str) -> None:
            if verb == "put" and path.startswith("versions/"):
                wire.before = lambda verb, path: None
                asked_by("acme", pair.first.upload, "legal", 1)

        wire.before = intervene
        assert refusal("beta", lambda: pair.second.upload("legal", 2, replace=True)).code == "name_unavailable"
        assert owners(pair.first, "legal") == ["acme"]
        assert len(files_of(pair.client, "legal")) == 2, "acme's config and weights, and nothing of beta's"


def test_a_name_outside_the_patterns_is_refused_in_the_same_words_whether_it_is_taken_or_free(pair: Pair) -> None:
    limits = {"names": ("beta-*",)}
    pair.before_write(lambda: asked_by("acme", pair.first.upload, "legal", 1))
    told = []
    for name in ("legal", "never"):
        with pytest.raises(Conflict) as refused:
            asked_by("beta", pair.second.upload, name, 2, limits=limits)
        told.append(refused.value.message.replace(name, "NAME"))
    assert told[0] == told[1]


def test_what_replaces_an_owners_adapter_by_the_operators_hand_stays_the_owners(pair: Pair) -> None:
    pair.before_write(lambda: asked_by("acme", pair.first.upload, "legal", 1))
    pair.second.upload("legal", 2, replace=True)
    assert owners(pair.first, "legal") == ["acme", "acme"]
    assert asked_by("acme", pair.second.registry.describe, "legal").owner == "acme"
    with pytest.raises(AdapterNotFound):
        asked_by("beta", pair.second.registry.describe, "legal")


def test_what_another_owner_has_taken_since_is_neither_deleted_nor_rolled_back(pair: Pair) -> None:
    for seed in (1, 2):
        asked_by("beta", pair.second.upload, "legal", seed, replace=True)

    def take() -> None:
        pair.first.store.delete("legal")
        with incoming_from(pair.first.store, write_folder(pair.first.root / "taken", 1)) as incoming:
            asked_by("acme", pair.first.store.put, incoming, "legal", Record(created=1), replace=False)

    pair.before_write(take)
    missing = refusal("beta", lambda: pair.second.registry.roll_back("legal"))
    assert isinstance(missing, AdapterNotFound)
    assert owners(pair.first, "legal") == ["acme"]
    with pytest.raises(AdapterNotFound):  # the name alone is left of what it had
        asked_by("beta", pair.second.store.discard, "legal")
    if isinstance(pair, OnFolder):  # this server still lists what was beta's: it lets go of that
        asked_by("beta", pair.second.registry.delete, "legal")
    else:
        assert isinstance(refusal("beta", lambda: pair.second.registry.delete("legal")), AdapterNotFound)
    assert owners(pair.first, "legal") == ["acme"]


def test_what_the_operator_has_taken_since_is_theirs(pair: Pair) -> None:
    asked_by("beta", pair.second.upload, "legal", 1)

    def take() -> None:
        pair.first.store.delete("legal")
        with incoming_from(pair.first.store, write_folder(pair.first.root / "taken", 1)) as incoming:
            asked_by(None, pair.first.store.put, incoming, "legal", Record(created=1), replace=False)

    pair.before_write(take)
    assert isinstance(refusal("beta", lambda: pair.second.registry.delete("legal")), Forbidden)
    assert owners(pair.first, "legal") == [None]


def test_equal_content_that_has_another_owner_now_is_another_adapter(tmp_path: Path) -> None:
    """A look at the store finds the same name with the same digest, and somebody else's."""
    client = MemoryStore()
    first, second = Replica(client, tmp_path / "a"), Replica(client, tmp_path / "b")
    digest = asked_by("beta", second.upload, "legal", 1).digest
    with asked_by("beta", second.request, "legal") as running:
        asked_by("beta", first.registry.delete, "legal")
        asked_by("acme", first.upload, "legal", 1)
        second.now_s += LOOK_MEMORY_S
        second.registry.refresh()
        assert running.version.digest == digest
        with pytest.raises(AdapterNotFound):
            asked_by("beta", second.registry.lease, "legal")
        info = asked_by("acme", second.registry.describe, "legal")
        assert (info.digest, info.owner, info.num_requests, info.num_leases) == (digest, "acme", 0, 0)
    for replica in (first, second):
        replica.close()


def test_a_record_that_was_lost_gives_a_name_to_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True)

    def put(owner: str, seed: int) -> None:
        with incoming_from(store, write_folder(tmp_path / str(seed), seed)) as incoming:
            asked_by(owner, store.put, incoming, "legal", Record(created=1), replace=True)

    put("acme", 1)
    put("acme", 2)
    (store.folder("legal", store.current("legal")) / "record.json").unlink()
    with pytest.raises(Conflict):
        put("beta", 3)
    put("acme", 2)
    assert [version.record.owner for version in store.versions("legal")] == ["acme", "acme"]
    for version in store.versions("legal"):
        (version.folder / "record.json").unlink()
    with pytest.raises(Conflict):
        put("beta", 3)
