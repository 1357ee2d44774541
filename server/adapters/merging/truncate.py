"""A change of a weight as a product of two thin matrices, and what that loses.

Owns the truncated singular value decomposition, of products that stay factored and of dense matrices. Knows nothing
about adapters or recipes.
"""

from dataclasses import dataclass

import torch

_NOTHING = 1e-6  # of the largest singular value: what is below is rounding, and takes no rank


@dataclass(frozen=True, slots=True)
class Factors:
    """up^T down, and how far that is from what it stands for; both squares are of Frobenius norms, float64."""

    down: torch.Tensor  # (r, d_in) float32 on the CPU
    up: torch.Tensor  # (r, d_out) float32 on the CPU
    squared_norm: float  # of what it stands for
    squared_error: float = 0.0


def exact(down: torch.Tensor, up: torch.Tensor) -> Factors:
    """The product as it is: (r, d_in), (r, d_out)."""
    d, u = down.double(), up.double()
    return Factors(down.contiguous(), up.contiguous(), float(((d @ d.T) * (u @ u.T)).sum().clamp_min(0)))


def truncate_product(down: torch.Tensor, up: torch.Tensor, rank: int) -> Factors:
    """The best approximation of up^T down of at most `rank`: (r, d_in), (r, d_out). No (d_out, d_in) is formed.

    With up^T = Q R and down^T = P S the singular values are those of the small R S^T.
    """
    q, r = torch.linalg.qr(up.double().T)
    p, s = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(r @ s.T, full_matrices=False)
    kept = _num_kept(values, rank)
    squares = values.square()
    return Factors(
        down=(right[:kept] @ p.T).float().contiguous(),
        up=((q @ left[:, :kept]) * values[:kept]).T.float().contiguous(),
        squared_norm=float(squares.sum()),
        squared_error=float(squares[kept:].sum()),
    )


def truncate_dense(matrix: torch.Tensor, rank: int) -> Factors:
    """The best approximation of at most `rank` of a matrix (d_out, d_in), computed on its device in float64.

    Through the eigenvectors of the smaller Gram matrix, which costs a fraction of a full decomposition; what is lost
    to squaring, 1e-8 of the largest singular value, is less than float32 keeps.
    """
    m = matrix.double()
    is_wide = m.shape[1] > m.shape[0]
    squares, vectors = torch.linalg.eigh(m @ m.T if is_wide else m.T @ m)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    kept = _num_kept(squares.sqrt(), rank)
    basis = vectors[:, :kept]
    if is_wide:
        up, down = basis.T, basis.T @ m
    else:
        up, down = (m @ basis).T, basis.T
    return Factors(
        down=down.float().cpu().contiguous(),
        up=up.float().cpu().contiguous(),
        squared_norm=float(m.square().sum()),
        squared_error=float(squares[kept:].sum()),
    )


def _num_kept(values: torch.Tensor, rank: int) -> int:
    """How many of the singular values, largest first, are kept: those that are more than rounding, at most `rank`."""
    return min(rank, int((values > _NOTHING * values[0]).sum()))
