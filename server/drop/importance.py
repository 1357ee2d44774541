"""How much an adapter adds to each layer's outputs while prompts run, and the layers that are worth keeping.

Owns the measure and the choice. Knows nothing about files, prompts or how passes are run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from server.adapters.format.module_paths import layer_of
from server.adapters.method import Edit
from server.ground.errors import AdapterRejected
from server.model.sites import BaseSite

_ROUNDING = 1e-9  # of shares that are sums of floats


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer that the adapter edits."""

    path: str  # "model.layers.3"
    sites: tuple[str, ...]
    output: float  # mean over the tokens of the squared norm that the adapter adds, summed over the layer's sites
    share: float  # of the outputs of all layers
    is_kept: bool = True

    @property
    def container(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def number(self) -> int:
        return int(self.path.rpartition(".")[2])


NumKept = Callable[[tuple[Layer, ...]], int]  # of layers, the most important first


class Watch:
    """Adds up, while passes run, what the edits of one adapter add to the outputs of its sites."""

    def __init__(self, edits: Mapping[str, Edit], sites: Mapping[str, BaseSite]) -> None:
        """`edits` by site path; those outside of decoder layers are not watched."""
        self._edits = {path: edit for path, edit in edits.items() if layer_of(path) is not None}
        self._sites = sites
        self._squares = dict.fromkeys(self._edits, 0.0)
        self._num_tokens = dict.fromkeys(self._edits, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches every pass inside of the block."""
        watched = [self._sites[path] for path in self._edits]
        for site in watched:
            site.observer = self._see
        try:
            yield
        finally:
            for site in watched:
                site.observer = None

    def layers(self) -> tuple[Layer, ...]:
        """What was seen, by layer, in the order of the model. Raises AdapterRejected where it cannot be compared."""
        outputs: dict[str, float] = {}
        sites: dict[str, list[str]] = {}
        for path in sorted(self._edits, key=lambda path: self._sites[path].index):
            layer = layer_of(path)
            assert layer is not None
            outputs[layer] = outputs.get(layer, 0.0) + self._squares[path] / max(self._num_tokens[path], 1)
            sites.setdefault(layer, []).append(path)
        total = sum(outputs.values())
        if not math.isfinite(total):
            raise AdapterRejected(
                "The adapter's outputs on these prompts are not finite, so its layers cannot be compared. Try --dtype "
                "float32."
            )
        if total == 0:
            raise AdapterRejected(
                "The adapter adds nothing in any layer on these prompts: there is nothing to compare."
            )
        return tuple(Layer(path, tuple(sites[path]), output, output / total) for path, output in outputs.items())

    def _see(self, site: BaseSite, x: torch.Tensor) -> None:
        """`x` (..., d_in): the input of a site that is about to run."""
        added = added_by(self._edits[site.path], site, x.reshape(-1, site.d_in).float().cpu())
        self._squares[site.path] += float(added.double().square().sum())
        self._num_tokens[site.path] += added.shape[0]


def added_by(edit: Edit, site: BaseSite, x: torch.Tensor) -> torch.Tensor:
    """What LoRA or DoRA adds to a linear's output: x (tokens, d_in) float32 on the CPU -> (tokens, d_out).

    For LoRA that is s B A x, for DoRA (c - 1) W x + c s B A x; both with the trained biases' change, if there is one.
    """
    added = torch.zeros(x.shape[0], site.d_out)
    if edit.down is not None and edit.up is not None:
        added += x @ edit.down.T @ edit.up
    if edit.out_scale is not None:
        product = site.project(x)
        product = product if site.bias is None else product + site.bias
        added = edit.out_scale * added + (edit.out_scale - 1) * product
    return added if edit.out_shift is None else added + edit.out_shift


def kept_share(share: float) -> NumKept:
    """Keeps this share of the layers, above 0 and at most 1, rounded up."""
    return lambda ranked: math.ceil(share * len(ranked) - _ROUNDING)


def kept_energy(energy: float) -> NumKept:
    """Keeps the fewest layers that have together this share, above 0 and at most 1, of the outputs."""

    def num_kept(ranked: tuple[Layer, ...]) -> int:
        reached = 0.0
        for number, layer in enumerate(ranked, start=1):
            reached += layer.share
            if reached >= energy - _ROUNDING:
                return number
        return len(ranked)

    return num_kept


def most_important(layers: tuple[Layer, ...], num_kept: NumKept) -> frozenset[str]:
    """The paths of the layers that are kept: so many of the largest; of equal ones the first in the model."""
    ranked = tuple(sorted(layers, key=lambda layer: -layer.output))  # stable
    return frozenset(layer.path for layer in ranked[: max(1, num_kept(ranked))])
