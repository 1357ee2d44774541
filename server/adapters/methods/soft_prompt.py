"""Prompt tuning, p-tuning and CPT: trained embeddings of virtual tokens that stand before every prompt.

Owns y = rows[i] at the embedding for the virtual token -1 - i. What p-tuning's encoder makes of its own parameters is
in the file already. Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021, arXiv:2103.10385; Blau et al. 2024,
arXiv:2410.17222.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.virtual_tokens import embeddings, virtual_ids
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

_NAMES = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "CPT": "cpt"}
# How the embeddings were begun, and the encoder that they came out of; `virtual_tokens` knows the others.
_KNOWN = {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
    "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_loss_decay_factor", "opt_projection_epsilon",
    "opt_projection_format_epsilon", "opt_weighted_loss_type",
}  # fmt: skip


class SoftPrompt:
    name = "prompt_tuning"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") in tuple(_NAMES)  # a tuple takes what has no hash, too

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        rows = embeddings(checkpoint, _KNOWN)
        site = _input_embedding(sites, rows)
        edit = Edit(ops={"token_rows": {"ids": virtual_ids(len(rows)), "rows": rows}})
        method = _NAMES[fields.text(checkpoint.config, "peft_type")]
        return Lowered(method, 0, rows.numel(), {site.path: edit}, num_virtual_tokens=len(rows))


def _input_embedding(sites: Mapping[str, Site], rows: torch.Tensor) -> Site:
    """The embedding of tokens: the first that is called (that of positions comes after it)."""
    site = next((site for site in sites.values() if site.kind is SiteKind.EMBEDDING), None)
    if site is None:
        raise AdapterRejected("The base has no embedding that takes virtual tokens.")
    if site.d_out != rows.shape[1]:
        raise AdapterRejected(
            f"prompt_embeddings has rows of {rows.shape[1]} numbers, and embeddings of this base have {site.d_out}. "
            "Was the adapter trained on another model?"
        )
    return site


METHOD = SoftPrompt()
