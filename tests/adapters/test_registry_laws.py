"""The laws of the registry at every step of any history, on the real store, host and device.

A history is any order of uploads, replacements, deletions, rollbacks, pins, loads, unloads, leases, admissions, loads
that hang or fail, restarts, and kills in the middle of a change. Beside it runs a model of a few lines: which versions
each name has, who holds and runs what, what is pinned. Whatever else the registry does, after every step

    names, versions and counts are the model's, and the books have no fault;
    every version on disk is the SHA-256 of its files, a leased one also after its name is gone; nothing else is there;
    what runs is on the device, in its slot, with its own numbers; what is pinned is on host and device;
    host and device use the bytes of the distinct tensors that they hold, and no more than they may.

A further verb is a further `rule`; a further law is a further `invariant`.
"""

import functools
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import save
from torch import nn

from server.adapters import residency
from server.adapters.device.device import DeviceTier
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.host import HostTier
from server.adapters.method import Lowered
from server.adapters.registry import FAILURE_MEMORY_S, Lease, Registry
from server.adapters.store.folder_store import INCOMING_FOLDER, Incoming, Store, folder_digest
from server.adapters.workers import Workers
from server.ground.errors import AdapterNotFound, AdapterRejected, BadRequest, Conflict, Overloaded
from server.model.context import Scope
from server.model.site_table import SiteTable
from tests.adapters.device.test_device import effect
from tests.adapters.folders import WIDTH, load_folder, tensors_from

NAMES = ("a", "b", "c")
MAX_VERSIONS = 2
NUM_LOADERS = 2
ROW_BYTES = 4 * WIDTH
MAX_DEVICE_BYTES = 10 * ROW_BYTES  # two small adapters and one that shares half of itself, or the tall one
MAX_HOST_BYTES = 12 * ROW_BYTES
INLINE_BYTES = 4 * ROW_BYTES  # so that the tall one is copied beside the steps
PATIENCE_S = 120  # for a registry that hangs, not for a machine that is slow
FAST_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # most of the time would go into fsync
LEAST_STEPS = 10  # in the life of a process: one that ends at once has seen nothing
MAX_TRIES = 5  # of an admission: the host may have lost the adapter, and a copy beside the steps finds no room


PICK = st.integers(0, 7)  # of a list that is not known yet: modulo its length


@dataclass(frozen=True)
class Content:
    """An adapter as it is uploaded, and what is to be found of it everywhere."""

    key: str
    files: Mapping[str, bytes]
    tensors: Mapping[str, torch.Tensor]

    @functools.cached_property
    def digest(self) -> str:
        """The version by its definition: SHA-256 over sorted names, lengths and the SHA-256 of the bytes."""
        total = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            total.update(struct.pack(">Q", len(name)) + name.encode())
            total.update(struct.pack(">Q", len(data)) + hashlib.sha256(data).digest())
        return total.hexdigest()

    @functools.cached_property
    def row_bytes(self) -> Mapping[bytes, int]:
        """The bytes of its tensors by their own bytes: equal tensors are one."""
        return {tensor.numpy().tobytes(): tensor.nbytes for tensor in self.tensors.values()}


def content(key: str, down: int, up: int, rank: int = 2, peft_type: str = "LORA") -> Content:
    tensors = {"down": tensors_from(down, rank)["down"], "up": tensors_from(up, rank)["up"]}
    config = {"peft_type": peft_type, "r": rank, "key": key}
    return Content(key, {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}, tensors)


CONTENTS = (
    content("one", 1, 1),
    content("shares-with-one", 1, 2),
    content("three", 3, 3),
    content("four", 4, 4),
    content("tall", 5, 5, rank=5),
)
REFUSED = (content("foreign", 6, 6, peft_type="OTHER"), content("huge", 7, 7, rank=40))
BY_DIGEST = {each.digest: each for each in (*CONTENTS, *REFUSED)}


def distinct_bytes(digests: Collection[str]) -> int:
    """What a tier needs that holds these versions and stores equal tensors once."""
    return sum({key: size for digest in digests for key, size in BY_DIGEST[digest].row_bytes.items()}.values())


class OneLayer(nn.Module):
    """A base with the one site that the adapters of `folders` edit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH, bias=False)})])

    def get_output_embeddings(self) -> None:
        return None


def one_site() -> SiteTable:
    sites = SiteTable(OneLayer(), Scope())
    sites.group_by_input([(sites.sites[0], torch.zeros(1, WIDTH))], num_tokens=1)
    return sites


@dataclass
class Loads:
    """The registry's `load`: it can be made to wait, and to fail for some contents."""

    moved: threading.Condition = field(default_factory=threading.Condition)  # over the next two fields
    is_open: bool = True
    num_held: int = 0
    broken: set[str] = field(default_factory=set)  # keys

    def open(self) -> None:
        with self.moved:
            self.is_open = True
            self.moved.notify_all()

    def close(self) -> None:
        with self.moved:
            self.is_open = False

    def __call__(self, folder: Path) -> Lowered:
        with self.moved:
            self.num_held += 1
            self.moved.notify_all()
            assert self.moved.wait_for(lambda: self.is_open, PATIENCE_S)
            self.num_held -= 1
        key = json.loads((folder / CONFIG_FILE).read_bytes())["key"]
        if key in self.broken:
            raise AdapterRejected("broken on purpose")
        return load_folder(folder)


class House:
    """A registry on real tiers and a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_s = 0.0
        self.loads = Loads()
        self.store = Store(root, create=True)
        self.host = HostTier(MAX_HOST_BYTES, torch.float32)
        self.sites = one_site()
        self.device = DeviceTier(self.sites, MAX_DEVICE_BYTES, torch.float32, torch.device("cpu"))
        self.registry = Registry(
            self.store, (), self.host, self.device, self.loads, NUM_LOADERS,
            max_versions=MAX_VERSIONS, clock=lambda: self.now_s,
        )  # fmt: skip
        self.tasks = self._watched(self.registry._workers)
        self.copies = self._watched(self.registry._copiers)

    def _watched(self, workers: Workers) -> set[Future[object]]:
        """What is given to the workers and has not ended, from now on."""
        tasks: set[Future[object]] = set()
        submit, moved = workers.submit, self.loads.moved

        def note_end(task: Future[object]) -> None:
            with moved:
                tasks.remove(task)
                moved.notify_all()

        def watched(*arguments: Any, **named: Any) -> Future[Any]:
            task = submit(*arguments, **named)
            with moved:
                tasks.add(task)
            task.add_done_callback(note_end)
            return task

        workers.submit = watched  # type: ignore[method-assign]
        return tasks

    @property
    def is_blocked(self) -> bool:
        """Whether each worker has a load that is held, so that removals wait behind them. Once all has settled."""
        return not self.loads.is_open and self.loads.num_held == NUM_LOADERS

    def settle(self) -> None:
        """Waits until the workers have done what they can: all, but for loads that are held and what waits behind."""
        with self.loads.moved:
            assert self.loads.moved.wait_for(self._is_settled, PATIENCE_S)

    def _is_settled(self) -> bool:
        if self.loads.is_open:
            return not self.tasks and not self.copies
        return self.loads.num_held in (len(self.tasks), NUM_LOADERS) and not self.copies

    def incoming(self, content: Content) -> Incoming:
        incoming = self.store.incoming()
        for name, data in content.files.items():
            with incoming.open_file(name) as file:
                file.write(data)
        return incoming


def work_in_progress(root: Path) -> list[Path]:
    """What lies in the store and belongs to no name: uploads, and what was deleted and is still being read."""
    return list((root / INCOMING_FOLDER).glob("*"))


@contextmanager
def photographed(root: Path, photo: Path, num_changes: int) -> Iterator[None]:
    """Copies the store as it is after `num_changes` changes of the disk, or at the end of the block if that is sooner.

    The copy is what kill -9 would leave at that point: the files, and none of the process's locks.
    """
    seen = 0

    def watched(change: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal seen
            seen += 1
            if seen == num_changes + 1:
                shutil.copytree(root, photo)
            return change(*arguments, **named)

        return call

    changes = {name: watched(getattr(os, name)) for name in ("mkdir", "rename", "unlink", "rmdir", "fsync")}
    with patch.multiple(os, **changes):
        yield
    if not photo.exists():
        shutil.copytree(root, photo)


@dataclass(eq=False)
class Held:
    """A lease with what it was promised."""

    lease: Lease
    name: str
    digest: str
    is_listed: bool = True  # whether its name still has its version
    slot: int | None = None  # while a sequence runs on it


class Laws(RuleBasedStateMachine):
    """Any history of a registry, and the laws."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = ExitStack()
        self.scratch.enter_context(patch.object(residency, "COPIED_INLINE_BYTES", INLINE_BYTES))
        self.folder = Path(self.scratch.enter_context(TemporaryDirectory(dir=FAST_DISK)))
        self.num_houses = 0
        self._open(self._new_root())
        self.versions: dict[str, list[str]] = {}  # digests, the current one last
        self.pins: set[tuple[str, str]] = set()
        self.held: list[Held] = []
        self.leaving: list[Lease] = []  # released, and nobody can ask for their versions any more
        self.uploads: list[tuple[Incoming, Content]] = []

    def _new_root(self) -> Path:
        self.num_houses += 1
        return self.folder / f"store-{self.num_houses}"

    def _open(self, root: Path) -> None:
        self.house = House(root)
        self.num_steps = 0

    @property
    def registry(self) -> Registry:
        return self.house.registry

    @property
    def is_loading_held(self) -> bool:
        return not self.house.loads.is_open

    @property
    def running(self) -> set[str]:
        return {held.digest for held in self.held if held.slot is not None}

    @property
    def pinned(self) -> set[str]:
        return {digest for _, digest in self.pins}

    def one_of_them(self, pick: int) -> tuple[str, str, str]:
        """A version that a name has: its name, its digest, and how a request asks for it."""
        known = [(name, digest) for name, digests in sorted(self.versions.items()) for digest in digests]
        name, digest = known[pick % len(known)]
        return name, digest, name if digest == self.versions[name][-1] else f"{name}@{digest[:12]}"

    @contextmanager
    def excused(self, digest: str) -> Iterator[None]:
        """A load may fail that was made to, and so may what finds host or device full of pinned adapters."""
        try:
            yield
        except AdapterRejected as refusal:
            if BY_DIGEST[digest].key not in self.house.loads.broken and not (self.pins and "pinned" in refusal.message):
                raise
        except (Conflict, Overloaded):
            if not self.pins and not self.running:
                raise

    # The store

    @initialize(contents=st.permutations(CONTENTS))
    def begin_with_some(self, contents: list[Content]) -> None:
        for name, content in zip(NAMES, contents, strict=False):
            self.upload(name, content, replace=False)

    @precondition(lambda self: not self.is_loading_held)
    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(CONTENTS), replace=st.booleans())
    def upload(self, name: str, content: Content, replace: bool) -> None:
        with self.house.incoming(content) as incoming:
            self._register(incoming, name, content, replace)

    @precondition(lambda self: not self.is_loading_held)
    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(REFUSED))
    def upload_what_cannot_serve(self, name: str, content: Content) -> None:
        with self.house.incoming(content) as incoming, pytest.raises(AdapterRejected):
            self.registry.register(incoming, name, replace=True)

    @precondition(lambda self: self.versions and not self.is_loading_held)
    @rule(pick=PICK)
    def upload_the_same_again(self, pick: int) -> None:
        name, _, _ = self.one_of_them(pick)
        content = BY_DIGEST[self.versions[name][-1]]
        with self.house.incoming(content) as incoming:
            self._register(incoming, name, content, replace=False)

    @rule(content=st.sampled_from(CONTENTS))
    def begin_an_upload(self, content: Content) -> None:
        self.uploads.append((self.house.incoming(content), content))

    @precondition(lambda self: self.uploads and not self.is_loading_held)
    @rule(name=st.sampled_from(NAMES), replace=st.booleans())
    def end_an_upload(self, name: str, replace: bool) -> None:
        incoming, content = self.uploads.pop(0)
        with incoming:
            self._register(incoming, name, content, replace)

    @precondition(lambda self: self.uploads)
    @rule()
    def leave_an_upload(self) -> None:
        self.uploads.pop()[0].discard()

    def _register(self, incoming: Incoming, name: str, content: Content, replace: bool) -> None:
        before = self.versions.get(name, [])
        if before and before[-1] != content.digest and not replace:
            with pytest.raises(Conflict, match="replace=true"):
                self.registry.register(incoming, name, replace=False)
            return
        with self.excused(content.digest):
            registered = self.registry.register(incoming, name, replace=replace)
            assert registered.is_new == (before[-1:] != [content.digest])
            assert registered.info.digest == content.digest
            self._note_current(name, content.digest)

    def _note_current(self, name: str, digest: str) -> None:
        """The version is the name's current one; of the others the oldest go that nobody holds."""
        before = self.versions.get(name, [])
        if before[-1:] == [digest]:
            return
        digests = [*(known for known in before if known != digest), digest]
        kept = {held.digest for held in self.held if held.is_listed and held.name == name}
        kept |= {pinned for owner, pinned in self.pins if owner == name} | set(digests[-MAX_VERSIONS:])
        self.versions[name] = [known for known in digests if known in kept]

    @precondition(lambda self: not self.is_loading_held and any(held.is_listed for held in self.held))
    @rule(pick=PICK)
    def replace_what_is_leased(self, pick: int) -> None:
        """So often that its version would be pruned, were it not leased."""
        names = [held.name for held in self.held if held.is_listed]
        for content in CONTENTS[: MAX_VERSIONS + 1]:
            self.upload(names[pick % len(names)], content, replace=True)

    @precondition(lambda self: self.versions)
    @rule(pick=PICK)
    def delete(self, pick: int) -> None:
        name, _, _ = self.one_of_them(pick)
        self.registry.delete(name)
        self._note_deleted(name)

    def _note_deleted(self, name: str) -> None:
        del self.versions[name]
        self.pins = {(owner, digest) for owner, digest in self.pins if owner != name}
        for held in self.held:
            held.is_listed = held.is_listed and held.name != name

    @precondition(lambda self: self.versions and not self.is_loading_held)
    @rule(pick=PICK, is_named=st.booleans())
    def roll_back(self, pick: int, is_named: bool) -> None:
        name, digest, _ = self.one_of_them(pick)
        digests = self.versions[name]
        if len(digests) == 1 and not is_named:
            with pytest.raises(Conflict, match="no earlier version"):
                self.registry.roll_back(name)
            return
        target = digest if is_named else digests[-2]
        with self.excused(target):
            info, before = self.registry.roll_back(name, target[:12] if is_named else None)
            assert (info.digest, before.digest) == (target, digests[-1])
            self.versions[name] = [*(known for known in digests if known != target), target]

    # Requests

    @precondition(lambda self: self.versions)
    @rule(pick=PICK)
    def lease(self, pick: int) -> None:
        name, digest, spec = self.one_of_them(pick)
        with self.excused(digest):
            lease = self.registry.lease(spec)
            assert (lease.version.name, lease.version.digest) == (name, digest)
            self.held.append(Held(lease, name, digest))

    @precondition(lambda self: self.versions and not self.is_loading_held)
    @rule(pick=PICK)
    def request(self, pick: int) -> None:
        """A lease, and at once a sequence that would run on it."""
        num_held = len(self.held)
        self.lease(pick)
        if len(self.held) > num_held:
            self._admit(self.held[-1])

    @rule(name=st.sampled_from(NAMES), prefix=st.sampled_from(("000000", "nonsense")))
    def ask_for_what_is_not_there(self, name: str, prefix: str) -> None:
        with pytest.raises((AdapterNotFound, BadRequest)):
            self.registry.lease(f"{name}@{prefix}")
        if name not in self.versions:
            for verb in (self.registry.lease, self.registry.delete, self.registry.roll_back, self.registry.unpin):
                with pytest.raises(AdapterNotFound):
                    verb(name)

    @precondition(lambda self: any(held.slot is None for held in self.held) and not self.is_loading_held)
    @rule(pick=PICK)
    def admit(self, pick: int) -> None:
        waiting = [held for held in self.held if held.slot is None]
        self._admit(waiting[pick % len(waiting)])

    def _admit(self, held: Held) -> None:
        with self.excused(held.digest):
            for _ in range(MAX_TRIES):
                held.slot = self.registry.admit(held.lease.version)
                if held.slot is not None:
                    return
                self.house.settle()
            in_the_way = self.running | self.pinned
            assert distinct_bytes(in_the_way | {held.digest}) > MAX_DEVICE_BYTES, "there is room, and it is not given"

    @precondition(lambda self: self.running)
    @rule(pick=PICK, is_end=st.booleans())
    def retire(self, pick: int, is_end: bool) -> None:
        """A sequence ends or is preempted."""
        running = [held for held in self.held if held.slot is not None]
        held = running[pick % len(running)]
        self._retire(held)
        if is_end:
            self._release(held)

    @precondition(lambda self: any(held.slot is None for held in self.held))
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        waiting = [held for held in self.held if held.slot is None]
        self._release(waiting[pick % len(waiting)])

    def _retire(self, held: Held) -> None:
        self.registry.retire(held.lease.version)
        held.slot = None

    def _release(self, held: Held) -> None:
        held.lease.release()
        held.lease.release()  # the second time means nothing
        self.held.remove(held)
        if not held.is_listed:
            self.leaving.append(held.lease)

    # By hand

    @precondition(lambda self: self.versions and not self.is_loading_held)
    @rule(pick=PICK)
    def load(self, pick: int) -> None:
        _, digest, spec = self.one_of_them(pick)
        with self.excused(digest):
            assert self.registry.load(spec).info.digest == digest

    @precondition(lambda self: self.versions and not self.is_loading_held)
    @rule(pick=PICK)
    def unload(self, pick: int) -> None:
        _, digest, spec = self.one_of_them(pick)
        if digest in self.pinned | self.running:
            with pytest.raises(Conflict):
                self.registry.unload(spec, max_wait_s=0)
        else:
            self.registry.unload(spec, max_wait_s=0)
            assert self.registry.describe(spec).tiers == ("store",)

    @precondition(lambda self: self.versions and not self.is_loading_held)
    @rule(pick=PICK)
    def pin(self, pick: int) -> None:
        name, digest, spec = self.one_of_them(pick)
        try:
            assert self.registry.pin(spec, max_wait_s=0).is_pinned
            self.pins.add((name, digest))
        except (Conflict, Overloaded):  # too much would be pinned, or all that could make room runs
            pass
        except AdapterRejected:
            if BY_DIGEST[digest].key not in self.house.loads.broken and not self.pins:
                raise

    @precondition(lambda self: self.pins)
    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        name, digest, spec = self.one_of_them(pick)
        assert not self.registry.unpin(spec).is_pinned
        self.pins.discard((name, digest))

    # The disk

    @precondition(lambda self: not self.is_loading_held)
    @rule()
    def hold_loads(self) -> None:
        self.house.loads.close()

    @precondition(lambda self: self.is_loading_held)
    @rule()
    def let_loads_go(self) -> None:
        self.house.loads.open()

    @rule(content=st.sampled_from(CONTENTS))
    def break_loads(self, content: Content) -> None:
        self.house.loads.broken.add(content.key)

    @precondition(lambda self: self.house.loads.broken and not self.is_loading_held)
    @rule()
    def mend_loads(self) -> None:
        self.house.loads.broken.clear()

    # The process

    @precondition(lambda self: self.num_steps > LEAST_STEPS)
    @rule()
    def restart(self) -> None:
        self._leave()
        self._open(self.house.root)

    @precondition(lambda self: self.num_steps > LEAST_STEPS)
    @rule(change=st.sampled_from(("none", "upload", "delete", "roll back")), num=st.integers(0, 24), pick=PICK)
    def be_killed(self, change: str, num: int, pick: int) -> None:
        """What a kill before the `num`-th change of the disk leaves is the state before or after, and never between."""
        if change == "upload" and not self.is_loading_held and not self.house.loads.broken:
            self._be_killed_in(lambda name: self.upload(name, CONTENTS[pick % len(CONTENTS)], True), pick, num)
        elif change == "delete" and self.versions:
            self._be_killed_in(lambda _: self.delete(pick), pick, num)
        elif change == "roll back" and self.versions and not self.is_loading_held:
            self._be_killed_in(lambda _: self.roll_back(pick, is_named=False), pick, num)
        else:
            self._be_killed_in(lambda _: None, pick, num)

    def _be_killed_in(self, change: Callable[[str], None], pick: int, num_changes: int) -> None:
        name = self.one_of_them(pick)[0] if self.versions else NAMES[0]
        before = list(self.versions.get(name, []))
        photo = self._new_root()
        with photographed(self.house.root, photo, num_changes):
            change(name)
        after = self.versions.pop(name, [])
        self._leave()  # the old process, on its own folder
        self._open(photo)
        found = next((list(info.versions) for info in self.registry.list() if info.name == name), [])
        # A replacement comes first, and then the old versions go, one by one.
        assert found in (before, after) or (found[-1:] == after[-1:] and set(after) < set(found) <= {*before, *after})
        if found:
            self.versions[name] = found

    def _leave(self) -> None:
        """The end of a process: sequences and requests end, uploads break off, pins are forgotten."""
        self.house.loads.open()
        for held in tuple(self.held):
            if held.slot is not None:
                self._retire(held)
            self._release(held)
        while self.uploads:
            self.uploads.pop()[0].discard()
        self.pins.clear()
        self.registry.close()
        stats = self.registry.stats()
        assert (stats.num_leases, stats.num_residencies, stats.num_loading) == (0, 0, 0)
        assert self.registry.check_integrity() == ()
        assert work_in_progress(self.house.root) == []

    # The laws

    @invariant()
    def a_moment_passes(self) -> None:
        """So much that failures are forgotten: what is refused now has a reason now."""
        self.num_steps += 1
        self.house.settle()
        if not self.house.is_blocked:
            self.leaving.clear()
        self.house.now_s += FAILURE_MEMORY_S

    @invariant()
    def the_books_are_the_models(self) -> None:
        infos, stats = self.registry.list(), self.registry.stats()
        assert {info.name: list(info.versions) for info in infos} == self.versions
        assert all(info.digest == info.versions[-1] for info in infos)
        assert stats.num_leases == len(self.held)
        assert stats.num_residencies == sum(held.slot is not None for held in self.held)
        assert stats.num_pinned == len(self.pinned)
        assert self.registry.check_integrity() == ()

    @invariant()
    def a_version_is_what_its_files_hash_to_and_nothing_else_is_on_disk(self) -> None:
        root = self.house.root
        for held in self.held:
            copy = held.lease.copy
            assert copy is not None
            assert (held.lease.version.name, held.lease.version.digest) == (held.name, held.digest)
            assert folder_digest(copy.folder).digest == held.digest
        for name, digests in self.versions.items():
            assert sorted(os.listdir(root / name)) == sorted(["current.json", *digests])
            assert all(folder_digest(self.house.store.folder(name, digest)).digest == digest for digest in digests)
        assert set(os.listdir(root)) <= {INCOMING_FOLDER, *self.versions}
        if not self.house.is_blocked:
            orphans = {(held.name, held.lease.copy) for held in self.held if not held.is_listed}
            assert len(work_in_progress(root)) == len(orphans) + len(self.uploads)

    @invariant()
    def what_runs_is_on_the_device_as_it_was_uploaded(self) -> None:
        x = torch.stack([torch.linspace(-1, 1, WIDTH), torch.ones(WIDTH)])
        for held in self.held:
            if held.slot is not None:
                assert self.registry.admit(held.lease.version) == held.slot
                self.registry.retire(held.lease.version)
                tensors = BY_DIGEST[held.digest].tensors
                step, site = self.house.device.batch([held.slot]), self.house.sites.sites[0]
                torch.testing.assert_close(effect(step, held.slot, site, x), x @ tensors["down"].T @ tensors["up"])

    @invariant()
    def what_is_pinned_is_on_host_and_device(self) -> None:
        for name, digest in self.pins:
            assert self.registry.describe(f"{name}@{digest}").tiers == ("store", "host", "device")

    @invariant()
    def the_tiers_hold_the_bytes_of_their_distinct_tensors(self) -> None:
        host, device = self.house.host, self.house.device
        on_host = {digest for digest in BY_DIGEST if host.holds(digest)}
        assert host.used_bytes == distinct_bytes(on_host) <= MAX_HOST_BYTES
        assert device.used_bytes + device.free_bytes + device.waste_bytes == device.capacity_bytes
        on_device = self._on_device()
        assert device.used_bytes == distinct_bytes(on_device) <= MAX_DEVICE_BYTES
        assert self.registry.stats().num_resident == len(on_device)
        assert self.running <= on_device

    def _on_device(self) -> set[str]:
        infos = [info for name in self.versions for info in self.registry.versions(name)]
        listed = {info.digest for info in infos if "device" in info.tiers}
        leases = [*(held.lease for held in self.held), *self.leaving]
        return listed | {lease.version.digest for lease in leases if lease.content.slot is not None}

    def teardown(self) -> None:
        self.house.loads.open()
        while self.versions:
            self.delete(0)
        self._leave()
        assert self.registry.stats().num_adapters == self.registry.stats().num_resident == 0
        assert self.house.device.used_bytes == self.house.host.used_bytes == 0
        assert self.house.device.free_bytes + self.house.device.waste_bytes == self.house.device.capacity_bytes
        assert set(os.listdir(self.house.root)) <= {INCOMING_FOLDER}
        self.scratch.close()


class TestLaws(Laws.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=30, stateful_step_count=50, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # shrinking a history takes its time
class TestLawsAtLength(Laws.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=300, stateful_step_count=100, derandomize=True)


def test_a_load_that_failed_is_forgotten_where_nothing_has_to_be_loaded(tmp_path: Path) -> None:
    """A pin needs a copy on the host. That it cannot be read is nothing to those who need the device alone."""
    house, content = House(tmp_path), CONTENTS[0]
    with house.incoming(content) as incoming:
        house.registry.register(incoming, "a", replace=False)
    house.registry.load("a")
    house.host.drop(content.digest)
    house.loads.broken.add(content.key)
    with pytest.raises(AdapterRejected, match="on purpose"):
        house.registry.pin("a")
    house.now_s += FAILURE_MEMORY_S
    assert house.registry.load("a").info.tiers == ("store", "device")
    assert house.registry.verify("a").digest == content.digest
    house.registry.close()


@pytest.mark.parametrize("num_held", [1, NUM_LOADERS])
def test_what_nobody_can_ask_for_any_more_leaves_beside_a_held_load_or_behind_as_many_as_there_are_loaders(
    tmp_path: Path, num_held: int
) -> None:
    house = House(tmp_path)
    registry = house.registry
    for name, content in zip(NAMES, CONTENTS, strict=False):
        with house.incoming(content) as incoming:
            registry.register(incoming, name, replace=False)
        registry.unload(name)
    registry.load(NAMES[0])
    last = registry.lease(NAMES[0])
    house.loads.close()
    cold = [registry.lease(name) for name in NAMES[1 : num_held + 1]]
    registry.delete(NAMES[0])
    last.release()
    house.settle()
    assert house.is_blocked == (house.device.used_bytes > 0) == (num_held == NUM_LOADERS)
    house.loads.open()
    house.settle()
    assert house.device.used_bytes == 0
    for lease in cold:
        lease.release()
    registry.close()
