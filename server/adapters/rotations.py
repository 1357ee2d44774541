"""Rotations from the parameters that methods train for them.

Owns the map from skew matrices to rotations. Knows nothing about methods, files or what is turned.
"""

import torch


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I - Q) (I + Q)^-1 of each skew matrix Q: (n, b, b) -> (n, b, b) float32. Cayley 1846."""
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    rotations: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return rotations
