"""What the settings ask of a device, and what fits there: its dtype, how much context, blocks, graphs and workspace.

Owns the sizes that are computed from the base and the machine. Knows nothing of what is built with them (`assemble`).
"""

import torch

from server.engine.decode_graphs import graph_sizes
from server.ground.config import Settings
from server.ground.errors import StartupRefused
from server.ground.machine import ram
from server.ground.memory_plan import MemoryNeeds, MemoryPlan, plan
from server.model.attention import KVCache
from server.model.base import Base
from server.model.pretrained import BaseOptions, default_dtype, read_config
from server.model.quantize import Quantization
from server.model.size import BaseSize, expected_layers, expected_size, kv_dtype, workspace_bytes
from server.ops.prefill import AttentionLayer, PrefillNeeds, library_bytes

# On a CPU decode reads a block in one product, so a sequence should need few of them.
_BLOCK_SIZE = {"cpu": 128, "cuda": 64}
_VARLEN_BLOCK_SIZE = 256  # the least that FlashAttention 2 reads
_KV_PART = {"cpu": 0.25, "cuda": 1.0}  # of what the base and the adapters leave of the memory share
_GRAPH_BYTES = 256 << 20  # a reserve beside the logits: what recording decode steps takes is known afterwards


def base_options(settings: Settings) -> BaseOptions:
    """What base to load, and how. Raises StartupRefused for a device that is not there."""
    dtype, device = _dtype(settings.dtype), device_named(settings.device)
    quantize = Quantization(settings.quantize)
    return BaseOptions(settings.model, quantize, dtype, device, settings.ops, settings.four_bit_products)


def device_named(name: str) -> torch.device:
    """The device of --device: "auto" takes a GPU if there is one. Raises StartupRefused where there is none to take."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupRefused("--device cuda: torch sees no GPU here; use --device cpu, or install torch with CUDA")
    return torch.device(name)


def has_engine_process(settings: Settings) -> bool:
    """Whether `graft serve` runs the engine in a process of its own. Raises StartupRefused for a device not there."""
    if settings.engine_process == "auto":
        return device_named(settings.device).type == "cuda"
    return settings.engine_process == "on"


def _dtype(name: str) -> torch.dtype | None:
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return dtypes.get(name)  # None for "auto": the base decides


def context_limit(settings: Settings, base: Base) -> int:
    """Tokens that a request may come to, prompt and output. Raises StartupRefused for more than the base reads."""
    if settings.max_context is not None and settings.max_context > base.max_context:
        raise StartupRefused(
            f"--max-context {settings.max_context}: {base.name} reads at most {base.max_context} tokens; lower it"
        )
    return settings.max_context or base.max_context


def expected_plan(settings: Settings, options: BaseOptions) -> MemoryPlan | None:
    """The plan for a base that is not loaded, of at least its size; None where that cannot be told from its files.

    Raises StartupRefused for what cannot fit, and for a model that is not there.
    """
    size = expected_size(options)
    return None if size is None else plan_memory(settings, size, options.device, 0)


def plan_memory(settings: Settings, size: BaseSize, device: torch.device, loaded_bytes: int) -> MemoryPlan:
    """Raises StartupRefused with the dial to turn where it does not come out. Of the base, `loaded_bytes` are there."""
    max_context = settings.max_context or size.max_context
    block_size = _block_size(settings, device, max_context)
    needs = MemoryNeeds(
        base_bytes=size.base_bytes,
        graph_bytes=_graph_bytes(settings, size) if makes_graphs(settings, device) else 0,
        adapter_bytes=settings.adapter_memory,
        workspace_bytes=workspace_bytes(size.config, settings.max_batch_tokens, settings.max_sequences)
        + library_bytes(settings.attention),
        block_bytes=KVCache.block_bytes(size.kv_shapes, block_size, size.kv_dtype),
        block_tokens=block_size,
        max_blocks=settings.max_sequences * -(-max_context // block_size),
        kv_bytes=settings.kv_memory,
    )
    return plan(needs, free_bytes(device) + loaded_bytes, settings.memory_share, _KV_PART[device.type])


def _graph_bytes(settings: Settings, size: BaseSize) -> int:
    """Each recording keeps its logits, and each size has two: with adapters and without."""
    num_rows = 2 * sum(graph_sizes(settings.max_sequences))
    return _GRAPH_BYTES + num_rows * int(size.config.get_text_config().vocab_size) * size.kv_dtype.itemsize


def _block_size(settings: Settings, device: torch.device, max_context: int) -> int:
    """Tokens of a block of the KV cache."""
    own = _VARLEN_BLOCK_SIZE if settings.attention == "varlen" else _BLOCK_SIZE[device.type]
    return min(settings.block_size or own, -(-max_context // 8) * 8)


def expected_needs(settings: Settings, options: BaseOptions) -> PrefillNeeds:
    """What a base that is not loaded asks of a library for the attention of prompts, as far as its config tells.

    Raises StartupRefused when there is no such model.
    """
    config = read_config(options.model)
    own_dtype = options.dtype or default_dtype(config, options.device)
    dtype = kv_dtype(own_dtype, options.device, has_kernels=options.ops != "reference")
    max_context = settings.max_context or int(getattr(config.get_text_config(), "max_position_embeddings", 4096))
    return _needs(options.device, dtype, _block_size(settings, options.device, max_context), expected_layers(config))


def prefill_needs(base: Base, block_size: int) -> PrefillNeeds:
    """What a base asks of a library for the attention of prompts."""
    return _needs(base.device, base.kv_dtype, block_size, frozenset(base.attention.layers))


def _needs(
    device: torch.device, dtype: torch.dtype, block_size: int, layers: frozenset[AttentionLayer]
) -> PrefillNeeds:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return PrefillNeeds(device, capability, dtype, block_size, layers)


def makes_graphs(settings: Settings, device: torch.device) -> bool:
    """Whether decode steps are recorded: where kernels find rows on the device, which alone can be repeated."""
    return device.type == "cuda" and settings.ops == "triton" and settings.graphs == "auto"


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU's memory, or of the RAM."""
    if device.type == "cpu":
        return ram().available_bytes
    torch.cuda.empty_cache()  # what loading has freed counts
    return torch.cuda.mem_get_info(device)[0]


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the device that are free, and all that it has; of a CPU those of the machine."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else (ram().available_bytes, ram().total_bytes)
