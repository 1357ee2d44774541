"""What is not served says so: the exact sentence, and the way out of it, for every type that PEFT has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from safetensors.torch import save_file
from torch import nn

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.adapters.methods import discover, method_for
from server.ground.errors import AdapterRejected
from tests.adapters.dense import sites_of

MERGE = "Merge it into the base (PEFT's merge_and_unload) and serve that, or train a LoRA."
FULL_RANK = f"its change of a weight is of full rank, in no form that is cheap beside other adapters. {MERGE}"
SPARSE = f"its change is single numbers all over a weight, in no form that is cheap beside other adapters. {MERGE}"
FACTORS = f"its matrices are factors of the exact weights, which a quantized base does not have. {MERGE}"
FROM_THE_WEIGHT = f"its matrices are computed from the whole weight of the base, which is not served yet. {MERGE}"
TASKS = "it needs a task for each request, which requests do not name. Train a LoRA for each task."

# How the sentence goes on after "peft_type = ... in adapter_config.json is not served: ".
UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"where its parts belong in a weight is drawn by clustering and not saved. {MERGE}",
    "ADAPTION_PROMPT": "it adds an attention of its own to the last blocks. Train a LoRA.",
    "CARTRIDGE": "its prefix of the KV cache is not served yet. Train a LoRA.",
    "DEFT": FROM_THE_WEIGHT,
    "FOURIERFT": FULL_RANK,
    "FROD": FULL_RANK,
    "GLORA": FULL_RANK,
    "HIRA": FULL_RANK,
    "LILY": (
        "its routers average over all tokens of a forward pass, so that its answer would depend on the other requests "
        "of the batch. Train a LoRA."
    ),
    "MULTITASK_PROMPT_TUNING": TASKS,
    "OSF": FULL_RANK,
    "PEANUT": FROM_THE_WEIGHT,
    "POLY": TASKS,
    "PSOFT": FACTORS,
    "PVERA": (
        "VeRA with learned noise is not served yet. Merge it into the base (PEFT's merge_and_unload) and serve that, "
        "or train a LoRA, or a VeRA."
    ),
    "RANDLORA": FULL_RANK,
    "SHADOW": "it runs a second network beside the base. Train a LoRA.",
    "SHIRA": SPARSE,
    "SUPERTUNING": SPARSE,
    "TINYLORA": FACTORS,
    "UNILORA": f"which of its numbers belongs where depends on the order of modules in training. {MERGE}",
    "WAVEFT": FULL_RANK,
    "XLORA": (
        "its classifier takes a second forward pass for every token, and works without a KV cache. Serve its LoRA "
        "adapters by themselves, or mix them in a request."
    ),
}  # fmt: skip


CONVERT = "convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)."


def init(name: str, other_way: str = CONVERT) -> tuple[dict[str, Any], str]:
    return {"init_lora_weights": name}, (
        f"init_lora_weights = '{name}' in adapter_config.json: this init changed the base's weights, and the file has "
        f"no lora_initial_A and lora_initial_B for q_proj. Save them along, or {other_way}"
    )


# Config fields of a LoRA -> the whole sentence.
LORAS: Mapping[str, tuple[dict[str, Any], str]] = {
    "PiSSA": init("pissa"),
    "PiSSA, fast": init("pissa_niter_16"),
    "OLoRA": init("olora"),
    "CorDA": init("corda"),
    "LoRA-GA": init("lora_ga"),
    "LoftQ": init("loftq", "serve the base that LoftQ rounded, and set init_lora_weights to true."),
    "layer_replication": (
        {"layer_replication": [[0, 2], [1, 3]]},
        "layer_replication = [[0, 2], [1, 3]] in adapter_config.json: it changes the number of layers, which makes "
        "another model than the base.",
    ),
    "KaSA": (
        {"kasa_config": {"beta": 1e-4}},
        "kasa_config = {'beta': 0.0001} in adapter_config.json: it changes the base's weights, so the adapter does not "
        "fit the unchanged base.",
    ),
    "Arrow": (
        {"arrow_config": {"top_k": 2}},
        "arrow_config = {'top_k': 2} in adapter_config.json: routing between adapters per token is not served.",
    ),
}


def refusal(config: Mapping[str, Any], folder: Path) -> str:
    """What is said to a LoRA of one module whose config has these fields as well."""
    base = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | dict(config)))
    pair = {"q_proj.lora_A.weight": torch.ones(2, 8), "q_proj.lora_B.weight": torch.ones(8, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected) as refused:
        lower(Checkpoint.open(folder), sites_of(base))
    return refused.value.message


@pytest.mark.parametrize("kind", UNSERVED)
def test_a_type_that_is_not_served_says_why_and_what_to_do(kind: str, tmp_path: Path) -> None:
    expected = f"peft_type = '{kind}' in adapter_config.json is not served: {UNSERVED[kind]}"
    assert refusal({"peft_type": kind}, tmp_path) == expected


@pytest.mark.parametrize(("config", "sentence"), LORAS.values(), ids=LORAS.keys())
def test_a_lora_that_does_not_fit_the_unchanged_base_says_why(
    config: Mapping[str, Any], sentence: str, tmp_path: Path
) -> None:
    assert refusal(config, tmp_path) == sentence


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType))
def test_no_type_of_pefts_is_passed_over(kind: str) -> None:
    """One method claims it, or a sentence of the table above says why none does, or at least which ones there are."""
    if any(method.claims({"peft_type": kind}) for method in discover()):
        assert kind not in UNSERVED, "served, so its refusal can go"
        return
    with pytest.raises(AdapterRejected) as refused:
        method_for({"peft_type": kind})
    others = "; the methods are adalora, "
    assert (": " + UNSERVED[kind] if kind in UNSERVED else others) in refused.value.message
