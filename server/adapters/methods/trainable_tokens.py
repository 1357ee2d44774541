"""Trainable tokens: rows of the embedding's table, and of a head that shares it, of the adapter's own.

Owns the reading of PEFT's TrainableTokens files. Their "delta" is the whole new row.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.module_paths import SiteFinder
from server.adapters.format.own_rows import own_rows
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site

_KNOWN = {"token_indices", "init_weights"}
_PARAMETER = "trainable_tokens_delta"


class TrainableTokens:
    name = "trainable_tokens"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "TRAINABLE_TOKENS"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        finder = SiteFinder(sites)
        edits: dict[str, Edit] = {}
        for key in checkpoint:
            module, _, parameter = key.rpartition(".")
            if parameter != _PARAMETER:
                continue
            site = finder.find(module, checkpoint.name(key))
            if site.path in edits:
                raise AdapterRejected(f"{checkpoint.name(key)}: {site.path} is edited twice. Save one per file.")
            rows = own_rows(checkpoint, key, config.get("token_indices"), "token_indices", site, sites)
            edits.update({path: Edit(ops={"token_rows": tensors}) for path, tensors in rows.items()})
        return Lowered(self.name, 0, checkpoint.num_parameters, edits)


METHOD = TrainableTokens()
