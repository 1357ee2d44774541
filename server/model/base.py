"""The base: loaded, quantized and frozen once, resident for the life of the process.

Owns the transformers model, its sites and its attention, and the check at load that this very architecture can be
served in packed batches. Knows nothing about adapters, requests or scheduling.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from server.ground.errors import StartupRefused
from server.model.architectures import SERVED
from server.model.attention import IMPLEMENTATION, KVCache, PagedAttention, attach
from server.model.compact import DecodeAttentions, GatedMLPs, Replaced
from server.model.context import AttentionBatch, Scope, StepContext
from server.model.decode_layers import DecodeLayers
from server.model.decoder_pass import DecoderPasses
from server.model.fingerprint import fingerprint
from server.model.fused import can_read_codes
from server.model.lean_loading import lean_loading
from server.model.pretrained import (
    BaseOptions,
    default_dtype,
    model_name,
    read_config,
    refuse_missing,
    stored_quantization,
)
from server.model.quantize import (
    choose_four_bit_products,
    expert_bytes,
    experts_note,
    found_quantization,
    quantization_config,
    scales,
    settle,
)
from server.model.rope import attach_rope
from server.model.site_table import SiteTable
from server.model.sites import BaseSite
from server.model.size import BaseSize, kv_dtype
from server.ops import DecodeBatch, Kernels, PrefillSpan, TokenLayout, load_four_bit_products, load_kernels, native
from server.ops.packed import FourBitProducts
from server.ops.runs import DecodeLists

log = logging.getLogger(__name__)


class Base:
    """One quantized model, ready for packed forward passes."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
        four_bit: FourBitProducts | None = None,
    ) -> None:
        """Takes a loaded causal language model (attention implementation "graft"); raises StartupRefused by name.

        `four_bit` multiplies the 4-bit weights that it can; None leaves them to bitsandbytes, or to native `kernels`.
        """
        self.name = name
        self.fingerprint: str | None = None  # of the checkpoint, where it was loaded from one that has one
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.model = model.eval().requires_grad_(False)
        self.config: PreTrainedConfig = model.config  # type: ignore[assignment]
        self.quantization = found_quantization(model)  # what the values are, however `settle` holds them
        self._four_bit = four_bit
        own = {module for module in model.modules() if kernels is native and can_read_codes(module)}
        if four_bit is not None:
            own |= {module for module in model.modules() if can_read_codes(module, four_bit.can_pack)}
        note = settle(model, dtype, device, own)
        self.note = " ".join(filter(None, (note, experts_note(model)))) or None
        self.scope = Scope()
        self.attention = PagedAttention(self.scope)
        self.rope = attach_rope(model, name, self.scope)
        self._refuse_chunked_attention()
        self.num_layers = attach(model, self.attention)
        self.sites = SiteTable(model, self.scope)
        self.kv_shapes: list[tuple[int, int]] = []
        self._check_packing()

    @classmethod
    def load(cls, options: BaseOptions) -> "Base":
        """Loads a local folder or hub id with transformers, quantizing on the way.

        A checkpoint that is quantized already stays as it is, whatever was asked for. Raises StartupRefused when there
        is no such model, its weights are not whole, or the architecture cannot be served.
        """
        with lean_loading(options.model):
            return cls._load(options)

    @classmethod
    def _load(cls, options: BaseOptions) -> "Base":
        config = read_config(options.model)
        dtype = options.dtype or default_dtype(config, options.device)
        kernels = load_kernels(options.ops, options.device, dtype)  # refused before minutes of loading
        four_bit = load_four_bit_products(options.four_bit_products, options.device)
        stored = stored_quantization(config)
        if stored is not None and stored is not options.quantize:
            log.info(
                "%s is stored quantized and stays %s; --quantize %s does not change that",
                options.model, stored, options.quantize,
            )  # fmt: skip
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
                f"attention interface ({error} is not in their table), so their attention cannot be paged; {SERVED}"
            ) from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise StartupRefused(f"cannot load {options.model!r}: {error}") from error
        model, info = loaded
        refuse_missing(options.model, info["missing_keys"])
        base = cls(model, model_name(options.model), dtype, options.device, kernels, four_bit)
        base.fingerprint = fingerprint(options.model, config)
        return base

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, buffers and scales, shared ones once, and of packed weights."""
        tensors = (*self.model.parameters(), *self.model.buffers(), *scales(self.model))
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + self.sites.packed_bytes

    @property
    def size(self) -> BaseSize:
        return BaseSize(self.weight_bytes, self.kv_shapes, self.kv_dtype, self.max_context, self.config)

    @property
    def kv_dtype(self) -> torch.dtype:
        return kv_dtype(self.dtype, self.device, has_kernels=self.kernels is not None)

    @property
    def has_length_dependent_rope(self) -> bool:
        """Whether a token's keys and values depend on its sequence's length, so that prefixes cannot be shared."""
        return self.rope is not None

    @property
    def max_context(self) -> int:
        if self.rope is not None:
            return self.rope.max_context
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
                f"{self._class_name} attends within chunks of {chunk} tokens, which paged attention does not; {SERVED}"
            )

    def _check_packing(self) -> None:
        """Two sequences packed must answer as each alone through transformers' own attention, on this very model.

        Observes the sites' inputs on the way (which forms the groups) and the shape of every layer's cache.
        """
        generator = torch.Generator().manual_seed(0)
        lengths = (5, 8)
        rows = [torch.randint(0, self.vocab_size, (n,), generator=generator).to(self.device) for n in lengths]
        calls: list[tuple[BaseSite, torch.Tensor]] = []
        with self._refusing("cannot run packed batches with paged attention"):
            self._observe_kv_shapes(rows[0])
            own = torch.cat([self._own_logits(row) for row in rows])
            alone = torch.cat([self._probe([row]) for row in rows])
            packed = self._probe(rows, observer=lambda site, x: calls.append((site, x)))
            other = self._probe([(rows[0] + 1) % self.vocab_size, rows[1]])
        self._compare(own, alone, packed)
        self._refuse_leaks(packed[lengths[0] :], other[lengths[0] :])
        self.sites.group_by_input(calls, sum(lengths))
        with self._refusing("cannot run with the weights of its linears fused"):
            self.sites.fuse(is_native=self.kernels is native, four_bit=self._four_bit)
            choose_four_bit_products(self.model, self.dtype, self.device)  # for those that are left
            fused = self._probe(rows)
            self._check_fused(packed, fused)
            self._compact(rows, fused)

    def _compact(self, rows: list[torch.Tensor], packed: torch.Tensor) -> None:
        """Computes what can be with fewer operators where that gives the same; elsewhere all stays as it is.

        `packed`: what `_probe` gives for these rows before.
        """
        is_native = self.kernels is native
        expected = self._decode_probe(rows)

        def decoded() -> torch.Tensor:
            return self._decode_probe(rows, is_native=is_native)

        norms = self.sites.compact_norms(is_native=is_native)
        attentions = DecodeAttentions(self.model, self.attention, self.scope)
        mlps = GatedMLPs(self.model if is_native and not self._is_exact else nn.Module())
        self._keep_if_same((attentions, mlps), expected, decoded)
        layers = DecodeLayers(
            self.model, self.sites.groups, norms if is_native else (), attentions, mlps, self.attention, self.scope
        )
        self._keep_if_same((layers,), expected, decoded)
        passes = DecoderPasses(self.model, self.scope)
        self._keep_if_same((passes,), expected, decoded)
        self._keep_if_same((passes,), packed, lambda: self._probe(rows))
        log.info(
            "fewer operators in %d norms, %d attentions, %d MLPs, %d layers and %d passes",
            len(norms), len(attentions), len(mlps), len(layers), len(passes),
        )  # fmt: skip

    def _keep_if_same(
        self, parts: Sequence[Replaced], expected: torch.Tensor, found: Callable[[], torch.Tensor]
    ) -> None:
        if not any(map(len, parts)):
            return
        error = _difference(expected, found())
        if not error <= self._rounding_limit:
            for part in parts:
                part.remove()
            log.warning(
                "%s: with fewer operators it differs (relative difference %.1e, limit %.0e), so they stay",
                self._class_name, error, self._rounding_limit,
            )  # fmt: skip

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """A model of an unknown kind may fail in any way, and must do so by name."""
        try:
            yield
        except StartupRefused:
            raise
        except Exception as error:
            raise StartupRefused(f"{self._class_name} {what} ({type(error).__name__}: {error}); {SERVED}") from error

    def _refuse_leaks(self, packed: torch.Tensor, other: torch.Tensor) -> None:
        """The second sequence's logits, beside two different first ones of one length, must be the same in any dtype.

        The shapes are the same and so is the rounding, so a state that leaks only a little shows as well. Experts are
        products of as many rows as there are tokens that chose them, and round by that.
        """
        error = _difference(packed, other)
        limit = 5e-2 if expert_bytes(self.model) else 1e-5
        if not error <= limit:
            raise StartupRefused(
                f"{self._class_name} carries something from one packed sequence to the next (relative difference "
                f"{error:.1e}, limit {limit:.0e}): layers that keep a state, such as convolutions or state spaces, "
                f"cannot share a batch; {SERVED}"
            )

    def _check_fused(self, packed: torch.Tensor, fused: torch.Tensor) -> None:
        """Fused and packed weights must give what the linears gave one by one."""
        error = _difference(packed, fused)
        if not error <= self._rounding_limit:
            raise StartupRefused(
                f"{self._class_name} reads the weights of its linears past their products, so they cannot be fused "
                f"(relative difference {error:.1e}, limit {self._rounding_limit:.0e}); {SERVED}"
            )

    @property
    def _is_exact(self) -> bool:
        return self.dtype is torch.float32 and not self.quantization.is_4_bit

    @property
    def _rounding_limit(self) -> float:
        """How far two ways to compute the same logits may be apart, relative to the largest of them."""
        return 1e-4 if self._is_exact else 5e-2

    def _compare(self, own: torch.Tensor, alone: torch.Tensor, packed: torch.Tensor) -> None:
        """Refuses what differs: our attention from the model's own, and a packed batch from its sequences alone."""
        # Of the rows, the median: rounding may route a token to another expert and change its row wholly.
        error = ((alone - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-6)).median().item()
        limit = 1e-3 if self._is_exact else 0.25  # 16-bit rounding reaches 0.05 over 24 layers; another attention, 1
        if not error <= limit:
            raise StartupRefused(
                f"{self._class_name} computes something in its attention that paged attention does not (relative "
                f"difference {error:.1e}, limit {limit:.0e}); {SERVED}"
            )
        error = _difference(alone, packed)
        if not error <= self._rounding_limit:
            raise StartupRefused(
                f"{self._class_name} leaks between packed sequences (relative difference {error:.1e}, limit "
                f"{self._rounding_limit:.0e}), so it cannot be served in batches; {SERVED}"
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
                f"{sorted(shapes) or 'none'}), so its attention cannot be paged; {SERVED}"
            )
        self.kv_shapes = [shapes[layer] for layer in range(self.num_layers)]
        for layer, (kv_heads, head_dim) in enumerate(self.kv_shapes):
            self.sites.note_kv_shape(layer, kv_heads, head_dim)
        self.attention.sites = self.sites.attention

    def _probe(
        self, rows: list[torch.Tensor], observer: Callable[[BaseSite, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Logits (tokens, vocabulary) float32 of whole sequences packed into one pass, on a cache of their own."""
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
            self.attention.cache = self._probe_cache(len(rows))
        for site in self.sites.sites:
            site.observer = observer
        try:
            keep = torch.arange(start, device=self.device)
            return self.forward(torch.cat(rows), positions, keep, context).float()
        finally:
            self.attention.cache = None
            for site in self.sites.sites:
                site.observer = None

    def _probe_cache(self, num_blocks: int) -> KVCache:
        return KVCache(self.kv_shapes, num_blocks, 16, self.kv_dtype, self.device)

    def _decode_probe(self, rows: list[torch.Tensor], *, is_native: bool = False) -> torch.Tensor:
        """Logits (rows, vocabulary) float32 of two decodes of each row's first token, one after the other.

        The second attends to two tokens, so that positions count. With `is_native` by native kernels.
        """
        num, device = len(rows), self.device
        numbers = torch.arange(num, device=device)
        layout = TokenLayout(torch.zeros(num, dtype=torch.long, device=device), num, ())
        self.attention.cache = self._probe_cache(num)
        self.attention.kernels = native if is_native else None
        try:
            for position in (0, 1):
                offsets = torch.full((num,), position, device=device)
                decode: DecodeBatch | None = None
                lists: DecodeLists | None = None
                if is_native:
                    lists = DecodeLists(offsets + 1, numbers, numbers)
                else:
                    zeros = torch.zeros_like(offsets)
                    decode = DecodeBatch(offsets + 1, numbers, numbers, zeros, ((0, num, 0),), True, None, position + 1)
                attention = AttentionBatch(numbers, offsets, decode, num, (), lists)
                context = StepContext(attention, layout, layout, None)
                ids = torch.stack([row[position] for row in rows])
                logits = self.forward(ids, offsets, numbers, context)
        finally:
            self.attention.cache = self.attention.kernels = None
        return logits.float()


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest of them."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
