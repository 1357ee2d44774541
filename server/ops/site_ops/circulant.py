"""Circulant blocks added to a linear's weight, and never written out: C3A.

Owns the op beside the product of a linear. Knows nothing about scalings (they are in the kernel).

Semantics, for a token t of a lane with `kernel` (m, n, b), d_in = n b and d_out = m b:
    y'[t, i b + k] = y[t, i b + k] + sum over j, l of kernel[i, j, l] * x[t, j b + (k + l) mod b]
which is a product of Fourier transforms for each frequency: that of the input once, for all outputs.
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.shaped_lanes import ShapedLanes, add_products, by_shape
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors


class Circulant(SiteOp):
    name = "circulant"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        shape = tuple(tensors["kernel"].shape)
        if len(shape) != 3 or (shape[0] * shape[2], shape[1] * shape[2]) != (site.d_out, site.d_in):
            raise ValueError(
                f"its kernel has the shape {list(shape)}, whose blocks do not make {[site.d_out, site.d_in]}, which "
                "this base needs"
            )

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> tuple[ShapedLanes, ...]:
        return by_shape([{"spectrum": torch.fft.rfft(own["kernel"]).conj().resolve_conj()} for own in of_lane])

    def after(
        self, y: torch.Tensor, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite
    ) -> torch.Tensor:
        return add_products(y, x, stacked, tokens, _product)


def _product(x: torch.Tensor, tensors: Tensors, by_token: bool) -> torch.Tensor:
    spectrum = tensors["spectrum"]  # (m, n, frequencies), the tokens in front where each has its own
    blocks = x.view(len(x), spectrum.shape[-2], -1)
    frequencies = torch.einsum("tnf,tmnf->tmf" if by_token else "tnf,mnf->tmf", torch.fft.rfft(blocks), spectrum)
    added: torch.Tensor = torch.fft.irfft(frequencies, n=blocks.shape[-1])
    return added.reshape(len(x), -1)
