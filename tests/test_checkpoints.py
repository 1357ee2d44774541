"""Checkpoints as they lie on disk, served and compared with PEFT: stored quantized, in shards, with tied embeddings."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.fidelity import dense_model, dequantized_twin, serve_kinds
from tests.models import ARCHITECTURES, byte_tokenizer, save_filled

KINDS = ("lora", "dora", "vera", "ia3")


def four_bits(kind: str, *, double: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip


STORED: Mapping[str, tuple[BitsAndBytesConfig, str]] = {
    "nf4-double": (four_bits("nf4", double=True), "nf4"),
    "nf4": (four_bits("nf4", double=False), "nf4"),
    "fp4": (four_bits("fp4", double=True), "fp4"),
    "int8": (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0), "int8"),  # type: ignore[no-untyped-call]
}


def store_quantized(folder: Path, config: BitsAndBytesConfig, target: Path, **options: Any) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    quantized.save_pretrained(target, **options)
    byte_tokenizer().save_pretrained(target)


@pytest.mark.parametrize("stored", sorted(STORED))
def test_a_checkpoint_stored_quantized_is_served_with_its_own_values(
    stored: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In shards, and whatever --quantize says; what it is, is said in the log and in the banner."""
    config, name = STORED[stored]
    store_quantized(tiny_llama, config, tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    dense = dequantized_twin(tiny_llama, config, torch.float32)
    caplog.set_level(logging.INFO)
    with serve_kinds(tmp_path / "model", dense, KINDS, tmp_path, strength=0.2, quantize="none") as case:
        assert f"model: {name}, float32" in case.server.banner()
        if stored != "int8":
            errors = {kind: case.relative_error(kind, *found) for kind, found in case.answers().items()}
            limit = 1e-5
        else:
            errors = case.overall_errors(num_prompts=2)
            limit = 1.5 * errors.pop(None)
    assert f"is stored quantized and stays {name}; --quantize none does not change that" in caplog.text
    assert 0 < limit < 0.1
    assert {kind: error for kind, error in errors.items() if not error <= limit} == {}


def test_a_checkpoint_in_shards_is_served(tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = save_filled(ARCHITECTURES["llama"](), tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    with serve_kinds(folder, dense_model(folder), KINDS, tmp_path) as case:
        errors = {kind: case.relative_error(kind, *found) for kind, found in case.answers().items()}
    assert {kind: error for kind, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_an_adapter_on_one_end_of_tied_embeddings_leaves_the_other_alone(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The two ends are one tensor and two sites; on an NF4 base, whose ends stay unquantized."""
    folder = model_folder(architecture)
    dense = dequantized_twin(folder, four_bits("nf4", double=True), torch.float32)
    kinds = ("lora-embedding-and-head", "dora-embedding-and-head")
    with serve_kinds(folder, dense, kinds, tmp_path, quantize="nf4") as case:
        sites = case.server.base.sites.by_path
        embedding, head = (sites[path].module.get_parameter("weight") for path in ("model.embed_tokens", "lm_head"))
        assert embedding.data_ptr() == head.data_ptr()
        errors = {kind: case.relative_error(kind, *found) for kind, found in case.answers().items()}
    assert {kind: error for kind, error in errors.items() if not error < 1e-5} == {}
