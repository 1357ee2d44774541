"""Trainable tokens: rows of the embedding's table, and of a head that shares it, of the adapter's own.

Owns the reading of PEFT's TrainableTokens files. Their "delta" is the whole new row.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.own_rows import own_rows
from server.adapters.method import Edit, Lowered
from server.model.site import PRODUCTS, Site

_KNOWN = {"token_indices", "init_weights"}
_PARAMETER = "trainable_tokens_delta"


class TrainableTokens:
    name = "trainable_tokens"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "TRAINABLE_TOKENS"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        edits: dict[str, Edit] = {}
        for module in modules_of(checkpoint, sites, (_PARAMETER,), kinds=PRODUCTS):
            key, ids = module.keys[_PARAMETER], config.get("token_indices")
            rows = own_rows(checkpoint, key, ids, "token_indices", module.site, sites)
            edits.update({path: Edit(ops={"token_rows": tensors}) for path, tensors in rows.items()})
        return Lowered(self.name, 0, checkpoint.num_parameters, edits)


METHOD = TrainableTokens()
