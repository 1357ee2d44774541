"""Rotations from the parameters that methods train for them.

Owns the map from skew matrices to rotations. Knows nothing about methods, files or what is turned.
"""

import torch

from server.ground.errors import AdapterRejected


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I - Q) (I + Q)^-1 of each skew matrix Q: (n, b, b) -> (n, b, b) float32. Cayley 1846.

    Raises AdapterRejected for numbers so large that I + Q cannot be told from a singular matrix.
    """
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    try:
        rotations: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    except RuntimeError as error:
        raise AdapterRejected("A rotation cannot be computed: its parameters are out of range.") from error
    return rotations
