"""The list of families: what refusals promise, what the page says and what the tests run are one and the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.ground.errors import AdapterRejected
from server.model.architectures import FAMILIES, SERVED
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.adapters.peft_adapters import save_trained
from tests.model.architectures_page import PAGE, families_table, table_in
from tests.model.test_base import REFUSED
from tests.models import ARCHITECTURES


def test_every_family_that_is_named_is_tested_and_the_other_way_round() -> None:
    tested = [make().config.model_type for make in ARCHITECTURES.values()]
    assert [family.model_type for family in FAMILIES] == tested
    assert SERVED.removeprefix("families that work: ").split(", ") == [family.name for family in FAMILIES]


def test_the_page_has_the_table_that_the_models_give(model_folder: Callable[[str], Path]) -> None:
    """If not: `python -m tests.model.architectures_page`."""
    assert table_in(PAGE.read_text(encoding="utf-8")) == families_table(model_folder)


def test_the_page_names_every_model_whose_refusal_is_tested() -> None:
    refused = PAGE.read_text(encoding="utf-8").partition("## Refused")[2]
    rows = [line.split("|")[1].strip() for line in refused.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(f"`{name}`" for name in REFUSED)


# What is special about them is there in the tiny models, else the tests would compare nothing of it


@pytest.mark.parametrize(
    ("architecture", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"layer_types": ["full_attention"] * 2}),
        ("gemma2", {"layer_types": ["full_attention"] * 2}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"layer_types": ["full_attention"] * 2}),
    ],
    ids=str,
)
def test_windows_and_caps_of_the_tiny_models_change_their_answers(
    architecture: str, without: dict[str, Any], model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(architecture)
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    logits = []
    for changes in ({}, without):
        config = AutoConfig.from_pretrained(folder)
        for name, value in changes.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert (logits[0] - logits[1]).norm() / logits[0].norm() > 0.05


# Mixtures of experts


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", [Quantization.NF4, Quantization.INT8])
def test_a_quantized_base_says_what_its_experts_cost(
    architecture: str, kind: Quantization, model_folder: Callable[[str], Path]
) -> None:
    base = Base.load(BaseOptions(str(model_folder(architecture)), kind, torch.float32))
    experts = [p for name, p in base.model.named_parameters() if ".experts." in name]
    assert {p.dtype for p in experts} == {torch.float32}
    mebibytes = sum(p.numel() * 4 for p in experts) / 2**20
    assert base.note == (
        f"the experts stay unquantized ({mebibytes:,.1f} MiB of the base), and no adapter can edit them"
    )


def test_an_unquantized_base_has_nothing_to_say_of_its_experts(model_folder: Callable[[str], Path]) -> None:
    assert Base.load(BaseOptions(str(model_folder("mixtral")), Quantization.NONE, torch.float32)).note is None


@pytest.mark.filterwarnings("ignore")  # PEFT's remark on turning modules of former versions into parameters
def test_an_adapter_on_experts_is_refused_by_name(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_folder("qwen3_moe")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "gate_proj", "up_proj"])
    save_trained(AutoModelForCausalLM.from_pretrained(folder), config, tmp_path, seed=1)
    base = Base.load(BaseOptions(str(folder), Quantization.NONE, torch.float32))
    with pytest.raises(AdapterRejected, match=r"target_parameters.*expert stacks.* are not served"):
        lower(Checkpoint.open(tmp_path), base.sites.by_path)
