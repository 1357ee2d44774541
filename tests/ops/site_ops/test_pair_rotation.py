"""Pairs of outputs are turned as the definition says, whatever tokens stand beside one another."""

import pytest
import torch

from server.ops.site_ops import OpTokens, Tensors
from server.ops.site_ops.pair_rotation import PairRotation
from tests.ops.site_ops.lanes import NUM_LANES, STEPS, Site, check_after

SITE = Site(5, 24)


def drawn(lane: int) -> Tensors:
    """Groups of 2, 4, 8, 12 and 24: each pairs its first half with its second."""
    half = (1, 2, 4, 6, 12)[lane]
    generator = torch.Generator().manual_seed(lane)
    partners = torch.arange(24.0).view(-1, 2, half).flip(1).flatten()
    return {
        "own": torch.randn(24, generator=generator), "other": torch.randn(24, generator=generator), "partners": partners
    }  # fmt: skip


def define(tensors: Tensors, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    own, other, partners = (tensors[name] for name in ("own", "other", "partners"))
    return torch.stack([own[i] * y[i] + other[i] * y[int(partners[i])] for i in range(24)])


@pytest.mark.parametrize("tokens", STEPS.values(), ids=STEPS.keys())
def test_each_token_is_turned_by_its_own_lane(tokens: OpTokens) -> None:
    check_after(PairRotation(), SITE, [drawn(lane) for lane in range(NUM_LANES)], define, tokens)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"own": torch.ones(23)}, r"its own has the shape \[23\], and this base needs \[24\]"),
        ({"partners": torch.full((24,), 24.0)}, "numbered 0 to 23"),
        ({"partners": torch.full((24,), -1.0)}, "numbered 0 to 23"),
        ({"partners": torch.full((24,), 0.5)}, "numbered 0 to 23"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, torch.Tensor], words: str) -> None:
    PairRotation().check(drawn(0), SITE)
    with pytest.raises(ValueError, match=words):
        PairRotation().check({**drawn(0), **changed}, SITE)
