"""Which library computes the attention of prompts: what each asks for, and a trial on this device.

Owns the conditions, and the sentences that say which one is not met. Knows nothing about how libraries are called.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from server.ground.errors import StartupRefused
from server.ops.prefill.chunks import AttentionLayer, PrefillLibrary
from server.ops.prefill.flashinfer_plan import MODULE, WORKSPACE_BYTES, WRAPPER_BYTES, FlashInfer
from server.ops.prefill.trial import LIMITS, difference
from server.ops.prefill.varlen import Varlen, varlen_lacks

log = logging.getLogger(__name__)

_AUTO = "varlen"  # what "auto" tries: it comes with PyTorch


@dataclass(frozen=True, slots=True)
class PrefillNeeds:
    """What a base asks of a library, on a device."""

    device: torch.device
    capability: tuple[int, int] | None  # of a GPU
    dtype: torch.dtype  # of the cache
    block_size: int
    layers: frozenset[AttentionLayer]  # each kind once


@dataclass(frozen=True, slots=True)
class Condition:
    """What a library asks for, and the words for what does not have it."""

    is_met: Callable[[PrefillNeeds], bool]
    otherwise: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A library: its conditions, what the installation lacks (None: nothing), and how it is loaded."""

    conditions: tuple[Condition, ...]
    lacks: Callable[[], str | None]
    load: Callable[[torch.device], PrefillLibrary]

    def refusal(self, needs: PrefillNeeds) -> str | None:
        """The first condition that is not met; the installation is looked at last."""
        unmet = (condition.otherwise for condition in self.conditions if not condition.is_met(needs))
        return next(unmet, None) or self.lacks()


def _flashinfer_lacks() -> str | None:
    if importlib.util.find_spec(MODULE) is None:
        return "flashinfer is not installed: pip install 'graftserve[flashinfer]'"
    return None


_GPU = (
    Condition(lambda needs: needs.device.type == "cuda", "it needs a GPU, and the base is on the CPU"),
    Condition(
        lambda needs: (needs.capability or (0, 0)) >= (8, 0), "it needs a GPU of compute capability 8.0 or later"
    ),
    Condition(
        lambda needs: needs.dtype in (torch.bfloat16, torch.float16),
        "it computes in 16 bits only, and the KV cache is in others: --dtype bfloat16",
    ),
)
CANDIDATES: Mapping[str, Candidate] = {
    "varlen": Candidate(
        (
            *_GPU,
            Condition(lambda needs: all(layer.softcap is None for layer in needs.layers), "it has no cap on scores"),
            Condition(
                lambda needs: all(layer.width % 8 == 0 and layer.width <= 256 for layer in needs.layers),
                "it takes heads of up to 256 numbers, in multiples of 8",
            ),
            Condition(
                lambda needs: needs.block_size % 256 == 0,
                "it reads blocks of a multiple of 256 tokens: --block-size 256",
            ),
        ),
        varlen_lacks,
        Varlen.load,
    ),
    "flashinfer": Candidate(
        (
            *_GPU,
            Condition(
                lambda needs: all(layer.width in (64, 128, 256) for layer in needs.layers),
                "it takes heads of 64, 128 or 256 numbers",
            ),
        ),
        _flashinfer_lacks,
        FlashInfer.load,
    ),
}


def prefill_refusal(name: str, needs: PrefillNeeds) -> str | None:
    """Why a library is not even tried, in words; None if it is. `name` as in --attention."""
    if name == "torch":
        return None
    reason = CANDIDATES[_named(name)].refusal(needs)
    return None if reason is None else f"{_named(name)}: {reason}"


def choose_prefill(name: str, needs: PrefillNeeds) -> PrefillLibrary | None:
    """The library that computes the attention of prompts; None: PyTorch, each chunk by itself. Logged.

    `name` as in --attention: "torch", a library, or "auto". One that was named is used or refused by StartupRefused;
    "auto" goes without where a condition is not met or the trial fails, the latter with a warning.
    """
    if name == "torch":
        log.info("attention of prompts: PyTorch, chunk by chunk")
        return None
    reason = prefill_refusal(name, needs)
    if reason is not None:
        _go_without(name, reason, logging.INFO)
        return None
    try:
        library = _tried(CANDIDATES[_named(name)], needs)
    except _Unfit as unfit:
        _go_without(name, f"{_named(name)}: {unfit}", logging.WARNING)
        return None
    log.info("attention of prompts: %s, after a trial of %d kinds of layers", library.name, len(needs.layers))
    return library


def refuse_prefill(name: str, needs: PrefillNeeds) -> None:
    """Raises StartupRefused for a library that was named and will not even be tried."""
    reason = prefill_refusal(name, needs)
    if reason is not None and name != "auto":
        raise _refused(reason)


def library_bytes(name: str) -> int:
    """Bytes of the device that a library holds, for two kinds of layers; `name` as in --attention."""
    return WORKSPACE_BYTES + 2 * WRAPPER_BYTES if name == "flashinfer" else 0


def _refused(reason: str) -> StartupRefused:
    return StartupRefused(f"--attention {reason}; or use --attention torch")


def _named(name: str) -> str:
    return _AUTO if name == "auto" else name


def _go_without(name: str, reason: str, level: int) -> None:
    if name != "auto":
        raise _refused(reason)
    log.log(level, "attention of prompts: PyTorch, chunk by chunk; %s", reason)


class _Unfit(Exception):
    """What is wrong with a library on this device, in words."""


def _tried(candidate: Candidate, needs: PrefillNeeds) -> PrefillLibrary:
    """The library, if it gives what it should for every kind of layer. Raises _Unfit."""
    limit = LIMITS[needs.dtype]
    try:
        errors = _errors(candidate.load(needs.device), needs)
        library = candidate.load(needs.device)  # the other keeps what was made for layers of the trial's own
    except Exception as fault:  # a library may fail in any way, and must not stop a server that can do without
        raise _Unfit(f"it fails on this device ({type(fault).__name__}: {fault})") from fault
    for layer, error in errors.items():
        if not error <= limit:
            raise _Unfit(f"it differs from PyTorch's (relative difference {error:.1e}, limit {limit:.0e}; {layer})")
    return library


def _errors(library: PrefillLibrary, needs: PrefillNeeds) -> dict[AttentionLayer, float]:
    return {layer: difference(library, layer, needs.dtype, needs.block_size, needs.device) for layer in needs.layers}
