"""What the routes work with in the place of parts that run in the other process: each method is a call there.

Owns nothing but what crosses back as a number: an upload, a folder being read, a merge or fetch under way. See
`server.api.faces` for what each of them is, and what blocks. Knows nothing about how calls cross.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from server.adapters.adapter_info import AdapterInfo, Loaded, Registered
from server.adapters.catalog import AdapterVersion
from server.adapters.custody import Unloaded
from server.adapters.merging.live import Made, MergeOrder
from server.adapters.registry import MAX_WAIT_S
from server.adapters.remote.fetches import FetchInfo, Order
from server.apart.calls import Calls
from server.apart.entry import ApartEntry
from server.apart.messages import Ready
from server.api.snapshot import Snapshot
from server.engine.engine import EngineStats
from server.model.grammar import GrammarSource


class EngineTwin:
    def __init__(self, calls: Calls, entry: ApartEntry, ready: Ready) -> None:
        self._calls = calls
        self._entry = entry
        self._last = ready.snapshot.engine

    @property
    def is_alive(self) -> bool:
        return self._calls.fault is None

    @property
    def is_draining(self) -> bool:
        return self._entry.is_draining

    def stats(self) -> EngineStats:
        """Of an engine that is lost, what it told last."""
        self._last = self._calls.told(self._last, "engine", "stats")
        return self._last


class RegistryTwin:
    def __init__(self, calls: Calls, ready: Ready) -> None:
        self._calls = calls
        self._is_shared = ready.is_shared
        self.max_versions = ready.max_versions

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        return self._calls.call("registry", method, *arguments, **named)

    def may_be_elsewhere(self, spec: str) -> bool:
        """Whether it is there already is known in the other process alone, which `look_for` asks."""
        return self._is_shared

    def look_for(self, spec: str) -> None:
        self._call("look_for", spec)

    def names_near(self, name: str, most: int) -> Sequence[str]:
        found: Sequence[str] = self._call("names_near", name, most)
        return found

    def list(self, after: str = "", limit: int | None = None) -> tuple[AdapterInfo, ...]:
        found: tuple[AdapterInfo, ...] = self._call("list", after, limit)
        return found

    def describe(self, spec: str) -> AdapterInfo:
        found: AdapterInfo = self._call("describe", spec)
        return found

    def versions(self, name: str) -> tuple[AdapterInfo, ...]:
        found: tuple[AdapterInfo, ...] = self._call("versions", name)
        return found

    def check_may_claim(self, name: str) -> None:
        self._call("check_may_claim", name)

    def check_room(self, num_bytes: int, name: str | None = None) -> None:
        self._call("check_room", num_bytes, name)

    def register(self, incoming: Any, name: str, *, replace: bool, base_fingerprint: str | None = None) -> Registered:
        assert isinstance(incoming, IncomingTwin)
        return incoming.register(name, replace=replace, base_fingerprint=base_fingerprint)

    def roll_back(self, name: str, prefix: str | None = None) -> tuple[AdapterInfo, AdapterVersion]:
        found: tuple[AdapterInfo, AdapterVersion] = self._call("roll_back", name, prefix)
        return found

    def delete(self, name: str) -> None:
        self._call("delete", name)

    def load(self, spec: str) -> Loaded:
        found: Loaded = self._call("load", spec)
        return found

    def unload(self, spec: str, max_wait_s: float = MAX_WAIT_S) -> Unloaded:
        found: Unloaded = self._call("unload", spec, max_wait_s)
        return found

    def pin(self, spec: str, max_wait_s: float = MAX_WAIT_S) -> AdapterInfo:
        found: AdapterInfo = self._call("pin", spec, max_wait_s)
        return found

    def unpin(self, spec: str) -> AdapterInfo:
        found: AdapterInfo = self._call("unpin", spec)
        return found

    def lift_quarantine(self, spec: str) -> AdapterInfo:
        found: AdapterInfo = self._call("lift_quarantine", spec)
        return found


class IncomingFileTwin:
    """A file of an upload; one left by an exception does not count as sent."""

    def __init__(self, calls: Calls, incoming: "IncomingTwin") -> None:
        self._calls = calls
        self._incoming = incoming

    def write(self, chunk: bytes) -> None:
        self._calls.call("uploads", "write", self._incoming.number, chunk)
        self._incoming.num_bytes += len(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:  # else the upload is discarded, and this with it
            self._calls.call("uploads", "end_file", self._incoming.number)


class IncomingTwin:
    def __init__(self, calls: Calls, max_bytes: int | None) -> None:
        self._calls = calls
        self.number: int = calls.call("uploads", "begin", max_bytes)
        self.num_bytes = 0

    def open_file(self, filename: str) -> IncomingFileTwin:
        self._calls.call("uploads", "open_file", self.number, filename)
        return IncomingFileTwin(self._calls, self)

    def expect(self, num_bytes: int) -> None:
        self._calls.call("uploads", "expect", self.number, num_bytes)

    def copy(self, folder: Path) -> None:
        self.num_bytes = self._calls.call("uploads", "copy", self.number, folder)

    def register(self, name: str, *, replace: bool, base_fingerprint: str | None) -> Registered:
        asked = {"replace": replace, "base_fingerprint": base_fingerprint}
        found: Registered = self._calls.call("uploads", "register", self.number, name, **asked)
        return found

    def discard(self) -> None:
        self._calls.told(None, "uploads", "discard", self.number)  # of one that is lost it goes with the next start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()


class StoreTwin:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def incoming(self, *, max_bytes: int | None = None) -> IncomingTwin:
        return IncomingTwin(self._calls, max_bytes)

    @contextmanager
    def reading(self, folder: Path) -> Iterator[None]:
        number = self._calls.call("readings", "begin", folder)
        try:
            yield
        finally:
            self._calls.told(None, "readings", "end", number)  # it ends with a process that is lost


class MergeTwin:
    def __init__(self, calls: Calls, number: int) -> None:
        self._calls = calls
        self._number = number
        self.future: Future[Made] = calls.begin("merges", "made", number)

    def give_up(self) -> None:
        if not self.future.done():
            self._calls.begin("merges", "give_up", self._number)


class MergesTwin:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def begin(self, order: MergeOrder) -> MergeTwin:
        return MergeTwin(self._calls, self._calls.call("merges", "begin", order))


class FetchTwin:
    def __init__(self, info: FetchInfo, result: "Future[Registered]") -> None:
        self.result = result
        self._info = info

    def info(self) -> FetchInfo:
        """As it was when it was begun, or joined."""
        return self._info


class FetchesTwin:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def begin(self, order: Order) -> FetchTwin:
        number, info = self._calls.call("fetches", "begin", order)
        return FetchTwin(info, self._calls.begin("fetches", "ended", number))

    def cancel(self, name: str) -> bool:
        is_done: bool = self._calls.call("fetches", "cancel", name)
        return is_done

    def info(self, name: str) -> FetchInfo | None:
        found: FetchInfo | None = self._calls.call("fetches", "info", name)
        return found

    def list(self) -> tuple[FetchInfo, ...]:
        found: tuple[FetchInfo, ...] = self._calls.call("fetches", "list")
        return found


class GrammarsTwin:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def compiled(self, source: GrammarSource) -> "Future[GrammarSource]":
        return self._calls.begin("grammars", "compiled", source)


class StateTwin:
    def __init__(self, calls: Calls, first: Snapshot) -> None:
        self._calls = calls
        self._last = Snapshot(first.engine, first.registry)

    def snapshot(self, names: Collection[str]) -> Snapshot:
        """Of a process that is lost, the totals that it told last: who asks for metrics is to be told that it is lost.

        Nothing is loaded there, in use or counted any more; and no name is gone, for all that is known.
        """
        found: Snapshot | None = self._calls.told(None, "state", "snapshot", names)
        if found is None:
            return self._last
        self._last = Snapshot(found.engine, found.registry)
        return found
