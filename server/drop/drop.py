"""The order of the work: run the prompts, choose the layers, write the smaller adapter, compare the two.

Owns what is asked for and what is reported. Knows nothing about flags or tables. The base is assembled as a server's
is, and both adapters run in its engine: what is measured is what will be served.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.content import WEIGHTS_FILE
from server.adapters.format.manifest import check_manifest
from server.adapters.format.module_paths import layer_of
from server.adapters.lowering import lower
from server.adapters.merging.change import what_is_no_change
from server.adapters.merging.lora_folder import new_folder
from server.adapters.methods import method_for
from server.assemble import Server
from server.drift.divergence import TokenDrift, token_drift
from server.drift.encoding import Encoded, encode
from server.drift.figures import Figures, Subject, figures
from server.drift.passes import Side
from server.drift.request import PromptFile
from server.drift.room import Shape
from server.drop.importance import Layer, NumKept, Watch, most_important
from server.drop.smaller import write_smaller
from server.ground.config import Settings
from server.ground.errors import AdapterRejected

_METHODS = ("lora", "dora")  # the modules of methods/ whose adapters are a pair of matrices for each site
_WHOLE, _SMALLER = "whole", "smaller"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DropRequest:
    """What to drop from. `told` is what the manifest keeps of the request."""

    settings: Settings
    adapter: Path
    prompts: PromptFile
    num_kept: NumKept
    max_tokens_per_prompt: int | None
    told: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far answers are from those with the whole adapter, on the prompts."""

    figures: Figures  # the whole adapter is the reference
    max_logit_difference: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """The receipt: the layers with their importance, the sizes, and what it costs."""

    method: str
    layers: tuple[Layer, ...]
    outside: tuple[str, ...]  # sites of the adapter that lie in no decoder layer, and are kept
    num_parameters: tuple[int, int]  # before, after
    weights_bytes: tuple[int, int]  # of the weights' file: before, after
    num_truncated: int  # prompts that were cut
    smaller: Drift
    none: Drift  # without any adapter: what dropping every layer would cost
    warnings: tuple[str, ...]


def drop(request: DropRequest, target: Path, say: Say) -> Dropped:
    """Writes the smaller adapter as the new folder `target`.

    Raises AdapterRejected for an adapter of another method or that this base cannot serve, StartupRefused for base and
    prompts; then nothing is left behind.
    """
    _check_method(request.adapter)
    with new_folder(target) as folder, ExitStack() as held:
        shape = Shape.of(request.settings.model)
        encoded = encode(request.settings.model, request.prompts, shape, request.max_tokens_per_prompt)
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="graft-drop-")))
        say(f"loading {request.settings.model} ...")
        settings = request.settings.model_copy(update={"store": scratch / "store"})
        side = encoded.side(encoded.settings_for(settings), held)
        return _dropped(request, side, encoded, folder, say)


def _dropped(request: DropRequest, side: Side, encoded: Encoded, folder: Path, say: Say) -> Dropped:
    base = side.server.base
    lowered = lower(Checkpoint.open(request.adapter), base.sites.by_path)
    if reason := what_is_no_change(lowered):
        raise AdapterRejected(f"Its layers cannot be measured: {reason}.")
    _register(side.server, request.adapter, _WHOLE)
    watch = Watch(lowered.edits, {site.path: site for site in base.sites.sites})
    with _slot(side, _WHOLE) as slot, watch.watching():
        say(f"measuring the layers on {encoded.num_tokens} tokens ...")
        for chunks in encoded.passes:
            side.logits(chunks, slot)
    layers = watch.layers()
    kept = most_important(layers, request.num_kept)
    layers = tuple(replace(layer, is_kept=layer.path in kept) for layer in layers)
    modules = [path for path, _ in base.model.named_modules()]
    told = dict(request.told) | {"dropped": [layer.path for layer in layers if not layer.is_kept]}
    write_smaller(request.adapter, folder, layers, base.sites.by_path, modules, told)
    _register(side.server, folder, _SMALLER)
    say("comparing the answers ...")
    with _slot(side, _WHOLE) as whole, _slot(side, _SMALLER) as smaller:
        drifts = {name: _drift(side, encoded, whole, slot) for name, slot in ((_SMALLER, smaller), ("none", 0))}
    left = Checkpoint.open(folder)
    return Dropped(
        method=lowered.method,
        layers=layers,
        outside=tuple(path for path in lowered.edits if layer_of(path) is None),
        num_parameters=(lowered.num_parameters, left.num_parameters),
        weights_bytes=(_weights_bytes(request.adapter), _weights_bytes(folder)),
        num_truncated=encoded.num_truncated,
        smaller=drifts[_SMALLER],
        none=drifts["none"],
        warnings=lowered.warnings,
    )


def _check_method(adapter: Path) -> None:
    """Before a base is loaded."""
    method = method_for(Checkpoint.open(adapter).config)
    if method.name not in _METHODS:
        raise AdapterRejected(
            f"The adapter is of the method {method.name}; graft drop takes LoRA, rsLoRA and DoRA, whose tensors "
            "belong to one layer each. Keep it as it is, or make a LoRA of it first (graft merge --rank N)."
        )
    check_manifest(adapter)


def _register(server: Server, folder: Path, name: str) -> None:
    """Into the scratch store, as an upload would be: what cannot be served is refused."""
    with server.store.incoming() as incoming:
        incoming.copy(folder)
        server.registry.register(incoming, name, replace=False)


@contextmanager
def _slot(side: Side, name: str) -> Iterator[int]:
    with side.placed(name) as (slot, _):
        yield slot


def _drift(side: Side, encoded: Encoded, whole: int, slot: int) -> Drift:
    """Of the answers in `slot` from those in the slot `whole`."""
    parts: list[TokenDrift] = []
    quarters: list[int] = []
    largest = 0.0
    for chunks in encoded.passes:
        targets = torch.tensor([target for chunk in chunks for target in chunk.targets()])
        expected, found = side.logits(chunks, whole), side.logits(chunks, slot)
        largest = max(largest, float((found.float() - expected.float()).abs().max()))
        parts.append(token_drift(expected, found, targets))
        quarters += [quarter for chunk in chunks for quarter in chunk.quarters()]
    return Drift(figures(Subject(), TokenDrift.concatenated(parts), torch.tensor(quarters)), largest)


def _weights_bytes(folder: Path) -> int:
    return (folder / WEIGHTS_FILE).stat().st_size
