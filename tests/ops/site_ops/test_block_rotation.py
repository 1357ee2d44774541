"""Inputs are turned block by block as the definition says, whatever tokens stand beside one another."""

import pytest
import torch

from server.ops.site_ops import OpTokens, Tensors, shaped_lanes
from server.ops.site_ops.block_rotation import BlockRotation
from server.ops.site_ops.shaped_lanes import ShapedLanes
from server.ops.site_ops.site_op import MixedTokens
from tests.ops.site_ops.lanes import NUM_LANES, STEPS, Site, check_after, check_before

LINEAR, EMBEDDING = Site(24, 7), Site(7, 24, kind="embedding")
# Blocks of four sizes, one of them shared by all pieces, and two lanes of one shape.
SHAPES = ((6, 4, 4), (1, 4, 4), (6, 4, 4), (1, 24, 24), (3, 2, 2))


def drawn(lane: int) -> Tensors:
    return {"blocks": torch.randn(SHAPES[lane], generator=torch.Generator().manual_seed(lane))}


def define(tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    blocks = tensors["blocks"]
    size = blocks.shape[1]
    per_block = 24 // (len(blocks) * size)
    pieces = [x[at : at + size] @ blocks[at // size // per_block] for at in range(0, 24, size)]
    return torch.cat(pieces)


@pytest.mark.parametrize("tokens", STEPS.values(), ids=STEPS.keys())
def test_each_token_is_turned_by_its_own_lane_before_a_linear(tokens: OpTokens) -> None:
    of_lane = [drawn(lane) for lane in range(NUM_LANES)]
    check_before(BlockRotation(), LINEAR, of_lane, define, tokens)
    check_after(BlockRotation(), LINEAR, of_lane, lambda tensors, y, x: y, tokens)


@pytest.mark.parametrize("tokens", STEPS.values(), ids=STEPS.keys())
def test_and_after_an_embedding(tokens: OpTokens) -> None:
    of_lane = [drawn(lane) for lane in range(NUM_LANES)]
    check_after(BlockRotation(), EMBEDDING, of_lane, lambda tensors, y, x: define(tensors, y), tokens)
    ids = tokens.ids
    assert BlockRotation().before(ids, BlockRotation().stack(of_lane, EMBEDDING), tokens, EMBEDDING) is ids


@pytest.mark.parametrize("num_at_once", [1, 2, 3])
def test_large_blocks_are_copied_for_few_tokens_at_once(num_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or, where even that is too much, not at all; the tokens get the same."""
    of_lane = [{"blocks": torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(lane))} for lane in range(5)]
    num_bytes = of_lane[0]["blocks"].nbytes
    largest: list[int] = []
    gather = ShapedLanes.of_tokens

    def noted(lanes: ShapedLanes, found: MixedTokens) -> Tensors:
        own = gather(lanes, found)
        largest.append(own["blocks"].nbytes)
        return own

    monkeypatch.setattr(ShapedLanes, "of_tokens", noted)
    monkeypatch.setattr(shaped_lanes, "_MAX_GATHERED_BYTES", num_at_once * num_bytes)
    monkeypatch.setattr(shaped_lanes, "_MIN_GATHERED", 2)
    for max_stacked_bytes in (0, num_bytes):
        monkeypatch.setattr(shaped_lanes, "_MAX_STACKED_BYTES", max_stacked_bytes)
        check_before(BlockRotation(), LINEAR, of_lane, define, STEPS["mixed only"])
    assert max(largest, default=0) == (0 if num_at_once == 1 else num_at_once * num_bytes)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (5, 4, 4), (1, 5, 5), (24, 2, 2)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    for kind in (LINEAR, EMBEDDING):
        BlockRotation().check(drawn(0), kind)
        with pytest.raises(ValueError, match="cannot be laid side by side to 24"):
            BlockRotation().check({"blocks": torch.ones(shape)}, kind)
