"""A config that says another thing than the tensors beside it: warned of for every method, and the tensors decide."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.contradictions import feedforward_contradictions
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.adapters.peft_adapters import make_adapter

Adapter = Callable[..., Lowered]


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    kinds = ("vera", "vera-drawn", "ia3", "ia3-attention", "ia3-feedforward")
    return {kind: make_adapter(model, kind, tmp_path_factory.mktemp(kind), seed=1) for kind in kinds}


@pytest.fixture
def lowered(base: Base, folders: dict[str, Path], tmp_path: Path) -> Adapter:
    """An adapter that PEFT has saved, under a config that was changed."""

    def make(kind: str, changes: Mapping[str, Any]) -> Lowered:
        config = json.loads((folders[kind] / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        (tmp_path / "adapter_model.safetensors").write_bytes((folders[kind] / "adapter_model.safetensors").read_bytes())
        return lower(Checkpoint.open(tmp_path), base.sites.by_path)

    return make


@pytest.mark.parametrize("kind", ["vera", "vera-drawn", "ia3", "ia3-attention", "ia3-feedforward"])
def test_what_peft_saves_contradicts_nothing(kind: str, lowered: Adapter) -> None:
    assert lowered(kind, {}).warnings == ()


@pytest.mark.parametrize("kind", ["vera", "ia3"])
@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"target_modules": ["fc1", "layers.0.fc2"]}, "target_modules names none"),
        ({"exclude_modules": ["self_attn.q_proj"]}, "exclude_modules names model.layers.0.self_attn.q_proj"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform leaves out the layer of model.layers.1\."),
    ],
)
def test_a_choice_of_modules_that_the_file_does_not_keep_to(
    kind: str, config: Mapping[str, Any], warning: str, lowered: Adapter
) -> None:
    before, after = lowered(kind, {}), lowered(kind, config)
    assert [bool(re.search(warning, text)) for text in after.warnings] == [True]
    assert after.edits.keys() == before.edits.keys()


@pytest.mark.parametrize(
    ("named", "warnings"),
    [
        ([], [r"leaves out model\.layers\.\d\.mlp\.\w+, whose vector scales its input"]),
        (["down_proj"], [r"leaves out model\.layers\.\d\.mlp\.up_proj, "]),
        (
            ["up_proj", "down_proj", "q_proj"],
            [r"names model\.layers\.\d\.self_attn\.q_proj, whose vector scales its o"],
        ),
        (["q_proj"], ["names .*q_proj", "leaves out .*mlp"]),
    ],
)
def test_ia3_modules_that_the_config_takes_for_another_kind(
    named: list[str], warnings: list[str], lowered: Adapter
) -> None:
    before, after = lowered("ia3", {}), lowered("ia3", {"feedforward_modules": named})
    assert len(after.warnings) == len(warnings)
    for sentence, words in zip(after.warnings, warnings, strict=True):
        assert re.search(words, sentence)
        assert "The tensors are applied as they are" in sentence
    for path, edit in before.edits.items():
        assert after.edits[path].tensors().keys() == edit.tensors().keys()


@pytest.mark.parametrize("named", [None, "down_proj", ".*(up|down)_proj", [1], {"down_proj": True}])
def test_patterns_and_what_is_no_list_of_names_are_not_compared(named: object) -> None:
    assert feedforward_contradictions({"feedforward_modules": named}, {"layers.0.mlp.up_proj": False}) == ()


def test_names_are_ends_of_paths_without_a_dot_as_for_peft() -> None:
    config = {"feedforward_modules": ["own_proj"]}
    assert feedforward_contradictions(config, {"layers.0.mlp.down_proj": True}) == ()
