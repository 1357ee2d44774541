"""What the child does for calls of its parts: each in a thread, in the name of who asks.

Owns those threads, and what stays between the calls of one request: uploads, folders that are read, merges and fetches
under way, each under a number that crosses in its place. Knows nothing about HTTP.
"""

import itertools
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from server.adapters.adapter_info import Registered
from server.adapters.asker import ask_as
from server.adapters.audit import Trail, begin_trail, current_trail
from server.adapters.merging.live import Merge, MergeOrder, Merges
from server.adapters.registry import Registry
from server.adapters.remote.fetches import Fetch, Fetches, FetchInfo, Order
from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.folder_store import Incoming, IncomingFile
from server.apart.channel import Sender, framed
from server.apart.messages import Answer, Call
from server.apart.portable import portable
from server.api.snapshot import Snapshot
from server.assemble import Works
from server.ground.errors import Overloaded
from server.ground.heap import without_collections
from server.model.grammar import Grammars, GrammarSource

_MAX_THREADS = 96  # more than there are threads that call: a wait for a load, or an unload, holds up no other call
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Later:
    """A call that is answered when a future ends: with `value` if that is given, else with what the future gave."""

    future: "Future[Any]"
    trail: Trail | None
    value: object = None


class Kept(Generic[_T]):
    """Things under numbers, which cross to the other process in their place. Safe for many threads."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._things: dict[int, _T] = {}

    def keep(self, thing: _T) -> int:
        number = next(self._numbers)
        self._things[number] = thing
        return number

    def __getitem__(self, number: int) -> _T:
        return self._things[number]

    def take(self, number: int) -> _T | None:
        """The thing, which is kept no longer; None where it is not."""
        return self._things.pop(number, None)

    def take_all(self) -> list[_T]:
        return [thing for number in tuple(self._things) if (thing := self.take(number)) is not None]


@dataclass(slots=True)
class _Upload:
    incoming: Incoming
    file: IncomingFile | None = None


class Uploads:
    """Uploads on their way to the store. The calls of one come one after another."""

    def __init__(self, store: AdapterStore, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._kept = Kept[_Upload]()

    def begin(self, max_bytes: int | None) -> int:
        return self._kept.keep(_Upload(self._store.incoming(max_bytes=max_bytes)))

    def open_file(self, number: int, filename: str) -> None:
        upload = self._kept[number]
        upload.file = upload.incoming.open_file(filename)

    def write(self, number: int, chunk: bytes) -> None:
        file = self._kept[number].file
        assert file is not None
        file.write(chunk)

    def end_file(self, number: int) -> None:
        upload = self._kept[number]
        file, upload.file = upload.file, None
        assert file is not None
        file.close()

    def expect(self, number: int, num_bytes: int) -> None:
        self._kept[number].incoming.expect(num_bytes)

    def copy(self, number: int, folder: Path) -> int:
        """How many bytes the upload has then."""
        incoming = self._kept[number].incoming
        incoming.copy(folder)
        return incoming.num_bytes

    def register(self, number: int, name: str, *, replace: bool, base_fingerprint: str | None) -> Registered:
        incoming = self._kept[number].incoming
        return self._registry.register(incoming, name, replace=replace, base_fingerprint=base_fingerprint)

    def discard(self, number: int) -> None:
        upload = self._kept.take(number)
        if upload is not None:
            _discard(upload)

    def close(self) -> None:
        """Discards those that nobody has: their front is gone."""
        for upload in self._kept.take_all():
            _discard(upload)


def _discard(upload: _Upload) -> None:
    if upload.file is not None:
        upload.file.__exit__(GeneratorExit, GeneratorExit(), None)  # left in the middle: it does not count as sent
    upload.incoming.discard()


class Readings:
    """Folders of versions whose files the front reads. Begun and ended in threads that may differ."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._kept = Kept[ExitStack]()

    def begin(self, folder: Path) -> int:
        reading = ExitStack()
        reading.enter_context(self._store.reading(folder))
        return self._kept.keep(reading)

    def end(self, number: int) -> None:
        reading = self._kept.take(number)
        if reading is not None:
            reading.close()

    def close(self) -> None:
        for reading in self._kept.take_all():
            reading.close()


@dataclass(frozen=True, slots=True)
class _UnderWay(Generic[_T]):
    """Something that a call has begun, with the trail of that call."""

    thing: _T
    trail: Trail | None


class HostedMerges:
    def __init__(self, merges: Merges) -> None:
        self._merges = merges
        self._kept = Kept[_UnderWay[Merge]]()

    def begin(self, order: MergeOrder) -> int:
        return self._kept.keep(_UnderWay(self._merges.begin(order), current_trail()))

    def made(self, number: int) -> Later:
        """Once for each merge: it is forgotten at its end."""
        kept = self._kept[number]
        kept.thing.future.add_done_callback(lambda _: self._kept.take(number))
        return Later(kept.thing.future, kept.trail)

    def give_up(self, number: int) -> None:
        """Does nothing once it has ended."""
        kept = self._kept.take(number)
        if kept is not None:
            kept.thing.give_up()
            kept.thing.future.cancel()  # if it has not begun


class HostedFetches:
    def __init__(self, fetches: Fetches) -> None:
        self._fetches = fetches
        self._kept = Kept[_UnderWay[Fetch]]()

    def begin(self, order: Order) -> tuple[int, FetchInfo]:
        fetch = self._fetches.begin(order)
        return self._kept.keep(_UnderWay(fetch, current_trail())), fetch.info()

    def ended(self, number: int) -> Later:
        """Once for each `begin`."""
        kept = self._kept.take(number)
        assert kept is not None
        return Later(kept.thing.result, kept.trail)

    def cancel(self, name: str) -> bool:
        return self._fetches.cancel(name)

    def info(self, name: str) -> FetchInfo | None:
        return self._fetches.info(name)

    def list(self) -> tuple[FetchInfo, ...]:
        return self._fetches.list()


class HostedGrammars:
    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars

    def compiled(self, source: GrammarSource) -> Later:
        """Answered with the source, which stands for the grammar over there."""
        return Later(self._grammars.compiled(source), None, source)


class HostedState:
    def __init__(self, works: Works) -> None:
        self._works = works

    def snapshot(self, names: Collection[str]) -> Snapshot:
        """With what is counted here: a scrape asks for nothing else."""
        with without_collections():
            return replace(self._works.snapshot(names), families=self._works.metrics.collected())


class Hosted:
    """Answers calls. `close` it before the works."""

    def __init__(self, works: Works, answers: Sender) -> None:
        self._answers = answers
        self._uploads = Uploads(works.store, works.registry)
        self._readings = Readings(works.store)
        self._parts: Mapping[str, object] = {
            "engine": works.engine,
            "registry": works.registry,
            "state": HostedState(works),
            "uploads": self._uploads,
            "readings": self._readings,
            "merges": HostedMerges(works.merges),
            "fetches": HostedFetches(works.fetches),
            "grammars": HostedGrammars(works.grammars),
        }
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="call")
        self._closing = threading.Lock()
        self._is_closed = False

    def take(self, call: Call) -> None:
        """Begins a call; never blocks."""
        with self._closing:
            if not self._is_closed:
                self._threads.submit(copy_context().run, self._run, call)

    def close(self) -> None:
        """Takes no more calls, and drops what the front holds. Calls that wait end when what they wait for does."""
        with self._closing:
            self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._uploads.close()
        self._readings.close()

    def _run(self, call: Call) -> None:
        ask_as(call.asker)
        trail = begin_trail()
        try:
            found = getattr(self._parts[call.part], call.method)(*call.arguments, **call.named)
        except BaseException as error:  # it is the caller's, whatever it is: a panic of a library in Rust, too
            self._answer(Answer(call.number, portable(error), has_failed=True, is_told=trail.is_told))
            return
        if isinstance(found, Later):
            found.future.add_done_callback(partial(self._answer_later, call.number, found))
        else:
            self._answer(Answer(call.number, found))

    def _answer_later(self, number: int, later: Later, ended: "Future[Any]") -> None:
        is_told = later.trail is not None and later.trail.is_told
        error = Overloaded("It was given up.") if ended.cancelled() else ended.exception()
        if error is not None:
            self._answer(Answer(number, portable(error), has_failed=True, is_told=is_told))
        else:
            self._answer(Answer(number, ended.result() if later.value is None else later.value, is_told=is_told))

    def _answer(self, answer: Answer) -> None:
        self._answers.send(answer)


def answer_frame(value: object) -> bytes:
    """The frame of an answer; one that cannot cross is a failed one, so that nobody waits for it for ever."""
    try:
        return framed(value)
    except Exception as error:  # whatever a class does when it is pickled
        if not isinstance(value, Answer):
            raise
        return framed(Answer(value.number, portable(error), has_failed=True))
