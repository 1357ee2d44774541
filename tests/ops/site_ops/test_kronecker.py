"""A Kronecker product is added as if it were written out, whatever tokens stand beside one another."""

import pytest
import torch

from server.ops.site_ops import OpTokens, Tensors
from server.ops.site_ops.kronecker import Kronecker
from tests.ops.site_ops.lanes import NUM_LANES, STEPS, Site, check_after

SITE = Site(d_in=12, d_out=20)
# Factors of several shapes, whole and in two, and two lanes of one shape.
SHAPES: tuple[dict[str, tuple[int, int]], ...] = (
    {"left": (4, 3), "right": (5, 4)},
    {"left": (2, 2), "right_up": (10, 3), "right_down": (3, 6)},
    {"left": (4, 3), "right": (5, 4)},
    {"left": (1, 12), "right": (20, 1)},  # in the wrong order, as much between the two as the dense product holds
    {"left_up": (10, 2), "left_down": (2, 6), "right_up": (2, 1), "right_down": (1, 2)},
)


def drawn(lane: int) -> Tensors:
    generator = torch.Generator().manual_seed(lane)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[lane].items()}


def define(tensors: Tensors, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    left, right = (
        tensors[name] if name in tensors else tensors[f"{name}_up"] @ tensors[f"{name}_down"]
        for name in ("left", "right")
    )
    return y + torch.kron(left, right) @ x


@pytest.mark.parametrize("tokens", STEPS.values(), ids=STEPS.keys())
def test_each_token_gets_the_product_of_its_own_lane(tokens: OpTokens) -> None:
    check_after(Kronecker(), SITE, [drawn(lane) for lane in range(NUM_LANES)], define, tokens)


@pytest.mark.parametrize(
    "shapes",
    [
        {"left": (4, 3), "right": (4, 5)},
        {"left": (4, 3), "right": (5, 4, 1)},
        {"left": (12,), "right": (5, 4)},
        {"left": (), "right": (20, 12)},
        {"left": (4, 3), "right_up": (5, 2), "right_down": (3, 4)},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    for lane in range(NUM_LANES):
        Kronecker().check(drawn(lane), SITE)
    with pytest.raises(ValueError, match=r"do not make \[20, 12\], which this base needs"):
        Kronecker().check({name: torch.ones(shape) for name, shape in shapes.items()}, SITE)
