"""The registry's books: what a name means, and what stays of a version that leaves it."""

from pathlib import Path

import pytest

from server.adapters.catalog import AdapterVersion, Catalog, Copy
from server.ground.errors import AdapterNotFound

OLD, NEW = "a" * 64, "b" * 64


def listed(catalog: Catalog, digest: str) -> Copy:
    version = AdapterVersion("legal", digest)
    copy = Copy(version, catalog.content(digest), Path(digest), created=1, content_bytes=2, base_model=None)
    catalog.add(copy)
    return copy


@pytest.fixture
def catalog() -> Catalog:
    return Catalog()


def test_the_last_added_is_what_a_name_means(catalog: Catalog) -> None:
    old, new = listed(catalog, OLD), listed(catalog, NEW)
    assert catalog.find("legal") is new
    assert catalog.find("legal@aaaaaa") is old
    catalog.make_current(old)
    assert catalog.find("legal") is old
    assert list(catalog.entries["legal"].copies) == [NEW, OLD], "the current one is the last"


def test_a_version_that_is_taken_out_is_no_longer_found_and_stays_for_its_lease(catalog: Catalog) -> None:
    old, new = listed(catalog, OLD), listed(catalog, NEW)
    old.num_leases = 1
    catalog.remove_version(old)
    with pytest.raises(AdapterNotFound, match="has no version"):
        catalog.find("legal@aaaaaa")
    assert catalog.find("legal") is new
    assert (old.is_listed, catalog.contents[OLD].copies) == (False, [old])
    assert all(catalog.integrity_checks().values())
    old.num_leases = 0
    assert not all(catalog.integrity_checks().values()), "somebody has to let it go"
