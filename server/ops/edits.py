"""What the ops need to know of a batch's adapters: which token belongs to which, and their edits side by side.

Owns the batch-local numbering: the adapters of one step are numbered 1..S-1 in any order and 0 is the bare base.
Knows nothing about where rows are stored or what method an edit came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from server.ops.sending import send

# Padding in lanes costs little beside the matrices that are read anyway, until there is much of it.
_MAX_PADDING = 2  # places for each token
_NUM_PADDED_FREE = 512  # places
_MAX_PIECES = 32  # of a group at once; a narrow member (an expert's gate, 1 wide) cuts the others into thousands


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens [start, end) of one adapter (batch-local number)."""

    start: int
    end: int
    adapter: int


def runs_of(adapters: Sequence[int], start: int) -> tuple[Run, ...]:
    """The tokens from `start` on that have an adapter (batch-local numbers), in the longest runs of one."""
    runs = []
    for adapter, tokens in groupby(range(start, len(adapters)), key=adapters.__getitem__):
        first, *others = tokens
        if adapter:
            runs.append(Run(first, (others or [first])[-1] + 1, adapter))
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class Lanes:
    """The first tokens of a step by adapter: lane a - 1 has adapter a's tokens, padded to the longest lane."""

    num: int  # one per adapter of the step, used or not
    length: int
    tokens: torch.Tensor  # (num * length,) the token at each place; padding names any token
    places: torch.Tensor  # (num_tokens,) the place of each token; for one without adapter any place
    bare: torch.Tensor | None  # (num_tokens, 1) bool, True for tokens without adapter; None if all have one
    is_ordered: bool  # place i has token i, and there is nothing else

    @property
    def num_tokens(self) -> int:
        return self.places.shape[0]

    @classmethod
    def of(cls, adapters: Sequence[int], num: int, device: torch.device) -> "Lanes | None":
        """Lanes for tokens of these batch-local adapters; None where nearly all of them would be padding.

        Tokens after the last one with an adapter stay outside.
        """
        num_tokens = max((i for i, adapter in enumerate(adapters, start=1) if adapter), default=0)
        lanes: list[list[int]] = [[] for _ in range(num)]
        for token, adapter in enumerate(adapters):
            if adapter:
                lanes[adapter - 1].append(token)
        length = max(map(len, lanes), default=0)
        if length == 0 or num * length > max(_MAX_PADDING * num_tokens, _NUM_PADDED_FREE):
            return None
        tokens = [token for lane in lanes for token in (*lane, *[0] * (length - len(lane)))]
        places = [0] * num_tokens
        for number, lane in enumerate(lanes):
            for place, token in enumerate(lane, start=number * length):
                places[token] = place
        bare = [[adapter == 0] for adapter in adapters[:num_tokens]]
        return cls(
            num=num,
            length=length,
            tokens=send(torch.tensor(tokens), device),
            places=send(torch.tensor(places), device),
            bare=send(torch.tensor(bare), device) if any(map(any, bare)) else None,
            is_ordered=tokens == places == list(range(num_tokens)),
        )


@dataclass(slots=True)
class TokenLayout:
    """Which adapter each token of a step belongs to.

    The first `num_mixed` tokens may change adapter from one to the next (decodes: one token per sequence); the tokens
    after them lie in `runs` of one adapter each (prefill chunks). A group whose rank rows lie under one another
    computes mixed tokens as one dense product over all rows, in which each token keeps its own, and runs as a product
    each. A group with a matrix per adapter computes the tokens in `lanes` as one batched product, and
    `runs_after_lanes` as a product each.
    """

    adapters: torch.Tensor  # (tokens,) int64, batch-local adapter numbers
    num_mixed: int
    runs: tuple[Run, ...]
    lanes: Lanes | None = None
    runs_after_lanes: tuple[Run, ...] = ()
    # Many sites share one mask (same ranks), so a step gathers it once.
    _gathered: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def mixed_rows(self, per_adapter: torch.Tensor) -> torch.Tensor:
        """per_adapter[adapter of each mixed token]: (adapters, n) -> (num_mixed, n); computed once per step."""
        # The key is an id, so the tensor itself is kept beside the result: ids of dead tensors are used again.
        known = self._gathered.get(id(per_adapter))
        if known is None:
            known = (per_adapter, per_adapter.index_select(0, self.adapters[: self.num_mixed]))
            self._gathered[id(per_adapter)] = known
        return known[1]


@dataclass(frozen=True, slots=True)
class Stack:
    """The rank rows of a site group once more, a matrix per adapter, padded with rows of zeros to one rank.

    In the dtype that small products are fastest in. The hidden activations of the members that have rows lie beside one
    another, `rank` each. Outputs are cut into pieces of one width (the greatest common divisor of the members' own), so
    that one batched product makes the outputs of members as different as q and k of grouped-query attention.
    """

    rank: int  # of each member
    down: torch.Tensor  # (adapters, members with rows * rank, d_in)
    up: torch.Tensor  # (adapters, pieces, rank, width)
    spans: tuple[tuple[int, int], ...]  # of each member of the group: its pieces [first, last); empty without rows
    owners: tuple[int, ...]  # of each piece: its member, counted among those with rows
    owner_index: torch.Tensor | None = None  # (pieces,) the same; None where piece i is the whole output of member i
    mid_scale: torch.Tensor | None = None  # (adapters, 1, members with rows * rank) float32
    mid_shift: torch.Tensor | None = None  # the same
    # Views as the products want them: a view costs as much to make as a small operator.
    down_columns: torch.Tensor = field(init=False)  # (adapters, d_in, members with rows * rank)
    up_pieces: torch.Tensor = field(init=False)  # (adapters * pieces, rank, width)

    @property
    def is_coarse(self) -> bool:
        """Whether the pieces are few enough to be one product."""
        return len(self.owners) <= _MAX_PIECES

    def __post_init__(self) -> None:
        object.__setattr__(self, "down_columns", self.down.transpose(1, 2))
        object.__setattr__(self, "up_pieces", self.up.view(-1, *self.up.shape[2:]))


@dataclass(frozen=True, slots=True)
class SiteEdits:
    """The edits of a step's adapters at one site, stacked over the batch-local number (S of them, row 0 = the base).

    `up` holds the rank rows of all adapters under one another; `columns[a]` are the rows of adapter a among them.
    A vector field is None when no adapter of the step has it; adapters without it have the identity in their row.
    """

    has_rows: bool = False  # whether any adapter has rank rows here, be it in `up` or in the group's stack
    up: torch.Tensor | None = None  # (rows, d_out)
    columns: tuple[torch.Tensor | slice | None, ...] = ()
    in_scale: torch.Tensor | None = None  # (S, d_in) float32, like all vectors
    up_scale: torch.Tensor | None = None  # (S, d_out)
    out_scale: torch.Tensor | None = None  # (S, d_out)
    out_shift: torch.Tensor | None = None  # (S, d_out)


@dataclass(frozen=True, slots=True)
class GroupEdits:
    """One shrink for the sites of a group, which all read the same input.

    The rank rows of the members lie under one another in `down`; member i owns rows [offsets[i], offsets[i + 1]).
    """

    members: tuple[SiteEdits | None, ...]
    stack: Stack | None = None
    down: torch.Tensor | None = None  # (rows, d_in)
    foreign: torch.Tensor | None = None  # (S, rows) bool, True where a row is not the adapter's own
    mid_scale: torch.Tensor | None = None  # (S, rows) float32, None when 1 everywhere
    mid_shift: torch.Tensor | None = None  # (S, rows) float32, zero for foreign rows; None when 0 everywhere
    offsets: tuple[int, ...] = (0,)
    columns: tuple[torch.Tensor | slice | None, ...] = ()  # rows of each adapter, over all members
    is_joint: bool = field(init=False)  # whether the low-rank parts of all members can be added at once, side by side

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_joint", self._is_joint())

    def _is_joint(self) -> bool:
        if self.stack is None or not self.stack.is_coarse:
            return False
        return all(
            edits is not None and edits.has_rows and edits.in_scale is None and edits.up_scale is None
            for edits in self.members
        )
