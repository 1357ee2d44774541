"""The fingerprint of a base: one word for one checkpoint, however it is named, cut into files, stored or loaded.

Owns what is covered and how it is read, from the checkpoint's own files. Knows nothing about the loaded model, its
quantization or adapters.

Covered, as one SHA-256:

- of the config, as transformers reads it: the fields of `_COVERED`, those that change what is computed and that no
  tensor's shape tells. Token ids, dropout, initializers and book-keeping are not covered;
- of every tensor: its name, its shape, and its numbers. Of a tensor of more than 4096 numbers four runs of 1024 are
  read, spread evenly from its beginning to its end; of a smaller one, all. Numbers enter rounded to bfloat16, so that a
  checkpoint saved again in another floating type is still the same base.

Left out: a head that is tied to the embedding (some files repeat it), and the buffers that old versions of transformers
saved. Two checkpoints that differ only in numbers that are not read share a fingerprint: this tells bases apart that
were trained apart, and is no seal against tampering.

A checkpoint that comes quantized holds other numbers than the base it was made from. Its fingerprint begins with
"packed-" and says nothing about that of the other: `can_compare` tells. There the names have to serve.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from server.model.safetensors_files import StoredTensor, stored_tensors, weight_files

_FORMAT = "graftserve-base-1"  # enters the hash; a change of what is covered changes it
_PACKED = "packed-"
_NUM_RUNS = 4
_RUN_LENGTH = 1024  # numbers
_COVERED = (
    "model_type", "tie_word_embeddings",
    # heads
    "num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "multi_query", "head_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "clip_qkv", "query_pre_attn_scalar",
    "attn_logit_softcapping", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    # positions, and who sees whom
    "rope_parameters", "rotary_dim", "alibi", "no_rope_layers", "layer_types", "sliding_window",
    # blocks
    "hidden_act", "hidden_activation", "activation_function", "activation",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
    "use_parallel_residual", "parallel_attn", "do_layer_norm_before", "swiglu_alpha", "swiglu_limit",
    # scales
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
    "scale_embedding", "final_logit_softcapping",
    # experts
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method",
    "decoder_sparse_step", "mlp_only_layers", "first_k_dense_replace",
)  # fmt: skip
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OLD_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")
_HEAD = "lm_head.weight"


def fingerprint(model: str, config: PreTrainedConfig) -> str | None:
    """The fingerprint of a checkpoint, a local folder or a hub id that has been downloaded.

    64 hex digits, "packed-" before them if the checkpoint comes quantized. None for a checkpoint without safetensors
    files, whose numbers cannot be read without running it. Reads at most 4096 numbers of each tensor, and never the
    network. Raises OSError and ValueError for files that are not what they should be.
    """
    files = weight_files(model)
    if not files:
        return None
    text_config = config.get_text_config()
    total = hashlib.sha256(f"{_FORMAT}\n{_canonical(text_config.to_dict())}\n".encode())
    is_tied = bool(getattr(text_config, "tie_word_embeddings", False))
    tensors = (tensor for path in files for tensor in stored_tensors(path))
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if not tensor.name.endswith(_OLD_BUFFERS) and not (is_tied and tensor.name == _HEAD):
            total.update(_framed(tensor))
    is_packed = getattr(config, "quantization_config", None) is not None
    return (_PACKED if is_packed else "") + total.hexdigest()


def can_compare(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints, if they differ, are of two bases: both known, and both or neither of packed numbers."""
    return one is not None and other is not None and one.startswith(_PACKED) == other.startswith(_PACKED)


def differing_fields(one: PreTrainedConfig, other: PreTrainedConfig) -> tuple[str, ...]:
    """The covered fields in which two configs differ: those by which the same weights compute something else."""
    first, second = (config.get_text_config().to_dict() for config in (one, other))
    return tuple(name for name in _COVERED if _plain(first.get(name)) != _plain(second.get(name)))


def _canonical(config: Mapping[str, Any]) -> str:
    """The covered fields that are set, as JSON in which 10000 and 10000.0 are one number."""
    covered = {name: _plain(config[name]) for name in _COVERED if config.get(name) is not None}
    return json.dumps(covered, sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _framed(tensor: StoredTensor) -> bytes:
    """Name, shape and sampled numbers, each with its length before it, so that no two tensors read alike."""
    name, shape = tensor.name.encode(), str(tensor.shape).encode()
    parts = (name, shape, _sampled(tensor))
    return b"".join(struct.pack(">Q", len(part)) + part for part in parts)


def _sampled(tensor: StoredTensor) -> bytes:
    with tensor.path.open("rb", buffering=0) as file:
        runs = [
            os.pread(file.fileno(), num * tensor.item_bytes, tensor.begin + first * tensor.item_bytes)
            for first, num in _runs(tensor.num_elements)
        ]
    data = b"".join(runs)
    dtype = _FLOATING.get(tensor.dtype)
    if dtype is None or not data:
        return data
    rounded = torch.frombuffer(bytearray(data), dtype=dtype).to(torch.bfloat16)
    return rounded.view(torch.uint8).numpy().tobytes()


def _runs(num: int) -> Sequence[tuple[int, int]]:
    """(first, length) of the runs that are read of a tensor of `num` numbers; they do not overlap."""
    if num <= _NUM_RUNS * _RUN_LENGTH:
        return ((0, num),)
    last = num - _RUN_LENGTH
    return tuple((last * k // (_NUM_RUNS - 1), _RUN_LENGTH) for k in range(_NUM_RUNS))
