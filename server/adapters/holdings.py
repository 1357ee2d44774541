"""What an owner has in the store, and whether an upload has room beside it.

Owns what counts as the owner's: every version that a name has, and those deleted ones whose files stay for the requests
that run on them. Knows nothing about the limits of the store itself (`quota`), or how versions are kept. All of it runs
under the registry's lock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from server.adapters.asker import current_asker
from server.adapters.catalog import Catalog, Entry


@dataclass(frozen=True, slots=True)
class Coming:
    """An upload, as far as it is known."""

    num_bytes: int  # of its files; until all of them are there, at least so many
    name: str | None = None
    digest: str | None = None


def check_room(catalog: Catalog, coming: Coming, max_versions: int | None) -> None:
    """Raises StorageFull if who asks may not have this upload beside what its owner has.

    Versions are kept, so what is replaced goes on to count, but for those that the upload pushes out, `max_versions` of
    a name being kept. What is not known yet is taken in the upload's favour: it may be a version that its name has.
    """
    asker = current_asker()
    if asker.owner is None or asker.max_bytes is asker.max_adapters is None:
        return
    own = catalog.entries_of(asker.owner)
    listed = sum(copy.content_bytes for entry in own.values() for copy in entry.copies.values())
    deleted = _deleted_bytes(catalog, asker.owner)
    added = coming.num_bytes
    if asker.max_bytes is not None and listed + deleted + added > asker.max_bytes:  # else the name does not matter
        names = [*own, None] if coming.name is None else [coming.name]
        added = min(_added_bytes(catalog, own, name, coming, max_versions) for name in names)
    asker.check_room(
        taken_bytes=listed + deleted,
        deleted_bytes=deleted,
        added_bytes=added,
        num_adapters=len(own),
        is_new_name=coming.name is not None and coming.name not in own,
    )


def _deleted_bytes(catalog: Catalog, owner: str) -> int:
    """Of versions that no name has any more, and whose files are in the store until the last request on them ends."""
    return sum(copy.content_bytes for copy in catalog.unlisted if copy.discarded is not None and copy.owner == owner)


def _added_bytes(
    catalog: Catalog, own: Mapping[str, Entry], name: str | None, coming: Coming, max_versions: int | None
) -> int:
    """By how much the owner would have more at least, if the upload came under this name; None: a new one."""
    if name is None or name not in own:
        return coming.num_bytes
    copies = own[name].copies
    if coming.digest is None:
        is_known = any(copy.content_bytes >= coming.num_bytes for copy in copies.values())
    else:
        is_known = coming.digest in copies
    if is_known:
        return 0
    pushed_out = catalog.to_prune(name, max_versions, num_new=1)
    return coming.num_bytes - sum(copy.content_bytes for copy in pushed_out)
