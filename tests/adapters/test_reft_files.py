"""LoReFT files whose config says another thing than their tensors, or whose parts would never act, are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.ground.errors import AdapterRejected
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.adapters.reft import make_reft


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return model


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        ("loreft", {"positions": "f3"}, "must name both ends of the prompt"),
        ("loreft", {"applies_to": "generated", "positions": None}, "must name both ends of the prompt"),
        ("loreft-generated", {"positions": "f7+l7"}, "must be null where applies_to is 'generated'"),
        ("loreft", {"layers": [0]}, r"layers = \[0\] .* the file's is \[0, 1\]"),
        ("loreft", {"r": 7}, "r = 7 .* the file's is 3"),
        ("loreft", {"share_weights": True}, "share_weights = True .* the file's is False"),
        ("loreft", {"positions": "everywhere"}, "must be as f7.l7, f7 or l7"),
        ("loreft", {"activation": "prelu"}, "activation = 'prelu' .* is not served"),
        ("consreft", {"activation": "relu"}, "of consreft none are"),
        ("loreft", {"intervention": "newreft"}, "intervention = 'newreft' .* must be one of loreft"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Base, dense: PreTrainedModel, tmp_path: Path, kind: str, changed: dict[str, Any], words: str
) -> None:
    folder = make_reft(dense, kind, tmp_path / "reft", 0)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(AdapterRejected, match=words):
        lower(Checkpoint.open(folder), base.sites.by_path)
