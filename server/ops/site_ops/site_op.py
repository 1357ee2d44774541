"""What every op at a site is: how its tensors are checked and stacked, and what it does to an input and an output.

Owns that contract and the tokens of a step as an op sees them. Knows nothing about adapters, slots or where tensors are
stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch

from server.ops.edits import Run
from server.ops.sending import send

Tensors = Mapping[str, torch.Tensor]


class SiteShape(Protocol):
    """What the tensors of an op must fit."""

    @property
    def kind(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...


class OpSite(SiteShape, Protocol):
    """A site at which an op is applied."""

    @property
    def index(self) -> int: ...
    @property
    def gain(self) -> float:
        """By which an embedding multiplies its rows (Gemma: the root of the width); else 1."""

    @property
    def weight_offset(self) -> float:
        """What a norm adds to its weight (Gemma: 1); else 0."""

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """At a norm: what it multiplies by its weight, (tokens, width) -> the same."""


@dataclass(frozen=True, slots=True)
class OpTokens:
    """Which lane of an op's stack each token of a step belongs to: 1 ... for those that have it, 0 for all others.

    The first `num_mixed` tokens may change lane from one to the next; those after them lie in `runs` of one lane each,
    and what is in no run has none. So an op with little to read gathers it by token, and one with much reads it once
    for a run.
    """

    lanes: torch.Tensor  # (tokens,) int64
    num_mixed: int
    runs: tuple[Run, ...]  # after the mixed tokens; `adapter` is the lane
    ids: torch.Tensor  # (tokens,) int64; virtual tokens have -1, -2, ...
    # The lanes of the mixed tokens once more, where they can be read without waiting for a device.
    mixed_lanes: tuple[int, ...] | None = None
    _found: dict[tuple[int, ...], "MixedTokens"] = field(default_factory=dict)
    _of_lane: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # by ops, for those at later sites of the same step

    @property
    def mixed(self) -> torch.Tensor:
        """(num_mixed,) the lanes of the mixed tokens."""
        return self.lanes[: self.num_mixed]

    def mixed_of(self, lanes: tuple[int, ...]) -> "MixedTokens":
        """The mixed tokens of some lanes. Kept: many sites ask for the same."""
        if lanes not in self._found:
            place_of = {lane: place for place, lane in enumerate(lanes)}
            found = [(token, place_of[lane]) for token, lane in enumerate(self._known_mixed) if lane in place_of]
            both = send(torch.tensor(found, dtype=torch.int64).view(-1, 2).t().contiguous(), self.lanes.device)
            self._found[lanes] = MixedTokens(both[0], both[1], tuple(place for _, place in found))
        return self._found[lanes]

    def of_lane(self, lane: int) -> torch.Tensor:
        """(found,) int64, on the device: all tokens of a lane in their order, mixed or not. Kept likewise."""
        if lane not in self._of_lane:
            mixed = [token for token, own in enumerate(self._known_mixed) if own == lane]
            runs = [torch.arange(run.start, run.end) for run in self.runs if run.adapter == lane]
            found = torch.cat([torch.tensor(mixed, dtype=torch.int64), *runs])
            self._of_lane[lane] = send(found, self.lanes.device)
        return self._of_lane[lane]

    @property
    def _known_mixed(self) -> Sequence[int]:
        return self.mixed.tolist() if self.mixed_lanes is None else self.mixed_lanes


@dataclass(frozen=True, slots=True)
class MixedTokens:
    """The mixed tokens of some lanes, and for each the place of its lane among them."""

    tokens: torch.Tensor  # (found,) int64, on the device
    places: torch.Tensor  # (found,) int64, on the device
    place_numbers: tuple[int, ...]  # the same, where they can be read without waiting for it

    def parts(self, num_at_once: int) -> Iterator["MixedTokens"]:
        """The same in parts of at most so many tokens."""
        for start in range(0, len(self.place_numbers), num_at_once):
            at = slice(start, start + num_at_once)
            yield MixedTokens(self.tokens[at], self.places[at], self.place_numbers[at])


class SiteOp(Protocol):
    """One op; it leaves alone what it does not override.

    `stacked` is what its own `stack` made, and nobody else looks into it but to count bytes (`tensors_in`). It may hold
    the tensors that it was made of: they lie where they are for as long as a token can have their lane. What it copies
    is about as large as they are together, and no more.
    """

    name: str
    # Fields, small ones, whose numbers `stack` reads: it gets those of a step on the CPU.
    looked_at: frozenset[str] = frozenset()

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        """Raises ValueError, with a sentence, for tensors (float32) that cannot be applied at the site."""

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Any:
        """The tensors of lanes 1, 2, ... side by side, with lane 0 before them, which changes nothing."""

    def before(self, x: torch.Tensor, stacked: Any, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        """What the site reads in place of x (tokens, d_in); for an embedding ids (tokens,). Never written in place."""
        return x

    def after(self, y: torch.Tensor, x: torch.Tensor, stacked: Any, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        """What the site gives in place of y (tokens, d_out), which may be written to; x as the site was given it."""
        return y


def joined(of_lane: Sequence[Tensors], field: str) -> torch.Tensor:
    """A field of all lanes, under one another; of one lane the tensor itself."""
    return of_lane[0][field] if len(of_lane) == 1 else torch.cat([own[field] for own in of_lane])


def tensors_in(stacked: Any) -> Iterator[torch.Tensor]:
    """Every tensor in what `stack` made: of mappings, tuples and dataclasses."""
    if isinstance(stacked, torch.Tensor):
        yield stacked
    elif isinstance(stacked, Mapping):
        yield from tensors_in(tuple(stacked.values()))
    elif isinstance(stacked, tuple):
        for one in stacked:
            yield from tensors_in(one)
    elif is_dataclass(stacked):
        yield from tensors_in(tuple(getattr(stacked, field.name) for field in fields(stacked)))


@dataclass(frozen=True, slots=True)
class PlacedOp:
    """An op at one site, for the adapters of a step that have it there."""

    op: SiteOp
    stacked: Any
    tokens: OpTokens


def around(
    placed: Sequence[PlacedOp], x: torch.Tensor, normal: Callable[[torch.Tensor], torch.Tensor], site: OpSite
) -> torch.Tensor:
    """What a site gives for x, (tokens, d_in) or ids (tokens,), with ops around what it does else: (tokens, d_out).

    `normal` reads what they put in place of x: x itself where they put nothing there.
    """
    read = x
    for one in placed:
        read = one.op.before(read, one.stacked, one.tokens, site)
    y = normal(read)
    for one in placed:
        y = one.op.after(y, x, one.stacked, one.tokens, site)
    return y
