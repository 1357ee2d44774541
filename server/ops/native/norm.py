"""RMS norms: what one is given, and its call. Owns nothing else."""

from dataclasses import dataclass

import torch

from server.ops.native.build import library
from server.ops.native.dtypes import DTYPES
from server.ops.native.layout import dense_rows


@dataclass(frozen=True, slots=True)
class Norm:
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    weight: torch.Tensor  # (width,) float32
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., width) -> the same, rounded once."""
        rows = dense_rows(x.reshape(-1, x.shape[-1]))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        library().graft_rms_norm(
            rows.data_ptr(), rows.stride(0), y.data_ptr(), DTYPES[x.dtype], self.weight.data_ptr(), *rows.shape,
            self.eps, torch.get_num_threads(),
        )  # fmt: skip
        return y
