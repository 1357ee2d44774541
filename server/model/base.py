"""The base: loaded, quantized and frozen once, resident for the life of the process.

Owns the transformers model, its sites and its attention, and the check at load that this very architecture can be
served in packed batches. Knows nothing about adapters, requests or scheduling.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from server.ground.errors import StartupRefused
from server.model.attention import IMPLEMENTATION, KVCache, PagedAttention, attach
from server.model.context import AttentionBatch, Scope, StepContext
from server.model.quantize import Quantization, found_quantization, quantization_config, settle
from server.model.sites import BaseSite, SiteTable
from server.ops import PrefillSpan, TokenLayout

log = logging.getLogger(__name__)

# RoPE variants whose frequencies transformers takes from the longest position in the batch.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_SERVED = "Llama, Mistral, Qwen, Gemma, Phi, GPT-2, OPT and GPT-NeoX families can be served"


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """What to load and how. `dtype` None means the checkpoint's own (bfloat16 for float16 ones on a CPU)."""

    model: str
    quantize: Quantization = Quantization.NF4
    dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")


class Base:
    """One quantized model, ready for packed forward passes."""

    def __init__(self, model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> None:
        """Takes a loaded causal language model (attention implementation "graft"); raises StartupRefused by name."""
        self.name = name
        self.dtype = dtype
        self.device = device
        self.model = model.eval().requires_grad_(False)
        self.config: PreTrainedConfig = model.config  # type: ignore[assignment]
        self.note = settle(model, dtype, device)
        self.quantization = found_quantization(model)
        self.scope = Scope()
        self.attention = PagedAttention(self.scope)
        self._refuse_batch_dependent_rope()
        self._refuse_chunked_attention()
        self.num_layers = attach(model, self.attention)
        self.sites = SiteTable(model, self.scope)
        self.kv_shapes: list[tuple[int, int]] = []
        self._check_packing()
        self.sites.fuse()

    @classmethod
    def load(cls, options: BaseOptions) -> "Base":
        """Loads a local folder or hub id with transformers, quantizing on the way.

        A checkpoint that is quantized already stays as it is, whatever was asked for. Raises StartupRefused when there
        is no such model, its weights are not whole, or the architecture cannot be served.
        """
        config = _config(options.model)
        dtype = options.dtype or _default_dtype(config, options.device)
        stored = _stored_quantization(config)
        if stored is not None and stored is not options.quantize:
            log.info("checkpoint is already quantized to %s", stored)
        quantization = None if stored is not None else quantization_config(options.quantize, dtype)
        extra: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                options.model,
                dtype=dtype,
                attn_implementation=IMPLEMENTATION,
                device_map={"": str(options.device)},
                output_loading_info=True,
                **extra,
            )
        except KeyError as error:  # models that keep a table of their own attention classes
            raise StartupRefused(
                f"cannot load {options.model!r}: models of type {config.model_type!r} do not use transformers' "
                f"attention interface ({error} is not in their table), so their attention cannot be paged; {_SERVED}"
            ) from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise StartupRefused(f"cannot load {options.model!r}: {error}") from error
        model, info = loaded
        _refuse_missing(options.model, info["missing_keys"])
        return cls(model, _model_name(options.model), dtype, options.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, shared ones once."""
        tensors = {t.data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def kv_dtype(self) -> torch.dtype:
        """What keys and values are cached in: float32 on a CPU, whose small 16-bit products are slower."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    @property
    def max_context(self) -> int:
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 4096))

    @property
    def eos_ids(self) -> frozenset[int]:
        """The end-of-sequence tokens of the model's generation config."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, context: StepContext
    ) -> torch.Tensor:
        """One packed pass: ids, positions (tokens,) and the rows to keep (k,) -> logits (k, vocabulary)."""
        with torch.inference_mode(), self.scope.enter(context):
            out = self.model(
                input_ids=ids[None],
                position_ids=positions[None],
                logits_to_keep=keep,
                use_cache=False,
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    @property
    def _class_name(self) -> str:
        return type(self.model).__name__

    def _refuse_chunked_attention(self) -> None:
        chunk = getattr(self.config.get_text_config(), "attention_chunk_size", None)
        if chunk is not None:
            raise StartupRefused(
                f"{self._class_name} attends within chunks of {chunk} tokens, which paged attention does not; {_SERVED}"
            )

    def _refuse_batch_dependent_rope(self) -> None:
        for module in self.model.modules():
            kinds = getattr(module, "rope_type", None)  # a dictionary by layer type where layers differ (Gemma 3)
            for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
                if kind in _BATCH_DEPENDENT_ROPE:
                    raise StartupRefused(
                        f"{self.name}: RoPE of type {kind!r} depends on the longest request of a batch, so that a long "
                        "neighbour would change a short answer; use a checkpoint with default, linear, yarn or llama3 "
                        "RoPE"
                    )

    def _check_packing(self) -> None:
        """Two sequences packed must answer as each alone through transformers' own attention, on this very model.

        Observes the sites' inputs on the way (which forms the groups) and the shape of every layer's cache.
        """
        generator = torch.Generator().manual_seed(0)
        lengths = (5, 8)
        rows = [torch.randint(0, self.vocab_size, (n,), generator=generator).to(self.device) for n in lengths]
        calls: list[tuple[BaseSite, torch.Tensor]] = []
        try:
            self._observe_kv_shapes(rows[0])
            own = torch.cat([self._own_logits(row) for row in rows])
            alone = torch.cat([self._probe([row]) for row in rows])
            packed = self._probe(rows, observer=lambda site, x: calls.append((site, x)))
        except StartupRefused:
            raise
        except Exception as error:  # a model of an unknown kind may fail in any way
            raise StartupRefused(
                f"{self._class_name} cannot run packed batches with paged attention ({type(error).__name__}: {error}); "
                f"{_SERVED}"
            ) from error
        self._compare(own, alone, packed)
        self.sites.group_by_input(calls, sum(lengths))

    def _compare(self, own: torch.Tensor, alone: torch.Tensor, packed: torch.Tensor) -> None:
        """Refuses what differs: our attention from the model's own, and a packed batch from its sequences alone."""
        is_exact = self.dtype is torch.float32 and self.quantization is not Quantization.NF4
        # Of the rows, the median: rounding may route a token to another expert and change its row wholly.
        error = ((alone - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-6)).median().item()
        limit = 1e-3 if is_exact else 0.25  # 16-bit rounding reaches 0.05 over 24 layers; another attention, 1
        if not error <= limit:
            raise StartupRefused(
                f"{self._class_name} computes something in its attention that paged attention does not (relative "
                f"difference {error:.1e}, limit {limit:.0e}); {_SERVED}"
            )
        error = ((packed - alone).abs().max() / alone.abs().max().clamp_min(1e-6)).item()
        limit = 1e-4 if is_exact else 5e-2
        if not error <= limit:
            raise StartupRefused(
                f"{self._class_name} leaks between packed sequences (relative difference {error:.1e}, limit "
                f"{limit:.0e}), so it cannot be served in batches; {_SERVED}"
            )

    def _own_logits(self, row: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) float32 of one sequence as transformers computes them, with its own attention."""
        model: PreTrainedModel = self.model  # type: ignore[assignment]
        model.set_attn_implementation("eager")
        try:
            with torch.inference_mode():
                logits: torch.Tensor = model(input_ids=row[None], use_cache=False).logits[0].float()
        finally:
            model.set_attn_implementation(IMPLEMENTATION)
        return logits

    def _observe_kv_shapes(self, row: torch.Tensor) -> None:
        """A pass with a recording cache-less attention: the (kv_heads, head_dim) of each layer."""
        shapes: dict[int, tuple[int, int]] = {}
        self.attention.observer = lambda layer, heads, width: shapes.__setitem__(layer, (heads, width))
        try:
            self._probe([row])
        finally:
            self.attention.observer = None
        if not shapes or sorted(shapes) != list(range(self.num_layers)):
            raise StartupRefused(
                f"{self._class_name} does not call transformers' attention interface in every layer (it does in "
                f"{sorted(shapes) or 'none'}), so its attention cannot be paged; {_SERVED}"
            )
        self.kv_shapes = [shapes[layer] for layer in range(self.num_layers)]

    def _probe(
        self, rows: list[torch.Tensor], observer: Callable[[BaseSite, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Logits (tokens, vocabulary) float32 of whole sequences packed into one pass, on a cache of their own."""
        block_size = 16
        lengths = [len(row) for row in rows]
        blocks = torch.cat([torch.full((n,), i, device=self.device) for i, n in enumerate(lengths)])
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        spans, start = [], 0
        for i, n in enumerate(lengths):
            spans.append(PrefillSpan(start, start + n, 0, torch.tensor([i], device=self.device)))
            start += n
        layout = TokenLayout(torch.zeros(start, dtype=torch.long, device=self.device), start, ())
        attention = AttentionBatch(blocks, positions, None, 0, tuple(spans))
        context = StepContext(attention, layout, layout, None)
        if self.kv_shapes:
            self.attention.cache = KVCache(self.kv_shapes, len(rows), block_size, self.kv_dtype, self.device)
        for site in self.sites.sites:
            site.observer = observer
        try:
            keep = torch.arange(start, device=self.device)
            return self.forward(torch.cat(rows), positions, keep, context).float()
        finally:
            self.attention.cache = None
            for site in self.sites.sites:
                site.observer = None


def _config(model: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if Path(model).exists():
            remedy = "the folder needs a config.json of an architecture that transformers knows"
        elif model.startswith((".", "/", "~")):
            remedy = "there is no such folder"
        else:
            remedy = "give a local folder or a hub id like org/name"
        raise StartupRefused(f"cannot read the model {model!r}: {remedy} ({error})") from error
    return config


def _refuse_missing(model: str, missing: Collection[str]) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers; what they answer is nobody's model."""
    if missing:
        named = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise StartupRefused(
            f"the checkpoint {model!r} lacks {named}: it is not whole, or not a causal language model; download it "
            "again, or give the checkpoint of one"
        )


def _default_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    dtype = getattr(config.get_text_config(), "dtype", None)
    if dtype is None or (dtype is torch.float16 and device.type == "cpu"):
        return torch.bfloat16
    assert isinstance(dtype, torch.dtype)
    return dtype


def _stored_quantization(config: PreTrainedConfig) -> Quantization | None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if fields.get("load_in_4bit") or fields.get("_load_in_4bit"):
        return Quantization.NF4
    if fields.get("load_in_8bit") or fields.get("_load_in_8bit"):
        return Quantization.INT8
    raise StartupRefused(
        f"the checkpoint is quantized with {fields.get('quant_method')!r}; this server runs bitsandbytes NF4 and int8, "
        "or unquantized checkpoints"
    )


def _model_name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.exists() else model
