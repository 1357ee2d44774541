"""The measurement: both bases side by side, the same passes through both, adapter after adapter.

Owns the order of things, and what a run keeps in memory: two bases, one adapter and the logits of one pass on each.
Nothing is spooled: log-probabilities of 128k tokens are half a megabyte per position in float32, so a thousand prompts
with ten adapters would be hundreds of gigabytes on disk, while the served base adds a fifth (NF4) or a third (int8) to
what the float32 reference needs anyway.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from server.assemble import Server
from server.drift.divergence import TokenDrift, token_drift
from server.drift.encoding import Encoded, encode
from server.drift.figures import Figures, Subject, beside_base, breaches, figures
from server.drift.passes import Side
from server.drift.request import ALL, DriftRequest
from server.drift.room import Shape, check_room
from server.ground.config import Settings
from server.ground.errors import AdapterNotFound, GraftError, StartupRefused

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ran:
    """What one side was in fact."""

    model: str
    quantization: str
    dtype: str
    device: str
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The receipt: what was compared on what, and what came out."""

    request: DriftRequest
    reference: Ran
    served: Ran
    num_truncated: int  # prompts that were cut at --max-tokens-per-prompt
    rows: tuple[Figures, ...]  # the base's first
    breaches: tuple[str, ...]


def measure(request: DriftRequest, say: Say) -> Report:
    """Loads both bases and compares them on every prompt, alone and with each adapter; progress goes to `say`.

    Raises a GraftError, before the first pass, for a prompt, an adapter or a base that cannot be measured.
    """
    shape = _check_shapes(request)
    encoded = encode(request.settings.model, request.prompts, shape, request.max_tokens_per_prompt)
    with ExitStack() as held:
        served_settings, reference_settings = _both_settings(request, encoded, held)
        say(f"loading {request.settings.model} as served ...")
        served = encoded.side(served_settings, held)
        adapters = _adapters(request, served.server)
        say(f"loading the reference {request.reference} in {request.reference_dtype} ...")
        reference = encoded.side(reference_settings, held)
        subjects: list[str | None] = [None, *adapters]
        rows = beside_base([_measure_one(spec, reference, served, encoded, say) for spec in subjects])
        found = tuple(sentence for row in rows for sentence in breaches(row, request.limits))
        return Report(request, _ran(reference.server), _ran(served.server), encoded.num_truncated, rows, found)


def _measure_one(spec: str | None, reference: Side, served: Side, encoded: Encoded, say: Say) -> Figures:
    """All prompts through both sides with one adapter (None: the bare base)."""
    parts: list[TokenDrift] = []
    quarters: list[int] = []
    with served.placed(spec) as (served_slot, info):
        pinned = None if info is None else f"{info.name}@{info.digest}"  # a name may mean another version by now
        subject = Subject() if info is None else Subject(info.name, info.digest, info.method)
        with reference.placed(pinned) as (reference_slot, _):
            for chunks in encoded.passes:
                targets = torch.tensor([target for chunk in chunks for target in chunk.targets()])
                expected = reference.logits(chunks, reference_slot)
                parts.append(token_drift(expected, served.logits(chunks, served_slot), targets))
                quarters += [quarter for chunk in chunks for quarter in chunk.quarters()]
                say(f"{subject}: {len(quarters)} of {encoded.num_tokens} tokens")
    return figures(subject, TokenDrift.concatenated(parts), torch.tensor(quarters))


def _check_shapes(request: DriftRequest) -> Shape:
    """The reference's dimensions, once both bases are known to be comparable and to fit."""
    settings = request.settings
    served = Shape.of(settings.model)
    reference = served if request.reference == settings.model else Shape.of(request.reference)
    if reference.is_quantized:
        raise StartupRefused(
            f"{request.reference} is a quantized checkpoint, so it is no reference; name the unquantized original with "
            "--reference"
        )
    if reference.vocab_size != served.vocab_size:
        raise StartupRefused(
            f"--reference {request.reference} has {reference.vocab_size} tokens and {settings.model} has "
            f"{served.vocab_size}; only bases with one vocabulary can be compared"
        )
    _check_room(request, reference, served)
    return reference


def _check_room(request: DriftRequest, reference: Shape, served: Shape) -> None:
    settings = request.settings
    dtype = _DTYPES.get(settings.dtype, served.dtype)
    sides = (
        (request.reference_device, reference.weight_bytes("none", _DTYPES[request.reference_dtype]), 2),
        (settings.device, served.weight_bytes(settings.quantize, dtype), 1),
    )
    needed: dict[torch.device, int] = {}
    for name, weight_bytes, share in sides:
        device = _device(name)
        needed[device] = needed.get(device, 0) + weight_bytes + share * settings.adapter_memory
    check_room(needed)


def _device(name: str) -> torch.device:
    is_cuda = torch.cuda.is_available() if name == "auto" else name == "cuda"
    if is_cuda and not torch.cuda.is_available():
        raise StartupRefused("cuda was asked for and torch sees no GPU here; use cpu, or install torch with CUDA")
    return torch.device("cuda" if is_cuda else "cpu")


def _both_settings(request: DriftRequest, encoded: Encoded, held: ExitStack) -> tuple[Settings, Settings]:
    """(served, reference): what both are assembled from, with a KV cache for one pass."""
    settings = request.settings
    if not settings.has_store:  # assembling would create it, and measuring must leave nothing behind
        scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="graft-drift-"))
        settings = settings.model_copy(update={"store": Path(scratch)})
    served = encoded.settings_for(settings)
    reference = served.model_copy(
        update={
            "model": request.reference,
            "quantize": "none",
            "dtype": request.reference_dtype,
            "device": request.reference_device,
            "strict_base": False,  # whether an adapter is for this base was decided on the served side
            # Served in 16 bits, an adapter takes twice the bytes in float32.
            "adapter_memory": 2 * settings.adapter_memory,
            "host_memory": 2 * settings.host_memory,
        }
    )
    return served, reference


def _adapters(request: DriftRequest, server: Server) -> list[str]:
    """The adapters to measure, each loaded once, so that what cannot be applied is refused before an hour of passes."""
    names = [info.name for info in server.registry.list()]
    if request.adapters == (ALL,) and not names:
        raise StartupRefused(f"--adapter all: there is none in {request.settings.store}; name another --store")
    chosen = names if request.adapters == (ALL,) else list(request.adapters)
    for spec in chosen:
        try:
            server.registry.verify(spec)
        except AdapterNotFound as error:
            known = ", ".join(names) or "none"
            raise StartupRefused(f"--adapter {spec}: there is no such adapter; there are: {known}") from error
        except GraftError as error:
            raise StartupRefused(f"--adapter {spec}: {error.message} Name those to measure, without it.") from error
    return chosen


def _ran(server: Server) -> Ran:
    base = server.base
    dtype = str(base.dtype).removeprefix("torch.")
    return Ran(base.name, str(base.quantization), dtype, str(base.device), base.weight_bytes)
