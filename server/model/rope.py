"""RoPE whose frequencies depend on how long a sequence is, computed for every token from its own sequence's length.

Owns the rule for that length, and the rotary modules' forward (wrapped once, at load). transformers takes the longest
position of a batch, so that a long request would change its neighbours' answers. Knows nothing about scheduling.

Sources: "dynamic" is NTK scaling by length (bloc97 and emozilla, as in transformers' modeling_rope_utils), "longrope"
has one set of frequencies up to the original context and another beyond it (Ding et al. 2024, arXiv:2402.13753).
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.ground.errors import StartupRefused
from server.model.context import Scope

DYNAMIC, LONGROPE = "dynamic", "longrope"
# transformers' generation computes the whole cache of these again when a sequence outgrows its short frequencies.
_RECOMPUTING = ("phi3",)
_REMEDY = "use a checkpoint with default, linear, yarn or llama3 RoPE"


@dataclass(frozen=True, slots=True)
class RopeRule:
    """For which length each token's frequencies are taken: what transformers' generation does for a sequence alone.

    At prefill that is the prompt's length, at decode the token's own place. With `recompute_past` it is the number of
    all known tokens, for every token: once more than so many are known, keys and values cached before are stale.
    """

    recompute_past: int | None
    max_context: int  # tokens that the frequencies are made for

    def lengths(self, num_prompt_tokens: int, num_tokens: int, start: int, stop: int) -> list[int]:
        """One length for each of the tokens at positions start..stop-1 of a sequence of `num_tokens` known tokens."""
        if self.recompute_past is not None:
            return [num_tokens] * (stop - start)
        return [max(num_prompt_tokens, position + 1) for position in range(start, stop)]

    def is_stale(self, num_prompt_tokens: int, num_computed_tokens: int) -> bool:
        """Whether the token after `num_computed_tokens` is the first that makes the cached ones stale.

        True also where these were computed again after a preemption, which is a waste and no error.
        """
        return self.recompute_past is not None and num_prompt_tokens <= num_computed_tokens == self.recompute_past


def attach_rope(model: nn.Module, name: str, scope: Scope) -> RopeRule | None:
    """Makes the rotary modules of a model follow the lengths of the scope's context; None where none need to.

    Raises StartupRefused, by the base's `name`, for a module that computes its frequencies in a way of its own.
    """
    modules = [m for m in model.modules() if any(kind in (DYNAMIC, LONGROPE) for _, kind in _kinds(m))]
    if not modules:
        return None
    config: PreTrainedConfig = model.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = {kind for module in modules for _, kind in _kinds(module) if kind in (DYNAMIC, LONGROPE)}
    is_recomputing = config.model_type in _RECOMPUTING
    if len(kinds) > 1 or (is_recomputing and kinds != {LONGROPE}):
        raise StartupRefused(
            f"{name}: RoPE of type {' and '.join(map(repr, sorted(kinds)))} in a model of type {config.model_type!r} "
            f"is not served; {_REMEDY}"
        )
    borders, factors = set(), [1.0]
    for module in modules:
        for rope in [_LengthRope(module, layer_type, kind) for layer_type, kind in _kinds(module) if kind in kinds]:
            rope.check(name)
            borders.add(rope.border)
            factors.append(rope.factor)
        _wrap(module, kinds, scope)
    context = int(config.max_position_embeddings * max(factors))
    return RopeRule(min(borders) if is_recomputing else None, context)


class _LengthRope:
    """The frequencies of one rotary module (of one of its layer types), by length."""

    def __init__(self, module: Any, layer_type: str | None, kind: str) -> None:
        self._module = module  # an nn.Module that transformers hangs its tables on
        self._layer_type = layer_type
        self._kind = kind
        prefix = "" if layer_type is None else f"{layer_type}_"
        self.buffer = f"{prefix}inv_freq"
        self._original = f"{prefix}original_inv_freq"
        parameters = self._module.config.rope_parameters
        self._parameters = parameters if layer_type is None else parameters[layer_type]

    @property
    def border(self) -> int:
        """The longest sequence that has the original frequencies."""
        if self._kind == LONGROPE:
            return int(self._parameters["original_max_position_embeddings"])
        return int(self._module.original_max_seq_len)

    @property
    def factor(self) -> float:
        """By how much the frequencies stretch the context beyond the config's number of positions."""
        return float(self._parameters["factor"]) if self._kind == DYNAMIC else 1.0

    def frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """(tokens,) lengths -> (tokens, rotated width / 2) float32."""
        lengths = lengths[:, None]
        original = getattr(self._module, self._original).to(lengths.device)
        seq_len = lengths if self._kind == DYNAMIC else self.border + 1
        init = ROPE_INIT_FUNCTIONS[self._kind]
        beyond, _ = init(self._module.config, lengths.device, seq_len=seq_len, layer_type=self._layer_type)
        return torch.where(lengths > self.border, beyond, original)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> Any:
        """What the module's own forward makes of the positions (1, tokens), with a row of frequencies per token."""
        own = getattr(self._module, self.buffer)
        setattr(self._module, self.buffer, self.frequencies(lengths))
        try:
            return _undecorated(self._module)(self._module, x, positions, *self._layer())
        finally:
            setattr(self._module, self.buffer, own)

    def check(self, name: str) -> None:
        """Compares sequences packed with each alone in transformers' own module, on both sides of the border."""
        device = getattr(self._module, self.buffer).device
        x = torch.zeros(1, 1, device=device)
        lengths = (self.border - 1, self.border, self.border + 1, 2 * self.border)
        rows = [torch.tensor([[0, 1, length // 2, length - 1]], device=device) for length in lengths]
        # Copies: the module remembers the longest sequence that it has seen.
        alone = [copy.deepcopy(self._module)(x, row, *self._layer()) for row in rows]
        own = torch.tensor(lengths, device=device).repeat_interleave(rows[0].shape[1])
        packed = self.forward(x, torch.cat(rows, dim=1), own)
        for actual, expected in zip(packed, zip(*alone, strict=True), strict=True):
            # Rounding of a frequency grows with the position; another rule differs by about 1.
            if not torch.allclose(actual, torch.cat(expected, dim=1), rtol=0, atol=1e-2):
                raise StartupRefused(
                    f"{name}: {type(self._module).__name__} computes RoPE of type {self._kind!r} in a way of its own, "
                    f"by the longest request of a batch; {_REMEDY}"
                )

    def _layer(self) -> tuple[str, ...]:
        return () if self._layer_type is None else (self._layer_type,)


def _kinds(module: nn.Module) -> Iterator[tuple[str | None, str]]:
    """(layer type, RoPE type) of a rotary module; the layer type is None where all layers are alike."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        yield from kinds.items()
    elif isinstance(kinds, str):
        yield None, kinds


def _wrap(module: nn.Module, kinds: set[str], scope: Scope) -> None:
    ropes = {layer: _LengthRope(module, layer, kind) for layer, kind in _kinds(module) if kind in kinds}
    stock = module.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """The module's forward; outside of a step, and at layers of a fixed RoPE, transformers' own."""
        lengths = None if scope.current is None else scope.current.rope_lengths
        rope = ropes.get(layer_type)
        if rope is None or lengths is None:
            return stock(x, position_ids) if layer_type is None else stock(x, position_ids, layer_type)
        return rope.forward(x, position_ids, lengths)

    module.forward = forward


def _undecorated(module: nn.Module) -> Any:
    """The class's forward below transformers' decorator, which takes one length from the whole batch."""
    return inspect.unwrap(type(module).forward)
