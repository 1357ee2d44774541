"""The host tier: lowered adapters in RAM, in the dtype that they are served in.

Owns the cast to that dtype, content hashes, the sharing of equal tensors and the eviction of the least valuable
adapters under a byte budget. Knows nothing about files, names, slots or requests; an adapter is a version digest here,
and what it is worth is told by whoever puts it here.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch

from server.adapters.eviction import EvictionOrder
from server.adapters.host_adapter import HostAdapter, HostEdit, HostTensor
from server.adapters.merging.mixing import Mixed, MixedEdit
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected


@dataclass(slots=True)
class _Shared:
    """A tensor and the number of adapters that use it."""

    tensor: HostTensor
    num_adapters: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """An adapter, whether it is asked for now, and what its place is worth then."""

    adapter: HostAdapter
    worth: Callable[[], tuple[bool, Any]]


class HostTier:
    """Lowered adapters by version digest, within `max_bytes`. Safe for many threads."""

    def __init__(self, max_bytes: int, dtype: torch.dtype, *, pin: bool = False) -> None:
        """`dtype` is float32, float16 or bfloat16; `pin` puts tensors into page-locked memory (needs a GPU)."""
        self.max_bytes = max_bytes
        self.dtype = dtype
        self._pin = pin
        self._lock = Lock()
        self._adapters: dict[str, _Kept] = {}
        self._order: EvictionOrder[str] = EvictionOrder()  # of all these
        self._shared: dict[bytes, _Shared] = {}
        self._kept: set[str] = set()
        self._used_bytes = 0
        self._num_evictions = 0

    def put(
        self, digest: str, lowered: Lowered | Mixed, worth: Callable[[], tuple[bool, Any]] = lambda: (False, 0)
    ) -> HostAdapter:
        """Casts, hashes and keeps an adapter, evicting others until it fits; one that is there already is returned.

        Those that are not asked for go first, of them the one whose `worth` is then the least, among equals the least
        recently used. What is worth something never falls while it is here.
        Raises AdapterRejected if a tensor overflows the serving dtype, or if the adapter cannot fit.
        """
        adapter = self._cast(lowered)  # outside the lock: this is the long part
        self._check_size(adapter)
        with self._lock:
            present = self._touch(digest)
            return present if present is not None else self._insert(digest, adapter, worth)

    def get(self, digest: str) -> HostAdapter | None:
        """The adapter if it is here, which makes it the most recently used."""
        with self._lock:
            return self._touch(digest)

    def holds(self, digest: str) -> bool:
        """Whether the adapter is here; not a use of it."""
        with self._lock:
            return digest in self._adapters

    def digests(self) -> tuple[str, ...]:
        """Of the adapters here."""
        with self._lock:
            return tuple(self._adapters)

    def keep(self, digest: str) -> bool:
        """Excepts an adapter from eviction, if it is here; whether it is."""
        with self._lock:
            is_here = digest in self._adapters
            if is_here:
                self._kept.add(digest)
            return is_here

    def unkeep(self, digest: str) -> None:
        """Ends what `keep` began."""
        with self._lock:
            self._kept.discard(digest)

    def drop(self, digest: str) -> int:
        """Forgets an adapter; the bytes that this freed: 0 if it is not here, or others use all its tensors."""
        with self._lock:
            before = self._used_bytes
            self._remove(digest)
            return before - self._used_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the distinct tensors of all adapters here."""
        return self._used_bytes

    @property
    def num_adapters(self) -> int:
        return len(self._adapters)

    @property
    def num_evictions(self) -> int:
        """Adapters evicted since the start."""
        return self._num_evictions

    def check_integrity(self) -> tuple[str, ...]:
        """What does not add up in the books, as sentences; empty unless there is a defect. For tests and idle times."""
        with self._lock:
            uses: dict[bytes, int] = {}
            for kept in self._adapters.values():
                for content_hash in _distinct(kept.adapter):
                    uses[content_hash] = uses.get(content_hash, 0) + 1
            used_bytes = sum(shared.tensor.tensor.nbytes for shared in self._shared.values())
            counts = {content_hash: shared.num_adapters for content_hash, shared in self._shared.items()}
            checks = {
                "host tensors are counted for other adapters than use them": counts == uses,
                f"host bytes are {self._used_bytes} in the books and {used_bytes} in tensors": (
                    self._used_bytes == used_bytes
                ),
                "adapters are kept on the host that are not on it": self._kept <= self._adapters.keys(),
                "the adapters that may be evicted are not those on the host": self._order.members
                == set(self._adapters),
            }
            return tuple(fault for fault, is_sound in checks.items() if not is_sound)

    # Under the lock

    def _touch(self, digest: str) -> HostAdapter | None:
        kept = self._adapters.get(digest)
        if kept is None:
            return None
        self._order.touch(digest)
        return kept.adapter

    def _insert(self, digest: str, adapter: HostAdapter, worth: Callable[[], tuple[bool, Any]]) -> HostAdapter:
        adapter = self._share(adapter)
        self._adapters[digest] = _Kept(adapter, worth)  # not in the order yet: it is never its own victim
        while self._used_bytes > self.max_bytes:
            victim = self._order.least(self._worth)
            if victim is None:
                self._remove(digest)
                raise self._no_room(adapter)
            self._remove(victim)
            self._num_evictions += 1
        self._order.add(digest)
        return adapter

    def _worth(self, digest: str) -> tuple[bool, Any] | None:
        return None if digest in self._kept else self._adapters[digest].worth()

    def _share(self, adapter: HostAdapter) -> HostAdapter:
        """The adapter with each tensor that is here already in place of its own copy; counts its uses."""
        for content_hash, tensor in _distinct(adapter).items():
            if content_hash not in self._shared:
                self._shared[content_hash] = _Shared(tensor)
                self._used_bytes += tensor.tensor.nbytes
            self._shared[content_hash].num_adapters += 1
        edits, last = (
            MappingProxyType({path: self._share_edit(edit) for path, edit in part.items()})
            for part in (adapter.edits, adapter.last_edits)
        )
        return replace(adapter, edits=edits, last_edits=last)

    def _share_edit(self, edit: HostEdit) -> HostEdit:
        def shared(tensor: HostTensor) -> HostTensor:
            return self._shared[tensor.content_hash].tensor

        ops = {op: {name: shared(t) for name, t in own.items()} for op, own in edit.ops.items()}
        return HostEdit.of({name: [shared(t) for t in tensors] for name, tensors in edit.tensors().items()}, ops)

    def _remove(self, digest: str) -> None:
        self._kept.discard(digest)
        self._order.discard(digest)
        kept = self._adapters.pop(digest, None)
        for content_hash in _distinct(kept.adapter) if kept is not None else ():
            shared = self._shared[content_hash]
            shared.num_adapters -= 1
            if shared.num_adapters == 0:
                self._used_bytes -= shared.tensor.tensor.nbytes
                del self._shared[content_hash]

    # Without the lock

    def _cast(self, lowered: Lowered | Mixed) -> HostAdapter:
        cast = _Cast(self.dtype, self._pin)
        edits = {path: cast.edit(path, edit) for path, edit in lowered.edits.items()}
        last = {path: cast.edit(path, edit) for path, edit in lowered.last_edits.items()}
        return HostAdapter(
            method=lowered.method,
            rank=lowered.rank,
            num_parameters=lowered.num_parameters,
            edits=MappingProxyType(edits),
            tensor_bytes=cast.tensor_bytes,
            warnings=lowered.warnings,
            positions=lowered.positions,
            last_edits=MappingProxyType(last),
            num_virtual_tokens=lowered.num_virtual_tokens,
        )

    def _check_size(self, adapter: HostAdapter) -> None:
        if adapter.tensor_bytes > self.max_bytes:
            raise self._no_room(adapter)

    def _no_room(self, adapter: HostAdapter) -> AdapterRejected:
        return AdapterRejected(
            f"The adapter needs {adapter.tensor_bytes} bytes of host memory, and adapters may use {self.max_bytes} in "
            f"all{self._kept_part()}: start the server with a larger --host-memory.",
            param="adapter",
        )

    def _kept_part(self) -> str:
        return f", of which {len(self._kept)} that are pinned or still in use may not be evicted" if self._kept else ""


class _Cast:
    """The cast of one adapter; equal tensors within it, and views that are the same, are cast and kept once."""

    def __init__(self, dtype: torch.dtype, pin: bool) -> None:
        self._dtype = dtype
        self._pin = pin
        self._by_content: dict[bytes, HostTensor] = {}
        self._by_view: dict[tuple[object, ...], HostTensor] = {}  # valid while the lowered adapter is alive

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.tensor.nbytes for tensor in self._by_content.values())

    def edit(self, path: str, edit: Edit | MixedEdit) -> HostEdit:
        named, ops = edit.stored().items(), edit.ops.items()
        return HostEdit.of(
            {name: [self._tensor(path, name, t, name in ("down", "up")) for t in tensors] for name, tensors in named},
            {op: {name: self._tensor(path, name, t, False) for name, t in own.items()} for op, own in ops},
        )

    def _tensor(self, path: str, field: str, source: torch.Tensor, is_rows: bool) -> HostTensor:
        view = (source.data_ptr(), source.dtype, tuple(source.shape), source.stride(), is_rows)
        known = self._by_view.get(view) if source.numel() else None  # all empty tensors have one address
        if known is None:
            known = self._by_view[view] = self._new(path, field, source, is_rows)
        return known

    def _new(self, path: str, field: str, source: torch.Tensor, is_rows: bool) -> HostTensor:
        # Always a copy of its own: `source` may be a view that keeps something much larger alive.
        # Scales and shifts stay as exact as they came: rounding one errs in the same direction for every token.
        dtype = self._dtype if is_rows else torch.float32
        tensor = source.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not _is_finite(tensor):
            raise _not_finite(path, field, source, dtype)
        content_hash = _content_hash(tensor)
        if content_hash not in self._by_content:
            self._by_content[content_hash] = HostTensor(content_hash, tensor.pin_memory() if self._pin else tensor)
        return self._by_content[content_hash]


def _distinct(adapter: HostAdapter) -> dict[bytes, HostTensor]:
    return {tensor.content_hash: tensor for tensor in adapter.tensors()}


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is: its extremes are NaN if any of it is. A tenth of the time that `isfinite().all()` takes."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _content_hash(tensor: torch.Tensor) -> bytes:
    """BLAKE2b over dtype, shape and bytes of a contiguous tensor; wide, because a collision would mix two adapters."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=32)
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _not_finite(path: str, field: str, source: torch.Tensor, dtype: torch.dtype) -> AdapterRejected:
    name = str(dtype).removeprefix("torch.")
    if not source.isfinite().all():
        return AdapterRejected(
            f"The adapter's {field} at {path} holds NaN or infinity: it cannot be applied.", param="weights"
        )
    return AdapterRejected(
        f"The adapter's {field} at {path} reaches {source.abs().max().item():.6g}, beyond {name}'s largest value "
        f"{torch.finfo(dtype).max:.6g}: start the server with --dtype bfloat16 or float32.",
        param="weights",
    )
