"""An upload rehearsed: what a server with these settings would make of an adapter, without the server.

Owns the parts of a server that judge adapters, put together around the outline of the base (or, if asked for, the
loaded base): no cache, no engine, no memory for adapters. The judging is the registry's own. Imports torch: commands
import this module when they need it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from server.adapters.device.device import DeviceTier
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from server.adapters.registry import Registered, Registry
from server.adapters.served_base import BaseClaim
from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.folder_store import Incoming, Store, content_files, folder_digest
from server.assemble import served_base
from server.ground.config import Settings
from server.ground.errors import AdapterRejected, Conflict
from server.model.base import Base
from server.model.outline import Outline, outline
from server.model.site import Site
from server.model.site_table import SiteTable
from server.sizing import base_options

_NAME = "adapter"  # in a store of its own, where any name will do
_CHUNK_BYTES = 1 << 20
_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class _Judge:
    """A base as far as adapters are concerned."""

    name: str
    fingerprint: str | None
    table: SiteTable
    sites: Mapping[str, Site]
    dtype: torch.dtype
    outline: Outline | None  # None where the weights are there


@dataclass(frozen=True, slots=True)
class Tried:
    """An adapter that a server with these settings would serve."""

    lowered: Lowered
    resident_bytes: int  # of its rank rows and vectors on the device, when it shares none


class Rehearsal:
    """The parts that an upload meets, for one set of settings."""

    def __init__(self, settings: Settings, *, loads_base: bool = False) -> None:
        """Reads the config of the base; its weights only with `loads_base`. Raises StartupRefused."""
        self._settings = settings
        self._judge = _loaded(settings) if loads_base else _outlined(settings)
        self._host = HostTier(settings.host_memory, self._judge.dtype)
        # On the meta device the buffer has its size and its books, but takes no memory.
        self._device = DeviceTier(self._judge.table, settings.adapter_memory, self._judge.dtype, _META)

        self._served = served_base(settings, self._judge.name, self._judge.fingerprint)

    @property
    def base_name(self) -> str:
        return self._judge.name

    @property
    def dtype_name(self) -> str:
        """What the base computes in, and adapters are kept in."""
        return str(self._judge.dtype).removeprefix("torch.")

    @property
    def sites(self) -> Mapping[str, Site]:
        """The places in the base that an adapter can edit, by path."""
        return self._judge.sites

    @property
    def caveat(self) -> str | None:
        """What could not be judged so far, because it depends on the weights; None if nothing."""
        known = self._judge.outline
        if known is None or known.num_asked == 0:
            return None
        return (
            "The base's weights were not read. An upload would also be refused if the adapter made a row of a weight "
            "vanish; --load-base loads the base and looks."
        )

    def register(self, store: AdapterStore, folder: Path, name: str, *, replace: bool) -> Registered:
        """Does to `store` what an upload of this folder to a server does. Raises what the upload is answered with."""
        if name in (self._settings.served_model_name or (self.base_name,)):
            raise Conflict(f"'{name}' is a name of the base; choose another for the adapter.", param="name")
        with self._registry(store) as registry, store.incoming(max_bytes=self._settings.max_upload_bytes) as incoming:
            _receive(folder, incoming)
            return registry.register(incoming, name, replace=replace)

    def verify(self, folder: Path) -> Registered:
        """As `register`, under a name that nobody has, in a store that is gone afterwards."""
        with TemporaryDirectory(prefix="graft-verify-") as root:
            return self.register(Store(Path(root), create=True), folder, _NAME, replace=False)

    def try_on(self, folder: Path) -> Tried:
        """Lowers the adapter in a folder and weighs it. Raises AdapterRejected as an upload would, sizes apart."""
        lowered = self._lower(folder)
        adapter = self._host.put(folder_digest(folder).digest, lowered)
        return Tried(lowered, self._device.resident_bytes(adapter))

    def doubts(self, claim: BaseClaim) -> tuple[str, ...]:
        """Sentences for the owner of an adapter that seems to be of another base."""
        return self._served.doubts(claim)

    @contextmanager
    def _registry(self, store: AdapterStore) -> Iterator[Registry]:
        registry = Registry(
            store, (), self._host, self._device, self._lower, 1,
            base=self._served, max_versions=self._settings.keep_versions,
        )  # fmt: skip
        try:
            yield registry
        finally:
            registry.close()

    def _lower(self, folder: Path, weight: float = 1.0) -> Lowered:
        return lower(Checkpoint.open(folder), self._judge.sites, weight)


def _outlined(settings: Settings) -> _Judge:
    if settings.device == "cuda":  # named, not used: what a GPU's server would say can be known where there is none
        options = base_options(settings.model_copy(update={"device": "cpu"}))
        known = outline(replace(options, device=torch.device("cuda")))
    else:
        known = outline(base_options(settings))
    return _Judge(known.name, known.fingerprint, known.table, known.sites, known.dtype, known)


def _loaded(settings: Settings) -> _Judge:
    base = Base.load(base_options(settings))
    return _Judge(base.name, base.fingerprint, base.sites, base.sites.by_path, base.dtype, None)


def _receive(folder: Path, incoming: Incoming) -> None:
    """The folder's files as an upload that arrives."""
    for path in _files(folder):
        try:
            with path.open("rb") as source, incoming.open_file(path.name) as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
        except OSError as error:
            raise AdapterRejected(f"{path} cannot be read ({error.strerror or error}): mend its permissions.") from None


def _files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise AdapterRejected(
            f"{folder} is not a folder: give one with adapter_config.json and adapter_model.safetensors. An adapter on "
            f"the hub has to be downloaded first: hf download {folder} --local-dir DIR"
        )
    try:
        return content_files(folder)
    except AdapterRejected:
        Checkpoint.open(folder)  # where this finds a reason of its own, it says more
        raise
