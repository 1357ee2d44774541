"""A change of a weight as a product of two thin matrices, and what that loses.

Owns the truncated singular value decomposition, of products that stay factored and of dense matrices. Knows nothing
about adapters or recipes.
"""

from dataclasses import dataclass

import torch

_NOTHING = 1e-6  # of the largest singular value: what is below is rounding, and takes no rank
_OVERSAMPLED = 16  # columns of the random basis beyond the rank
_NUM_POWERS = 4  # each sharpens the spectrum, at two products of the matrix with the basis
_FIRST_DRAWN = 32  # rank that is tried first where a share of the energy decides


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


def truncate_dense(matrix: torch.Tensor, rank: int, energy: float = 1.0) -> Factors:
    """The best approximation of at most `rank` of a matrix (d_out, d_in), computed on its device in float64.

    With less `energy` than 1 its rank is the smallest that keeps this share of the squared Frobenius norm.

    Through the eigenvectors of the smaller Gram matrix, which costs a fraction of a full decomposition; what is lost
    to squaring, 1e-8 of the largest singular value, is less than float32 keeps.
    """
    m = matrix.double()
    is_wide = m.shape[1] > m.shape[0]
    squares, vectors = torch.linalg.eigh(m @ m.T if is_wide else m.T @ m)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    kept = min(_num_kept(squares.sqrt(), rank), num_holding(squares, float(squares.sum()), energy))
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


def truncate_drawn(matrix: torch.Tensor, rank: int, energy: float = 1.0) -> Factors:
    """Nearly the best approximation of at most `rank` of a matrix (d_out, d_in), for large matrices and small ranks.

    A randomized range finder with power iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4),
    in float32 with every basis made orthonormal; its draws are the same at each call. With `energy` as in
    `truncate_dense`: the basis is doubled until it holds that share. `squared_error` is what was really lost.
    """
    total = float(matrix.double().square().sum())
    width = rank if energy == 1 else min(rank, _FIRST_DRAWN)
    while True:
        basis = _range(matrix, min(width + _OVERSAMPLED, *matrix.shape))  # (d_out, width)
        left, values, right = torch.linalg.svd((basis.T @ matrix).double(), full_matrices=False)
        squares = values.square()
        needed = num_holding(squares, total, energy)
        if width == rank or needed <= width:
            break
        width = min(2 * width, rank)
    kept = min(_num_kept(values, rank), needed)
    up = (basis.double() @ left[:, :kept]) * values[:kept]
    return Factors(
        down=right[:kept].float().cpu().contiguous(),
        up=up.T.float().cpu().contiguous(),
        squared_norm=total,
        squared_error=max(0.0, total - float(squares[:kept].sum())),
    )


def num_holding(squares: torch.Tensor, total: float, energy: float) -> int:
    """How many of the squared singular values, largest first, hold this share of `total`; all where they do not."""
    if energy == 1:
        return len(squares)
    reached = squares.cumsum(0) >= energy * total
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(squares)


def _range(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """An orthonormal basis (d_out, width) of nearly all that the largest singular vectors span."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis: torch.Tensor = torch.linalg.qr(matrix @ drawn).Q
    for _ in range(_NUM_POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def _num_kept(values: torch.Tensor, rank: int) -> int:
    """How many of the singular values, largest first, are kept: those that are more than rounding, at most `rank`."""
    return min(rank, int((values > _NOTHING * values[0]).sum()))
