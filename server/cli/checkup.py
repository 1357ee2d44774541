"""What `graft doctor` looks at: this machine, what is installed, and what a server with these settings would use.

Owns the looking. Each part yields findings, and raises nothing for what it finds. Knows nothing about how they are
shown.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from server import __version__
from server.adapters.remote.address import AllowList
from server.adapters.remote.places import check_installed
from server.adapters.store.open_store import open_store
from server.cli.serve import bind
from server.ground.config import Settings
from server.ground.errors import GraftError
from server.ground.machine import cpu, ram
from server.model.fused import can_pack
from server.model.pretrained import BaseOptions, default_dtype, read_config, stored_quantization
from server.model.quantize import Quantization, holds_dequantized
from server.ops import load_kernels, native, takes_native
from server.ops.prefill import prefill_refusal
from server.sizing import base_options, expected_needs, expected_plan, free_bytes, has_engine_process

_VERSIONED = ("torch", "transformers", "bitsandbytes", "safetensors", "accelerate", "peft", "triton")
# extra, the packages that it brings, and what it gives
_EXTRAS = (
    ("triton", ("triton",), "--ops triton: kernels that read adapters in their places, on a GPU"),
    ("flashinfer", ("flashinfer",), "--attention flashinfer: prompts whose scores are capped, and blocks of any size"),
    ("remote", ("s3fs", "gcsfs", "adlfs"), "adapters from s3://, gs:// and az:// (--allow-source)"),
    ("objects", ("obstore",), "--store s3://, gs:// and az://: one store for several servers"),
    ("bench", ("peft", "rich", "tokenizers"), "graft bench"),
    ("plot", ("matplotlib",), "--plot: pictures"),
)


class State(StrEnum):
    OK = "ok"
    NOTE = "note"  # nothing that keeps a server from starting
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, and a sentence; where something is missing, with the remedy."""

    section: str
    name: str
    text: str
    state: State = State.OK


def machine() -> Iterator[Finding]:
    """Processor, memory and GPUs."""
    processor, memory = cpu(), ram()
    flags = ", ".join(processor.flags) or "no extensions that matter"
    yield Finding("machine", "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Finding("machine", "cpu", f"{processor.name}, {processor.num_cores} cores for this process; {flags}")
    limit = "none" if memory.limit_bytes is None else _gib(memory.limit_bytes)
    yield Finding("machine", "ram", f"{_gib(memory.available_bytes)} free of {_gib(memory.total_bytes)}")
    yield Finding("machine", "container limit", limit)
    if not torch.cuda.is_available():
        yield Finding("machine", "gpu", "torch sees none", State.NOTE)
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(number)
        free = _gib(free_bytes(torch.device("cuda", number)))
        text = (
            f"{found.name}, compute capability {found.major}.{found.minor}, {free} free of {_gib(found.total_memory)}"
        )
        yield Finding("machine", f"gpu {number}", text)


def versions() -> Iterator[Finding]:
    """Of what answers may depend on."""
    yield Finding("versions", "graftserve", __version__)
    yield Finding("versions", "python", platform.python_version())
    for name in _VERSIONED:
        try:
            yield Finding("versions", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("versions", name, "not installed", State.NOTE)


def extras() -> Iterator[Finding]:
    """What is not installed, and what it would give."""
    for extra, packages, gives in _EXTRAS:
        lacking = [name for name in packages if importlib.util.find_spec(name) is None]
        if lacking:
            text = f"{', '.join(lacking)} not installed: pip install 'graftserve[{extra}]' for {gives}"
            yield Finding("extras", extra, text, State.NOTE)
        else:
            yield Finding("extras", extra, f"installed, for {gives}")


def base(settings: Settings) -> Iterator[Finding]:
    """The base, what computes with it, and the memory that it is planned to leave."""
    try:
        options = base_options(settings)
        config = read_config(options.model)
        stored = stored_quantization(config)
    except GraftError as error:
        yield Finding("base", "model", error.message, State.MISSING)
        return
    dtype = options.dtype or default_dtype(config, options.device)
    held = stored or options.quantize
    yield Finding("base", "model", f"{options.model} ({config.model_type})")
    yield Finding("base", "device", f"{options.device}, {str(dtype).removeprefix('torch.')}")
    yield Finding("base", "quantization", f"{held}{', as stored' if stored else ''}: {_products(held, dtype, options)}")
    yield _ops(settings, options, dtype)
    yield Finding("base", "engine", _engine(settings))
    yield _attention(settings, options)
    yield from _memory(settings, options)


def _engine(settings: Settings) -> str:
    if has_engine_process(settings):
        return "a process of its own, which streams do not slow"
    return "a thread of the process that answers requests"


def _products(held: Quantization, dtype: torch.dtype, options: BaseOptions) -> str:
    if held.is_4_bit and options.four_bit_products == "triton":
        return "Triton kernels up to 128 tokens, and PyTorch's product of dequantized weights beyond"
    if options.device.type == "cuda":
        return "PyTorch's products" if held is Quantization.NONE else "bitsandbytes' CUDA kernels"
    if held.is_4_bit:
        if takes_native(options.ops, options.device, dtype):
            return f"native products of 4-bit weights, {_way_to_multiply(dtype)}"
        if holds_dequantized(dtype, options.device):
            return "this CPU has no AVX512-BF16, so layers are held dequantized, in the memory of an unquantized base"
        return "dequantized for each product" if dtype is torch.float32 else "bitsandbytes' AVX512-BF16 product"
    if held is Quantization.INT8:
        return "bitsandbytes' int8 product"
    if dtype is torch.bfloat16 and takes_native(options.ops, options.device, dtype) and native.multiplies_bfloat16():
        return f"native products, {_way_to_multiply(dtype)}"
    is_packed = dtype is torch.bfloat16 and can_pack()
    return "weights packed once by oneDNN" if is_packed else "PyTorch's products"


def _way_to_multiply(dtype: torch.dtype) -> str:
    if dtype is not torch.bfloat16 or not native.multiplies_bfloat16():
        return "by vectors"
    return "on the matrix unit (AMX)" if native.has_matrix_unit() else "by vectors of bfloat16 (AVX512-BF16)"


def _ops(settings: Settings, options: BaseOptions, dtype: torch.dtype) -> Finding:
    try:
        kernels = load_kernels(settings.ops, options.device, dtype)
    except GraftError as error:
        return Finding("base", "ops", error.message, State.MISSING)
    if kernels is not None:
        found = "Triton kernels" if settings.ops == "triton" else "native: C compiled for this CPU"
        return Finding("base", "ops", found)
    return Finding("base", "ops", f"reference: PyTorch's operators{_slower(options, dtype)}")


def _slower(options: BaseOptions, dtype: torch.dtype) -> str:
    """What a CPU could have instead."""
    if options.device.type != "cpu" or dtype not in native.DTYPES:
        return ""
    try:
        native.library()
    except native.CannotCompile as error:
        return f"; native kernels cannot be compiled: {error}"
    return ""


def _attention(settings: Settings, options: BaseOptions) -> Finding:
    reason = prefill_refusal(settings.attention, expected_needs(settings, options))
    if reason is not None and settings.attention != "auto":
        return Finding("base", "attention", f"--attention {reason}; or use --attention torch", State.MISSING)
    if reason is not None or settings.attention == "torch":
        why = "" if reason is None else f" ({reason})"
        return Finding("base", "attention", f"prompts by PyTorch, chunk by chunk{why}")
    library = "varlen" if settings.attention == "auto" else settings.attention
    return Finding("base", "attention", f"prompts by {library}, if it passes a trial at the start")


def _memory(settings: Settings, options: BaseOptions) -> Iterator[Finding]:
    try:
        found = expected_plan(settings, options)
    except GraftError as error:
        yield Finding("memory", "plan", error.message, State.MISSING)
        return
    if found is None:
        yield Finding("memory", "plan", "unknown: the base's files are not on this machine, or do not tell", State.NOTE)
        return
    for name, num_bytes, why in found.rows():
        at_least = "at least " if name == "base" else ""
        yield Finding("memory", name, f"{at_least}{num_bytes / 2**20:,.1f} MiB ({why})")
    host = settings.host_memory / 2**20
    yield Finding("memory", "host tier", f"at most {host:,.1f} MiB of RAM, as adapters come (--host-memory)")


def places(settings: Settings) -> Iterator[Finding]:
    """The store, what adapters may be fetched with, and the port."""
    yield _store(settings)
    try:
        allowed = AllowList(settings.allow_source)
        check_installed(allowed.schemes)
        yield Finding("places", "sources", ", ".join(settings.allow_source) or "none (--allow-source)")
    except GraftError as error:
        yield Finding("places", "sources", error.message, State.MISSING)
    try:
        bind(settings).close()
        yield Finding("places", "port", f"{settings.host} port {settings.port} is free")
    except GraftError as error:
        yield Finding("places", "port", error.message, State.MISSING)


def _store(settings: Settings) -> Finding:
    try:
        # A bucket is tried out; a folder is not made by looking at it.
        if isinstance(settings.store, str):
            open_store(settings, create=True).close()
            return Finding("places", "store", f"{settings.store} answers")
        return _folder(settings.store)
    except GraftError as error:
        return Finding("places", "store", error.message, State.MISSING)
    except OSError as error:
        return Finding("places", "store", f"--store {settings.store}: {error}", State.MISSING)


def _folder(store: Path) -> Finding:
    """A folder, or the nearest one above it that is there."""
    there = next(path for path in (store.absolute(), *store.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        text = f"{there} is no folder that can be written to: mend its permissions, or give another --store"
        return Finding("places", "store", text, State.MISSING)
    made = "" if there == store.absolute() else ", made at the start"
    return Finding("places", "store", f"{store}{made}; {_gib(shutil.disk_usage(there).free)} free on its disk")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
