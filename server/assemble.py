"""Everything built from the settings, ground to roof. Read this first.

Owns the wiring: of all that touches the base (`Works`), of what the routes work with, and of both in one process
(`assemble`); in two they are `server.apart`. Knows nothing of how any part works, nor how its sizes are found
(`sizing.py`).
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from server import __version__
from server.adapters.adapter_info import RegistryStats
from server.adapters.device.device import DeviceTier
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.lowering import lower
from server.adapters.merging.live import Merges
from server.adapters.merging.merge import MergeBase, projected_weight
from server.adapters.method import Lowered
from server.adapters.registry import Registry
from server.adapters.remote.address import AllowList
from server.adapters.remote.fetches import Fetches
from server.adapters.remote.places import check_installed
from server.adapters.rescan import Rescan
from server.adapters.served_base import ServedBase
from server.adapters.sources import FolderSource, LocalFolder, Source
from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.object_garbage import collect_garbage
from server.adapters.store.object_store import ObjectStore
from server.adapters.store.open_store import open_store
from server.adapters.store.presence import Presence
from server.api.app import create_app
from server.api.faces import EngineFace, EntryFace, FetchesFace, GrammarsFace, MergesFace, RegistryFace, StoreFace
from server.api.keys.keyring import Keyring
from server.api.services import BaseInfo, ChatOptions, HttpOptions, Services
from server.api.snapshot import Snapshot, snapshot_of
from server.engine.blocks import BlockPool
from server.engine.engine import Engine
from server.engine.entry import Entry
from server.engine.recording import CudaRecorder, Recorder
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.ground.config import Settings
from server.ground.errors import GraftError, StartupRefused
from server.ground.families import Side
from server.ground.memory_plan import MemoryPlan
from server.ground.metrics import Metrics, Watched
from server.ground.vllm_names import VllmNames
from server.model.base import Base
from server.model.chat_template import MAX_TEMPLATE_CHARS
from server.model.grammar import Grammars
from server.model.tokenizer import Tokenizer
from server.ops.prefill import PrefillLibrary, choose_prefill, refuse_prefill
from server.sizing import (
    base_options,
    context_limit,
    device_memory,
    expected_needs,
    expected_plan,
    makes_graphs,
    plan_memory,
    prefill_needs,
)

log = logging.getLogger(__name__)

_GARBAGE_INTERVAL_S = 3600.0
_KEYS_INTERVAL_S = 1.0  # within which a key that was taken out of its file is refused


@dataclass(frozen=True, slots=True)
class Figures:
    """What the banner tells of a server that is ready."""

    base: str
    kv_bytes: int
    num_blocks: int
    registry: RegistryStats
    names: tuple[str, ...]  # of its adapters


@dataclass(frozen=True, slots=True)
class Works:
    """All of a server that touches the base or its adapters: what the engine's process runs, if it has one."""

    settings: Settings
    base: Base
    tokenizer: Tokenizer
    grammars: Grammars
    adapters: DeviceTier
    store: AdapterStore
    presence: Presence
    registry: Registry
    memory: MemoryPlan
    merges: Merges
    fetches: Fetches
    rescans: tuple[Rescan, ...]  # of what others change: folders that are watched, a store that is shared
    engine: Engine
    runner: Runner
    metrics: Metrics
    info: BaseInfo

    def figures(self) -> Figures:
        base = self.base
        return Figures(
            f"{base.name}: {base.quantization}, {_plain(base.dtype)} on {base.device}, {_mib(base.weight_bytes)}",
            self.runner.cache.total_bytes,
            self.engine.stats().num_blocks,
            self.registry.stats(),
            tuple(info.name for info in self.registry.list()),
        )

    def snapshot(self, names: Collection[str]) -> Snapshot:
        """What a scrape is told, with which of these adapters' names are gone."""
        return snapshot_of(self.engine, self.registry, self.fetches, names)

    async def drain(self, timeout_s: float) -> None:
        """Accepts nothing new and waits for what is in flight; what is left after `timeout_s` is aborted."""
        self.fetches.stop()  # at once: who waits for one is told, and it would take longer than that
        await self.engine.drain(timeout_s)
        self.merges.give_up()

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be answered; a process whose server is not must end."""
        return self.engine.is_alive

    def abandon(self) -> None:
        """Tells those who wait for a server that is not alive."""
        self.engine.abandon()

    def kill(self) -> None:
        """Nothing of it outlives the process."""

    def close(self) -> None:
        """Ends every thread of the server; what is in flight fails. Blocks until they are done."""
        for rescan in self.rescans:
            rescan.close()
        self.store.close()
        self.engine.close()
        self.grammars.close()
        self.merges.close()
        self.tokenizer.close()
        self.fetches.close()
        self.registry.close()
        self.presence.close()


@dataclass(frozen=True, slots=True)
class Server(Works):
    """An assembled server in one process: the application to serve, and what it stands on."""

    app: FastAPI

    def banner(self) -> str:
        """What is loaded, the memory it takes, the address, and a line to try it."""
        return banner(self.settings, self.figures())


def assemble(settings: Settings) -> Server:
    """Loads the base and builds every part. Raises StartupRefused with a sentence that says what to change."""
    keyring = keyring_of(settings)
    works = assemble_works(settings, lambda base: metrics_of(settings, base.name))
    services = services_of(
        settings,
        keyring,
        engine=works.engine,
        entry=Entry(works.engine, works.registry),
        registry=works.registry,
        store=works.store,
        merges=works.merges,
        fetches=works.fetches,
        tokenizer=works.tokenizer,
        grammars=works.grammars,
        base=works.info,
        metrics=works.metrics,
        snapshot=works.snapshot,
    )
    parts: dict[str, Any] = {part.name: getattr(works, part.name) for part in fields(works)}
    parts["rescans"] += tuple(key_rescans(settings, keyring))
    return Server(**parts, app=create_app(services))


def assemble_works(settings: Settings, metrics_for: Callable[[Base], Metrics]) -> Works:
    """All but HTTP. Raises StartupRefused with a sentence that says what to change."""
    allowed = _allowed_sources(settings)
    base, memory, library = _base(settings)
    tokenizer = load_tokenizer(settings, base.eos_ids)
    metrics = metrics_for(base)
    store = open_store(settings, create=True)
    presence = Presence(store.root)  # before the registry reads the store, so that what it reads stays
    with _fitting("the adapters' buffer", "--adapter-memory"):
        has_tables = base.kernels is not None
        adapters = DeviceTier(base.sites, settings.adapter_memory, base.dtype, base.device, has_tables=has_tables)
    registry = _registry(settings, base, adapters, store, metrics)
    names = tuple(dict.fromkeys(settings.served_model_name or (base.name,)))
    _refuse_shared_names(names, registry)

    grammars = Grammars(lambda: tokenizer.for_grammars(base.vocab_size))
    scheduler, runner, engine = _engine(settings, base, adapters, registry, tokenizer, metrics, library, memory)
    grammars.load()  # while nobody waits for the event loop or the engine
    return Works(
        settings=settings,
        base=base,
        tokenizer=tokenizer,
        grammars=grammars,
        adapters=adapters,
        store=store,
        presence=presence,
        registry=registry,
        memory=memory,
        merges=Merges(registry, store, _merging_base(base), max_bytes=settings.max_upload_bytes),
        fetches=Fetches(registry, allowed, lambda: store.incoming(max_bytes=settings.max_upload_bytes), metrics),
        rescans=tuple(_rescans(settings, registry, store)),
        engine=engine,
        runner=runner,
        metrics=metrics,
        info=BaseInfo(base.name, names, scheduler.max_total_tokens, base.vocab_size, base.fingerprint),
    )


def services_of(
    settings: Settings,
    keyring: Keyring | None,
    *,
    engine: EngineFace,
    entry: EntryFace,
    registry: RegistryFace,
    store: StoreFace,
    merges: MergesFace,
    fetches: FetchesFace,
    tokenizer: Tokenizer,
    grammars: GrammarsFace,
    base: BaseInfo,
    metrics: Metrics,
    snapshot: Callable[[Collection[str]], Snapshot],
) -> Services:
    """What the routes work with: these parts, and what the settings say of HTTP."""
    return Services(
        engine=engine,
        entry=entry,
        fetches=fetches,
        registry=registry,
        store=store,
        merges=merges,
        tokenizer=tokenizer,
        grammars=grammars,
        base=base,
        metrics=metrics,
        snapshot=snapshot,
        version=__version__,
        started_at=time.time(),
        keyring=keyring,
        max_upload_bytes=settings.max_upload_bytes,
        store_quota_bytes=settings.store_quota,
        adapter_paths=settings.adapter_paths,
        chat=_chat_options(settings),
        max_queued=settings.max_queued,
        http=_http_options(settings),
    )


def _base(settings: Settings) -> tuple[Base, MemoryPlan, PrefillLibrary | None]:
    """The base, what it leaves room for, and the library of its attention.

    What cannot fit or cannot be used is refused before any of it is loaded, as far as that can be told then.
    """
    options = base_options(settings)
    refuse_prefill(settings.attention, expected_needs(settings, options))
    expected_plan(settings, options)
    base = Base.load(options)
    if base.note:
        log.info(base.note)
    context_limit(settings, base)  # refuses a longer one than the base reads
    memory = plan_memory(settings, base.size, base.device, base.weight_bytes)
    log.info("memory of the %s:\n%s", base.device.type, memory.table())
    library = choose_prefill(settings.attention, prefill_needs(base, memory.needs.block_tokens))
    return base, memory, library


def metrics_of(settings: Settings, base: str, side: Side | None = None) -> Metrics:
    """The metrics that GET /metrics tells, of a base called so. `side` as `Metrics` has it."""
    if settings.metrics_compat == "none":
        return Metrics(settings.metrics_max_adapters, side=side)
    name = (settings.served_model_name or (base,))[0]
    return Metrics(settings.metrics_max_adapters, VllmNames(name), side)


def _memory(base: Base, adapters: DeviceTier, runner: Runner) -> Mapping[str, Watched]:
    """What metrics show of the base and of memory."""
    free, total = device_memory(base.device)
    return {
        "graft_base_info": {(base.name, str(base.quantization), _plain(base.dtype), str(base.device)): 1},
        "graft_base_bytes": base.weight_bytes,
        "graft_kv_cache_bytes": runner.cache.total_bytes,
        "graft_rank_rows": adapters.num_rows,
        "graft_rank_rows_shared": adapters.num_shared_rows,
        "graft_rank_row_uses": adapters.num_row_uses,
        "graft_device_memory_bytes": total,
        "graft_device_memory_free_bytes": free,
    }


def _registry(settings: Settings, base: Base, adapters: DeviceTier, store: AdapterStore, metrics: Metrics) -> Registry:
    def load(folder: Path, weight: float = 1.0) -> Lowered:
        return lower(Checkpoint.open(folder), base.sites.by_path, weight)

    host = HostTier(settings.host_memory, base.dtype, pin=base.device.type == "cuda")
    served, num_kept = served_base(settings, base.name, base.fingerprint), settings.keep_versions
    registry = Registry(
        store,
        _sources(settings),
        host,
        adapters,
        load,
        base=served,
        max_versions=num_kept,
        observe=metrics.observe_load,
    )
    _verify_named(settings, registry)
    return registry


def _engine(
    settings: Settings,
    base: Base,
    adapters: DeviceTier,
    registry: Registry,
    tokenizer: Tokenizer,
    metrics: Metrics,
    library: PrefillLibrary | None,
    memory: MemoryPlan,
) -> tuple[Scheduler, Runner, Engine]:
    """What runs the steps, with the cache and the budgets that it runs them under."""
    max_context = context_limit(settings, base)
    blocks = BlockPool(memory.num_blocks, memory.needs.block_tokens)
    limits, reuses = _limits(settings, max_context), _reuses_prefixes(settings, base)
    scheduler = Scheduler(limits, blocks, registry, tokenizer.eos_ids, reuses_prefixes=reuses)
    with _fitting("the KV cache", "--kv-memory"):
        runner = Runner(
            base,
            adapters,
            blocks.num_blocks,
            blocks.block_size,
            base.kernels,
            library=library,
            recorder=_recorder(settings, base.device),
            max_recorded=limits.max_sequences,
            max_context=scheduler.max_total_tokens,
        )
    if runner.graphs is not None:
        with _fitting("what decode steps are recorded into", "--kv-memory, or record none with --graphs off"):
            runner.graphs.record_all(
                lambda done, total: log.info("recorded %d of %d sizes of decode steps", done, total)
            )
    metrics.watch(lambda: _memory(base, adapters, runner))
    overlaps = settings.overlap == "on" or (settings.overlap == "auto" and base.device.type == "cuda")
    engine = Engine(
        scheduler, blocks, runner, tokenizer, metrics.step, overlaps=overlaps, max_step_s=settings.step_timeout
    )
    return scheduler, runner, engine


def _recorder(settings: Settings, device: torch.device) -> Recorder | None:
    """What makes graphs of decode steps; None where they are launched kernel by kernel."""
    return CudaRecorder(device) if makes_graphs(settings, device) else None


def load_tokenizer(settings: Settings, eos_ids: frozenset[int]) -> Tokenizer:
    """The base's, with the settings' chat template; `eos_ids` as `Tokenizer.load` has them. Raises StartupRefused."""
    tokenizer = Tokenizer.load(settings.model, eos_ids, _read_template(settings.chat_template))
    _check_template(settings, tokenizer)
    return tokenizer


def _read_template(path: Path | None) -> str | None:
    """The text of --chat-template. Raises StartupRefused."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupRefused(f"--chat-template {path} cannot be read: {error}") from error
    if len(text) > MAX_TEMPLATE_CHARS:
        raise StartupRefused(f"--chat-template {path} has more than {MAX_TEMPLATE_CHARS} characters")
    return text


def _check_template(settings: Settings, tokenizer: Tokenizer) -> None:
    """A template that the operator names is looked at now; a model's own when it is first used."""
    if settings.chat_template is None or tokenizer.chat_template is None:
        return
    try:
        _ = tokenizer.chat_template.variables
    except GraftError as error:
        tokenizer.close()
        raise StartupRefused(f"--chat-template {settings.chat_template}: {error.message}") from error


def _http_options(settings: Settings) -> HttpOptions:
    return HttpOptions(
        keep_alive_s=settings.sse_keep_alive_interval,
        ignores_unknown_fields=settings.unknown_fields == "warn",
        allowed_origins=settings.allowed_origins,
        open_metrics=settings.open_metrics,
        shares_prefixes=settings.share_prefixes,
    )


def _chat_options(settings: Settings) -> ChatOptions:
    return ChatOptions(
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        template_variables=frozenset(settings.chat_template_kwargs),
        trusts_adapter_templates=settings.trust_adapter_templates,
    )


def _merging_base(base: Base) -> MergeBase:
    """The base as it is served: its weights are read through its own products."""
    return MergeBase(base.name, base.fingerprint, base.sites.by_path, projected_weight)


def keyring_of(settings: Settings) -> Keyring | None:
    """The keys that requests must carry; None where none is asked for. Raises StartupRefused."""
    if not settings.asks_for_keys:
        return None
    return Keyring(settings.api_keys, settings.api_key.get_secret_value() if settings.api_key else None)


def key_rescans(settings: Settings, keyring: Keyring | None) -> Iterator[Rescan]:
    """Of the file of keys, where there is one."""
    if keyring is not None and settings.api_keys is not None:
        yield Rescan(keyring.refresh, _KEYS_INTERVAL_S, what=str(settings.api_keys))


def _rescans(settings: Settings, registry: Registry, store: AdapterStore) -> Iterator[Rescan]:
    if settings.adapters is not None:
        yield Rescan(registry.rescan)
    if isinstance(store, ObjectStore):
        yield Rescan(registry.refresh, settings.store_refresh, what=store.location)
        yield Rescan(lambda: collect_garbage(store), _GARBAGE_INTERVAL_S, what=store.location)


def served_base(settings: Settings, name: str, fingerprint: str | None) -> ServedBase:
    """The base as adapters are compared with it: by its name, what it was loaded from, and the names it serves as."""
    names = (name, settings.model, *settings.served_model_name)
    return ServedBase(tuple(dict.fromkeys(names)), fingerprint, settings.strict_base)


@contextmanager
def _fitting(what: str, flag: str) -> Iterator[None]:
    """Turns memory that cannot be had into a sentence with the flag that asks for less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise StartupRefused(f"{what} does not fit into memory ({error}); lower {flag}") from error


def _sources(settings: Settings) -> list[Source]:
    sources: list[Source] = [LocalFolder(name, path) for name, path in settings.adapter]
    if settings.adapters is not None:
        sources.append(FolderSource(settings.adapters))
    return sources


def _allowed_sources(settings: Settings) -> AllowList:
    allowed = AllowList(settings.allow_source)
    check_installed(allowed.schemes)
    return allowed


def _verify_named(settings: Settings, registry: Registry) -> None:
    """Adapters given one by one are wanted: one that cannot be served stops the start, not a request later."""
    for name, path in settings.adapter:
        try:
            registry.verify(name)
        except GraftError as error:
            registry.close()
            raise StartupRefused(f"--adapter {name}={path}: {error.message}") from error


def _refuse_shared_names(names: tuple[str, ...], registry: Registry) -> None:
    """A request's `model` names the base or an adapter, so no name may be both."""
    shared = sorted(set(names) & {info.name for info in registry.list()})
    if shared:
        registry.close()
        raise StartupRefused(f"{shared[0]!r} names the base and an adapter; give the base another --served-model-name")


def _limits(settings: Settings, max_context: int) -> SchedulerLimits:
    return SchedulerLimits(
        max_sequences=settings.max_sequences,
        max_batch_tokens=settings.max_batch_tokens,
        max_queued=settings.max_queued,
        max_context=max_context,
        queue_timeout_s=settings.queue_timeout,
        request_timeout_s=settings.request_timeout,
        max_adapter_wait_s=settings.max_adapter_wait,
    )


def _reuses_prefixes(settings: Settings, base: Base) -> bool:
    if settings.prefix_reuse == "off":
        return False
    if base.has_length_dependent_rope:
        log.info("%s: its RoPE depends on a sequence's length, so blocks of one are not reused in another", base.name)
        return False
    return True


def banner(settings: Settings, figures: Figures) -> str:
    """What is loaded, the memory it takes, the address, and a line to try it."""
    names, stats = figures.names, figures.registry
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    adapter = f'"adapter": "{names[0]}", ' if names else ""
    key = ' -H "Authorization: Bearer $GRAFT_API_KEY"' if settings.api_key or settings.api_keys else ""
    lines = [
        "",
        f"  Graftserve {__version__} at {settings.url}",
        f"  base      {figures.base}",
        f"  memory    KV cache {_mib(figures.kv_bytes)} ({figures.num_blocks} blocks), adapters "
        f"{_mib(stats.device_capacity_bytes)} on the device, {_mib(stats.host_max_bytes)} on the host",
        f"  adapters  {shown or 'none yet: POST /v1/adapters uploads one'}",
        "",
        "  Try it:",
        f"  curl {settings.url}/v1/completions -H 'content-type: application/json'{key} \\",
        f'    -d \'{{{adapter}"prompt": "The old fisherman", "max_tokens": 40}}\'',
        "",
    ]
    return "\n".join(lines)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
