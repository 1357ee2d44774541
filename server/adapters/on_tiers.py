"""Which adapters host and device have at a moment, by name.

Owns the gathering of a name's versions into one value. Knows nothing about who asks, or how a tier keeps its bytes.
"""

from collections.abc import Sequence

from server.adapters.books import Books
from server.adapters.catalog import Copy
from server.adapters.host import HostTier
from server.adapters.residency import Residency
from server.ground.adapter_series import AdapterState


def on_tiers(books: Books, host: HostTier, residency: Residency) -> tuple[AdapterState, ...]:
    """In no order, without sequences; mixes are left out. Its cost is theirs, however many there are in the store."""
    on_host = set(host.digests())
    with books.lock:  # which the engine may wait for: thousands of adapters are sorted after it
        known = books.catalog.contents
        contents = [known[digest] for digest in on_host if digest in known]
        contents += [content for content in residency.residents() if content.digest not in on_host]
        found = [copy for content in contents for copy in content.copies]
    by_name: dict[str, list[Copy]] = {}
    for copy in found:
        by_name.setdefault(copy.version.name, []).append(copy)
    with books.lock:
        for copies in by_name.values():
            if len(copies) > 1:
                copies.sort(key=books.catalog.is_current)
    return tuple(_gathered(name, copies, on_host) for name, copies in by_name.items())


def _gathered(name: str, copies: Sequence[Copy], on_host: set[str]) -> AdapterState:
    """Of the copies of a name whose contents are on host or device, the current one last."""
    host = device = None
    is_pinned = False
    for copy in copies:
        content, is_pinned = copy.content, is_pinned or copy.is_pinned
        if content.sizes is not None and content.digest in on_host:
            host = (host or 0) + content.sizes.host_bytes
        if content.sizes is not None and content.slot is not None:
            device = (device or 0) + content.sizes.device_bytes
    facts = copies[-1].content.facts
    method, rank = ("", None) if facts is None else (facts.method, facts.rank)
    return AdapterState(name, method, rank, is_pinned, host, device)
