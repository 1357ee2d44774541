"""A step's tokens over the lanes of an op, in every order that a step can have, and a site for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from server.ops import Run
from server.ops.site_ops import OpTokens, SiteOp, Tensors

# The lanes of mixed tokens and of runs: tokens of no lane first, between and last, lanes that come again, and one (4)
# that has no token at all.
MIXED = (0, 2, 1, 3, 0, 2, 5, 0)
RUNS = (0, 0, 1, 1, 1, 3, 2, 2, 0, 5, 5)
NUM_LANES = 5


@dataclass(frozen=True, slots=True)
class Site:
    """What an op may know of the site where it is."""

    d_in: int
    d_out: int
    kind: str = "linear"
    index: int = 0
    gain: float = 1.0

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def tokens_of(mixed: Sequence[int], runs: Sequence[int]) -> OpTokens:
    """`mixed` by token, then `runs` by token: neighbours of one lane are a run, those of lane 0 are in none."""
    lanes = [*mixed, *runs]
    cuts = [i for i in range(len(mixed), len(lanes)) if i == len(mixed) or lanes[i] != lanes[i - 1]]
    found = tuple(Run(start, end, lanes[start]) for start, end in pairwise([*cuts, len(lanes)]) if lanes[start])
    return OpTokens(torch.tensor(lanes, dtype=torch.int64), len(mixed), found, torch.zeros(len(lanes)).long())


STEPS = {
    "mixed and runs": tokens_of(MIXED, RUNS),
    "mixed only": tokens_of(MIXED, ()),
    "runs only": tokens_of((), RUNS),
    "many mixed tokens of each lane": tokens_of(MIXED * 5, RUNS),
    "none of any lane": tokens_of((0, 0), (0, 0, 0)),
    "one lane for all": tokens_of((2,) * 3, (2,) * 4),
}

# (tensors, x (width,)) -> what the definition gives for one token
Definition = Callable[[Tensors, torch.Tensor], torch.Tensor]


def check_before(op: SiteOp, site: Site, of_lane: Sequence[Tensors], define: Definition, tokens: OpTokens) -> None:
    """In float32 and bfloat16: each token reads what the definition says, those of no lane exactly what they had."""
    for dtype in (torch.float32, torch.bfloat16):
        x = _drawn(tokens, site.d_in, dtype)
        given = x.clone()
        found = op.before(x, op.stack(of_lane, site), tokens, site)
        assert torch.equal(x, given), "an input is never written to"
        _check(found, x, [None if not lane else define(of_lane[lane - 1], x[i].float()) for i, lane in _lanes(tokens)])


def check_after(
    op: SiteOp,
    site: Site,
    of_lane: Sequence[Tensors],
    define: Callable[[Tensors, torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: OpTokens,
) -> None:
    """As `check_before`, with `define(tensors, y, x)`. Outputs lie as a fused product leaves them, in wider rows."""
    for dtype in (torch.float32, torch.bfloat16):
        x = _drawn(tokens, site.d_in, dtype)
        y = _drawn(tokens, site.d_out + 3, dtype)[:, 1:-2]
        given = y.clone()
        found = op.after(y, x, op.stack(of_lane, site), tokens, site)
        wanted = [
            None if not lane else define(of_lane[lane - 1], given[i].float(), x[i].float())
            for i, lane in _lanes(tokens)
        ]
        _check(found, given, wanted)


def _lanes(tokens: OpTokens) -> list[tuple[int, int]]:
    return list(enumerate(tokens.lanes.tolist()))


def _drawn(tokens: OpTokens, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(len(tokens.lanes), width, generator=torch.Generator().manual_seed(1))
    x[tokens.lanes == 0, 0] = torch.inf  # which times nothing would be NaN
    return x.to(dtype)


def _check(found: torch.Tensor, given: torch.Tensor, wanted: Sequence[torch.Tensor | None]) -> None:
    assert found.dtype == given.dtype
    exactness = {"rtol": 1e-5, "atol": 1e-5} if given.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for place, one in enumerate(wanted):
        if one is None:
            assert torch.equal(found[place], given[place]), "a token without the op keeps its numbers"
        else:
            torch.testing.assert_close(found[place].float(), one, **exactness)
