"""HRA: the input of a linear is reflected at r trained hyperplanes, one after another.

Owns y = W H x + bias with H = prod_i (I - 2 u_i u_i^T) over columns of length 1. Their product is I - U T U^T for an
upper triangular T (the compact WY form: Schreiber and Van Loan 1989), so the change of W is the pair (U^T, -W U T) of
rank r; W enters by its product with r rows only. With `apply_GS` the columns are made orthogonal first, and T = 2 I.
Yuan et al. 2024, arXiv:2405.17484.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site

_U = "hra_u"


class Hra:
    name = "hra"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "HRA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, {"r", "apply_GS", "init_weights", "bias"})
        fields.check_no_bias(config, "HRA")
        rank = fields.count(config.get("r", 8), "r")
        is_orthogonal = fields.flag(config, "apply_GS")
        modules = modules_of(checkpoint, sites, (_U,))
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, rank, is_orthogonal))


def _edit(module: ModuleTensors, rank: int, is_orthogonal: bool) -> Edit:
    module.check_saved_rank(_U, 1, rank)
    module.check_rank(rank)
    u = module.take(_U, (module.site.d_in, rank)).double()
    if is_orthogonal:
        u = _orthogonal(module, u)
        t = 2 * torch.eye(rank, dtype=u.dtype)
    else:
        u = _normal(module, u)
        t = _wy_factor(u)
    rows = u.T.float().contiguous()  # (r, d_in)
    return Edit(down=rows, up=-(t.T @ module.site.project(rows).double()).float())


def _wy_factor(u: torch.Tensor) -> torch.Tensor:
    """T (r, r) of I - U T U^T = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), for columns of length 1."""
    t = torch.zeros(u.shape[1], u.shape[1], dtype=u.dtype)
    overlaps = u.T @ u
    for j in range(len(t)):
        t[:j, j] = -2 * t[:j, :j] @ overlaps[:j, j]
        t[j, j] = 2
    return t


def _orthogonal(module: ModuleTensors, u: torch.Tensor) -> torch.Tensor:
    """The columns of U by Gram and Schmidt, in their order."""
    done = u[:, :0]
    for j in range(u.shape[1]):
        column = u[:, j : j + 1]
        for _ in range(2):  # twice is enough where one pass would lose digits
            column = column - done @ (done.T @ column)
        done = torch.cat([done, _normal(module, column)], dim=1)
    return done


def _normal(module: ModuleTensors, u: torch.Tensor) -> torch.Tensor:
    lengths = u.norm(dim=0)
    if not bool((lengths > 0).all()):
        raise AdapterRejected(f"{module.name(_U)} has a column of length zero, which is no direction to reflect at.")
    normal: torch.Tensor = u / lengths
    return normal


METHOD = Hra()
