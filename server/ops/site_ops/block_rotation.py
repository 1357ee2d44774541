"""Inputs turned block by block: OFT.

Owns the op before the product of a linear and, as an embedding has no input to turn, on what an embedding gives. Knows
nothing about how a rotation is parametrised, nor whether it is one: any matrix will do.

Semantics, for a token t of a lane with `blocks` (n, b, b), v the vector of d = m n b numbers that is turned:
    v'[t, (i m + j) b + c] = sum over k of v[t, (i m + j) b + k] * blocks[i, k, c]
so that each block serves m pieces in a row: all of them where one block is shared (n = 1), else one each (m = 1).
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.shaped_lanes import ShapedLanes, by_shape, products
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors


class BlockRotation(SiteOp):
    name = "block_rotation"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        shape, width = tuple(tensors["blocks"].shape), _width(site)
        if len(shape) != 3 or shape[1] != shape[2] or width % (shape[0] * shape[1]):
            raise ValueError(f"its blocks have the shape {list(shape)}, and cannot be laid side by side to {width}")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> tuple[ShapedLanes, ...]:
        return by_shape(of_lane)

    def before(self, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite) -> torch.Tensor:
        return x if site.kind == "embedding" else _with_turned(x.clone(), x, stacked, tokens)

    def after(
        self, y: torch.Tensor, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite
    ) -> torch.Tensor:
        return _with_turned(y, y, stacked, tokens) if site.kind == "embedding" else y


def _width(site: SiteShape) -> int:
    return site.d_out if site.kind == "embedding" else site.d_in


def _with_turned(
    out: torch.Tensor, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens
) -> torch.Tensor:
    for rows, turned in products(x, stacked, tokens, _turned):
        out[rows] = turned.to(out.dtype)
    return out


def _turned(x: torch.Tensor, tensors: Tensors, by_token: bool) -> torch.Tensor:
    blocks = tensors["blocks"]
    num, size = blocks.shape[-3], blocks.shape[-1]
    pieces = x.view(len(x), num, -1, size)
    return torch.einsum("tnmk,tnkc->tnmc" if by_token else "tnmk,nkc->tnmc", pieces, blocks).reshape(x.shape)
