"""Parts of stock models computed with fewer operators: RMS norms, gated MLPs, and the rotary attention of decodes.

Owns what stands for what, and the proof at load that it gives the same. A step of few tokens is hundreds of operators
of a few microseconds each, so their number is its time. Knows nothing about adapters, nor about sequences.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from server.model.attention import PagedAttention, is_attention
from server.model.context import Scope, StepContext
from server.ops import native, rotate

_ROTARY = (modeling_llama.LlamaAttention, modeling_mistral.MistralAttention, modeling_qwen2.Qwen2Attention)
_GATED = (modeling_llama.LlamaMLP, modeling_mistral.MistralMLP, modeling_qwen2.Qwen2MLP)
_ROTARY_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half")


_Forward = Callable[[torch.Tensor], torch.Tensor]


def compact_norm(norm: nn.Module, stock: _Forward, *, is_native: bool = False) -> _Forward | None:
    """A forward of few operators, or natively of one, for an RMS norm whose own is `stock`; None for any other norm.

    y = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467). Tried on rows of several sizes:
    it must be within the rounding of the norm's own dtype. Float32, which is asked for to be exact, stays as it is.
    """
    weight: Any = norm.weight
    eps = _eps_of(norm)
    if eps is None or weight.is_meta or weight.dtype is torch.float32:
        return None

    compact: _Forward
    if is_native:
        compact = native_norm(norm)
    else:
        compact = _fused_norm(weight, eps) if weight.is_cuda else _norm_by_length(weight, eps)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return compact(x) if x.dtype is weight.dtype else stock(x)

    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[0.0], [1e-3], [1.0], [1e3]])
    rows = (torch.randn(4, len(weight), generator=generator) * sizes + sizes / 4).to(weight.device, weight.dtype)
    limit = 4 * torch.finfo(weight.dtype).eps
    with torch.inference_mode():
        own = stock(rows)
        is_same = own.dtype is weight.dtype and torch.allclose(forward(rows), own, rtol=limit, atol=limit * 1e-3)
    return forward if is_same else None


def _fused_norm(weight: torch.Tensor, eps: float) -> _Forward:
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _eps_of(norm: nn.Module) -> float | None:
    """What an RMS norm adds to the mean of squares; None if it does not say."""
    return next((e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(norm, name, None), float)), None)


def native_norm(norm: nn.Module) -> native.Norm:
    """Of an RMS norm that says its eps."""
    eps = _eps_of(norm)
    assert eps is not None
    return native.Norm(norm.get_parameter("weight").detach().float(), eps)


def _norm_by_length(weight: torch.Tensor, eps: float) -> _Forward:
    """sqrt(n) * weight * x / sqrt(||x||^2 + n * eps): on a CPU, where PyTorch's fused norm is a dozen operators."""
    width = len(weight)
    scaled, least = weight.float() * width**0.5, torch.tensor(width * eps)

    def forward(x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        return (exact * torch.rsqrt(torch.addcmul(least, length, length))).mul_(scaled).to(x.dtype)

    return forward


@dataclass(slots=True)
class _Angles:
    """The rotary embedding of a step, as `rotate` wants it; the same for all layers that are given the same."""

    given: torch.Tensor
    cos: torch.Tensor  # (tokens, 1, width) in the dtype of the cache, or float32 for native kernels
    sin: torch.Tensor  # the same, its first half negated


class Replaced:
    """Modules with a forward of ours, until it is taken back."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._stock: dict[Any, Callable[..., Any] | None] = {}
        for module in modules:
            self._stock[module] = vars(module).get("forward")  # a site's, where it is one
            module.forward = self._forward_of(module)

    @property
    def modules(self) -> list[nn.Module]:
        return list(self._stock)

    def __len__(self) -> int:
        return len(self._stock)

    def remove(self) -> None:
        """Gives the modules their own forward back."""
        for module, stock in self._stock.items():
            if stock is None:
                del module.forward
            else:
                module.forward = stock
        self._stock = {}

    def _forward_of(self, module: Any) -> Callable[..., Any]:
        raise NotImplementedError


class DecodeAttentions(Replaced):
    """The attention modules of a base that are Llama's by their code, with a forward of their own for decodes.

    Keys and values of a step are rotated together, in the dtype of the cache, and stored at once. A step that does
    anything else - prefills, ops at keys and values, Triton kernels - takes the module's own forward.
    """

    def __init__(self, model: nn.Module, attention: PagedAttention, scope: Scope) -> None:
        self._attention = attention
        self._scope = scope
        self._angles: _Angles | None = None
        super().__init__(module for module in model.modules() if is_attention(module) and _is_rotary(module))

    def _forward_of(self, module: Any) -> Callable[..., Any]:
        stock = module.forward

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context = self._scope.current
            angles = kwargs.get("position_embeddings")
            if context is None or angles is None or not self.can_serve(context):
                return stock(hidden_states, *args, **kwargs)
            return module.o_proj(self._attend(module, hidden_states, angles, context)), None

        return forward

    def can_serve(self, context: StepContext) -> bool:
        """Whether a step only decodes, and nothing else is done on the way."""
        batch = context.attention
        is_native = batch.lists is not None and self._attention.kernels is native
        is_decode = (batch.decode is not None or is_native) and not batch.has_prefills
        return is_decode and context.ops is None and self._attention.cache is not None

    def _attend(
        self, module: Any, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], context: StepContext
    ) -> torch.Tensor:
        """(1, tokens, hidden) -> (1, tokens, heads * width)."""
        assert self._attention.cache is not None
        num_tokens, width, dtype = x.shape[1], module.head_dim, self._attention.cache.dtype
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
        if context.attention.lists is not None:
            projected = q[0], k[0], v[0]
            return self._attention.decode_natively(module.layer_idx, projected, self.turns(angles), context)[None]
        num_kv = k.shape[-1] // width
        heads = torch.cat((q, k, v), dim=-1).to(dtype).view(num_tokens, -1, width)
        turns = self._turns(angles, dtype)
        rotate(heads[:, :-num_kv], turns.cos, turns.sin)
        query, keys_values = heads[:, : -2 * num_kv], heads[:, -2 * num_kv :]
        out = self._attention.decode(module.layer_idx, query, keys_values, context)
        return out.to(x.dtype).view(1, num_tokens, -1)

    def turns(self, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a step's rotary embedding as native kernels want them."""
        turns = self._turns(angles, torch.float32)
        return turns.cos, turns.sin

    def _turns(self, angles: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> _Angles:
        if self._angles is None or self._angles.given is not angles[0]:
            cos, sin = (t[0, :, None].to(dtype) for t in angles)
            half = sin.shape[-1] // 2
            self._angles = _Angles(angles[0], cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1))
        return self._angles


class GatedMLPs(Replaced):
    """The MLPs of a base that are Llama's by their code, with SiLU: one native call between their products.

    `native.gated` rounds once, where the stock code rounds twice.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(module for module in model.modules() if _is_gated(module))

    def _forward_of(self, module: Any) -> _Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = module.down_proj(native.gated(module.gate_proj(x), module.up_proj(x)))
            return out

        return forward


def _is_gated(module: nn.Module) -> bool:
    is_silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    return is_silu and any(code_of(type(module).forward) == code_of(known.forward) for known in _GATED)


def _is_rotary(module: nn.Module) -> bool:
    """Whether a module's forward is that of Llama, Mistral or Qwen 2, to the letter, as it is in their many copies."""
    forward = code_of(type(module).forward)
    return any(
        forward == code_of(known.forward)
        and all(_rotary_function(type(module), name) == _rotary_function(known, name) for name in _ROTARY_FUNCTIONS)
        for known in _ROTARY
    )


def _rotary_function(attention: type[nn.Module], name: str) -> str | None:
    return code_of(inspect.unwrap(attention.forward).__globals__.get(name))


@cache  # the layers of a model are of a few classes
def code_of(function: Any) -> str | None:
    """The code of a function without what it says of itself, None where there is none: two of one code do the same."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # made at run time, or no function: nobody knows what it does
        return None
    (written,) = ast.parse(textwrap.dedent(source)).body
    if isinstance(written, ast.FunctionDef) and ast.get_docstring(written) is not None:
        del written.body[0]
    return ast.dump(written)
