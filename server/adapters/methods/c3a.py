"""C3A: a matrix of circulant blocks added to the weight, one trained kernel for each block.

Owns y = base(x) + C(kernel) x / d_in, where block (i, j) of C has in row k the kernel (i, j) turned k places to the
right. Chen et al. 2024, arXiv:2407.19342.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.model.site import Site

_KERNEL = "c3a_kernel"
_KNOWN = {"block_size", "block_size_pattern", "bias", "init_weights"}


class C3a:
    name = "c3a"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "C3A"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, _KNOWN)
        fields.check_no_bias(checkpoint.config, "C3A")
        return lower_by_module(self.name, checkpoint, modules_of(checkpoint, sites, (_KERNEL,)), _edit)


def _edit(module: ModuleTensors) -> Edit:
    kernel = module.take(_KERNEL, module.shape(_KERNEL))
    return Edit(ops={"circulant": {"kernel": kernel / module.site.d_in}})


METHOD = C3a()
