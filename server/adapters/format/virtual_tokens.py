"""A checkpoint written by PEFT's prompt-learning methods: one matrix, a row for each virtual token.

Owns the config fields and the key that these methods have in common. Knows nothing about what a row holds.
"""

from collections.abc import Set

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.ground.errors import AdapterRejected

KEY = "prompt_embeddings"
_KNOWN = {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}


def embeddings(checkpoint: Checkpoint, known: Set[str]) -> torch.Tensor:
    """The matrix (virtual tokens, numbers of each), float32. `known` are the config fields of the method's own.

    Raises AdapterRejected for a config that is not of this form, and where the file has another number of rows.
    """
    config = checkpoint.config
    fields.check_known(config, _KNOWN | known)
    num_tokens = fields.count(config.get("num_virtual_tokens"), "num_virtual_tokens")
    if fields.count(config.get("num_transformer_submodules") or 1, "num_transformer_submodules") != 1:
        raise AdapterRejected("num_transformer_submodules in adapter_config.json must be 1: the base is a decoder.")
    if KEY not in checkpoint:
        raise AdapterRejected(f"The file has no {KEY}, in which PEFT saves the virtual tokens.")
    shape = checkpoint.shape(KEY)
    if len(shape) != 2 or shape[0] != num_tokens:
        raise AdapterRejected(
            f"{KEY} has the shape {list(shape)}, and num_virtual_tokens in adapter_config.json is {num_tokens}. Save "
            "the config that belongs to the weights."
        )
    return checkpoint.take(KEY)


def virtual_ids(num_tokens: int) -> torch.Tensor:
    """-1, -2, ... (tokens,) float32."""
    return -torch.arange(1, num_tokens + 1, dtype=torch.float32)
