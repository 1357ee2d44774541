"""Circulant blocks are added as if they were written out, whatever tokens stand beside one another."""

import pytest
import torch

from server.ops.site_ops import OpTokens, Tensors
from server.ops.site_ops.circulant import Circulant
from tests.ops.site_ops.lanes import NUM_LANES, STEPS, Site, check_after

SITE = Site(d_in=12, d_out=30)
SHAPES = ((5, 2, 6), (10, 4, 3), (5, 2, 6), (30, 12, 1), (15, 6, 2))  # blocks of odd and even widths


def drawn(lane: int) -> Tensors:
    return {"kernel": torch.randn(SHAPES[lane], generator=torch.Generator().manual_seed(lane))}


def define(tensors: Tensors, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    kernel = tensors["kernel"]
    size = kernel.shape[2]
    rows = [
        torch.cat([kernel[i, j].roll(k) for j in range(12 // size)]) for i in range(30 // size) for k in range(size)
    ]
    return y + torch.stack(rows) @ x


@pytest.mark.parametrize("tokens", STEPS.values(), ids=STEPS.keys())
def test_each_token_gets_the_product_of_its_own_lane(tokens: OpTokens) -> None:
    check_after(Circulant(), SITE, [drawn(lane) for lane in range(NUM_LANES)], define, tokens)


@pytest.mark.parametrize("shape", [(5, 2), (5, 2, 5), (2, 5, 6), (5, 2, 6, 1)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    Circulant().check(drawn(0), SITE)
    with pytest.raises(ValueError, match=r"do not make \[30, 12\], which this base needs"):
        Circulant().check({"kernel": torch.ones(shape)}, SITE)
