"""The peft_types that cannot be served, or not yet: of each, why, and what its owner can do instead.

Owns these sentences. Knows nothing about the methods that are served: their own files claim configs, and what is
claimed is not looked up here.
"""

from collections.abc import Mapping

_MERGE = "Merge it into the base (PEFT's merge_and_unload) and serve that, or train a LoRA"
_FULL_RANK = f"its change of a weight is of full rank, in no form that is cheap beside other adapters. {_MERGE}"
_SPARSE = f"its change is single numbers all over a weight, in no form that is cheap beside other adapters. {_MERGE}"
_FACTORS = f"its matrices are factors of the exact weights, which a quantized base does not have. {_MERGE}"
_FROM_THE_WEIGHT = f"its matrices are computed from the whole weight of the base, which is not served yet. {_MERGE}"
_TASKS = "it needs a task for each request, which requests do not name. Train a LoRA for each task"

# Each ends a sentence: "peft_type = ... is not served: ..."
_REASONS: Mapping[str, str] = {
    "ADAMSS": f"where its parts belong in a weight is drawn by clustering and not saved. {_MERGE}",
    "ADAPTION_PROMPT": "it adds an attention of its own to the last blocks. Train a LoRA",
    "CARTRIDGE": "its prefix of the KV cache is not served yet. Train a LoRA",
    "DEFT": _FROM_THE_WEIGHT,
    "FOURIERFT": _FULL_RANK,
    "FROD": _FULL_RANK,
    "GLORA": _FULL_RANK,
    "HIRA": _FULL_RANK,
    "LILY": (
        "its routers average over all tokens of a forward pass, so that its answer would depend on the other requests "
        "of the batch. Train a LoRA"
    ),
    "MULTITASK_PROMPT_TUNING": _TASKS,
    "OSF": _FULL_RANK,
    "PEANUT": _FROM_THE_WEIGHT,
    "POLY": _TASKS,
    "PSOFT": _FACTORS,
    "PVERA": f"VeRA with learned noise is not served yet. {_MERGE}, or a VeRA",
    "RANDLORA": _FULL_RANK,
    "SHADOW": "it runs a second network beside the base. Train a LoRA",
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "TINYLORA": _FACTORS,
    "UNILORA": f"which of its numbers belongs where depends on the order of modules in training. {_MERGE}",
    "WAVEFT": _FULL_RANK,
    "XLORA": (
        "its classifier takes a second forward pass for every token, and works without a KV cache. Serve its LoRA "
        "adapters by themselves, or mix them in a request"
    ),
}


def why_unserved(peft_type: object) -> str | None:
    """The reason and the remedy, without a full stop at the end; None for a type that nothing is known of."""
    return _REASONS.get(peft_type) if isinstance(peft_type, str) else None
