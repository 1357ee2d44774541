"""Rows of a vocabulary's table that an adapter has of its own, as PEFT saves them: ids in the config, rows in the file.

Owns that form. Knows nothing about which method's file it is in.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind
from server.ops.site_ops import Tensors


def own_rows(
    checkpoint: Checkpoint, key: str, ids: Any, field: str, site: Site, sites: Mapping[str, Site]
) -> dict[str, Tensors]:
    """The op `token_rows` by site path: at `site`, and at a head that shares its table and has no key of its own.

    `key` holds the rows (ids, width), `ids` is what the config's `field` says. Raises AdapterRejected.
    """
    name = checkpoint.name(key)
    if site.kind is not SiteKind.EMBEDDING and site.table_of is None:
        raise AdapterRejected(f"{name}: {site.path} is no embedding, and no head that shares one's table.")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 24 for i in ids):
        raise AdapterRejected(f"{field} in adapter_config.json must be a list of token ids, each 0 or more.")
    width = site.d_out if site.kind is SiteKind.EMBEDDING else site.d_in
    rows = checkpoint.take(key, (len(ids), width))
    tensors = {"ids": torch.tensor(ids, dtype=torch.float32), "rows": rows}
    heads = [path for path, other in sites.items() if other.table_of == site.path]
    own = [path for path in heads if any(other.startswith(f"{path}.") for other in checkpoint)]
    return {path: tensors for path in (site.path, *heads) if path not in own}
