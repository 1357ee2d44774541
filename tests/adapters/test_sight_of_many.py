"""What it costs to ask for a name among ten thousand: pattern matches are counted, and names compared."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from server.adapters.asker import Asker, ask_as
from server.adapters.catalog import AdapterVersion, Copy
from server.adapters.host import HostTier
from server.adapters.name_patterns import NamePatterns
from server.adapters.registry import Registry
from server.adapters.store.folder_store import Store
from server.ground.errors import AdapterNotFound
from tests.adapters.folders import load_folder
from tests.adapters.test_registry import ROW_BYTES, Table

NUM_ADAPTERS = 10_000
OWNERS = (None, "acme", "beta")
MANY_PATTERNS = tuple(f"{prefix}-{number}-*" for prefix in ("acme", "public") for number in range(32))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Its adapters are notes in the catalog: what a look at a name costs never reads a file."""
    store = Store(tmp_path_factory.mktemp("many"), create=True)
    registry = Registry(store, (), HostTier(ROW_BYTES, torch.float32), Table(4), load_folder)
    catalog = registry._books.catalog
    for number in range(NUM_ADAPTERS):
        owner = OWNERS[number % 3]
        version = AdapterVersion(f"{owner or 'public'}-{number}", f"{number:064x}")
        catalog.add(Copy(version, catalog.content(version.digest), Path("none"), 1, 2, None, owner=owner))
    yield registry
    registry.close()


class Counts:
    """Pattern matches and comparisons of names since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.matches = self.compared = 0
        match, close = NamePatterns.match, difflib.get_close_matches

        def counted_match(patterns: NamePatterns, name: str) -> bool:
            self.matches += 1
            return match(patterns, name)

        def counted_close(name: str, names: list[str]) -> list[str]:
            self.compared += len(names)
            return close(name, names)

        monkeypatch.setattr(NamePatterns, "match", counted_match)
        monkeypatch.setattr(difflib, "get_close_matches", counted_close)

    def of(self, ask: Callable[[], object]) -> tuple[int, int]:
        """(matches, comparisons) of what is asked, found or not."""
        self.matches = self.compared = 0
        with suppress(AdapterNotFound):
            ask()
        return self.matches, self.compared


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.mark.parametrize("names", [("*",), MANY_PATTERNS, ("*-7", "p?blic-*"), ()])
async def test_an_unknown_name_costs_no_look_at_all_names(
    registry: Registry, counts: Counts, names: tuple[str, ...]
) -> None:
    ask_as(Asker("acme", "acme", names))
    for name in ("nobody", "acme-12x", "beta-2", "public-9x", "zzz", ""):
        for ask in (registry.lease, registry.describe, registry.versions, registry.delete, registry.unload):
            matches, compared = counts.of(lambda ask=ask, name=name: ask(name))  # type: ignore[misc]
            assert matches <= 2, "of the name itself"
            assert compared <= 64
        assert counts.of(lambda name=name: registry.names_near(name, 20))[0] == 0  # type: ignore[misc]


async def test_a_list_looks_at_what_is_seen_alone(registry: Registry, counts: Counts) -> None:
    ask_as(Asker("acme", "acme", MANY_PATTERNS))
    assert registry.names() == ()
    seen = [name for name in registry._books.catalog.entries if not name.startswith("beta")]
    ask_as(Asker("acme", "acme", ("acme-1*", "public-9999", "beta-*")))
    right = sorted(name for name in seen if name.startswith("acme-1") or name == "public-9999")
    assert counts.of(registry.names) == (0, 0)
    assert list(registry.names()) == right
    assert [info.name for info in registry.list(after=right[4], limit=3)] == right[5:8]
    assert counts.of(lambda: registry.list(after=right[4], limit=3)) == (3, 0)


async def test_a_name_that_is_close_is_suggested_if_it_is_seen(registry: Registry) -> None:
    ask_as(Asker("acme", "acme", ("acme-*",)))
    with pytest.raises(AdapterNotFound, match="Did you mean .*acme-1000"):
        registry.describe("acme-1000x")
    with pytest.raises(AdapterNotFound) as refused:
        registry.describe("public-9999x")
    assert "public" not in refused.value.message.replace("public-9999x", "")


async def test_the_operator_sees_all(registry: Registry, counts: Counts) -> None:
    assert len(registry.names()) == NUM_ADAPTERS
    assert counts.of(registry.names) == (0, 0)
    with pytest.raises(AdapterNotFound, match="beta-5"):
        registry.describe("beta-5x")
