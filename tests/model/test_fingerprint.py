"""The fingerprint of a base: one for one checkpoint, however it is cut, stored or loaded; another for another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from server.model.base import Base
from server.model.fingerprint import can_compare, fingerprint
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization, quantization_config
from tests.models import save_model

WEIGHTS = "model.safetensors"


def of(folder: Path) -> str | None:
    return fingerprint(str(folder), AutoConfig.from_pretrained(folder))


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "another-name"))


def set_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


# One base


def test_it_is_64_hex_digits_and_the_folders_name_does_not_count(tiny_llama: Path, copy: Path) -> None:
    found = of(tiny_llama)
    assert found is not None
    assert len(found) == 64
    assert int(found, 16) >= 0
    assert of(copy) == found


def test_shards_are_one_base(tiny_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert of(tmp_path) == of(tiny_llama)


def test_another_floating_type_of_the_file_is_the_same_base(tiny_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert of(tmp_path) == of(tiny_llama)


@pytest.mark.parametrize("quantize", list(Quantization))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_it_is_loaded_does_not_count(quantize: Quantization, dtype: torch.dtype, tiny_llama: Path) -> None:
    assert Base.load(BaseOptions(str(tiny_llama), quantize, dtype)).fingerprint == of(tiny_llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16", "transformers_version": "4.40.0"},
        {"pad_token_id": 3, "eos_token_id": 5, "bos_token_id": None},
        {"use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.5, "architectures": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ],
)
def test_what_does_not_change_the_function_does_not_count(
    changes: dict[str, object], tiny_llama: Path, copy: Path
) -> None:
    set_config(copy, **changes)
    assert of(copy) == of(tiny_llama)


def test_a_repeated_tied_head_and_old_buffers_do_not_count(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path)
    before = of(folder)
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    change_weights(folder, lambda w: w.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}))
    assert of(folder) == before


# Another base


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
)
def test_what_changes_the_function_counts(changes: dict[str, object], tiny_llama: Path, copy: Path) -> None:
    set_config(copy, **changes)
    assert of(copy) != of(tiny_llama)


def test_a_base_of_the_same_shapes_and_other_numbers_is_another(tiny_llama: Path, tmp_path: Path) -> None:
    assert of(save_model("llama", tmp_path, seed=1)) != of(tiny_llama)


def test_small_tensors_count_to_the_last_number_and_large_ones_by_samples(tiny_llama: Path, copy: Path) -> None:
    norm, table = "model.norm.weight", "model.embed_tokens.weight"
    size = load_file(copy / WEIGHTS)[table].numel()
    assert size > 4096
    unread = 1024 + (size - 4096) // 6  # in the middle of the first gap

    def add(name: str, place: int) -> None:
        change_weights(copy, lambda w: w[name].view(-1)[place].add_(1.0))

    before = of(tiny_llama)
    add(table, unread)
    assert of(copy) == before, "as documented: not every number is read"
    seen = {before}
    for name, place in ((norm, 17), (table, 0), (table, size - 1)):
        add(name, place)
        assert of(copy) not in seen
        seen.add(of(copy))


def test_a_huge_checkpoint_is_sampled_and_not_read(tmp_path: Path) -> None:
    """A hole of 64 GiB that claims to be four weights: reading all of it would meet the test's time limit."""
    num = 1 << 33
    header = {
        f"layer.{i}.weight": {
            "dtype": "BF16",
            "shape": [1 << 16, 1 << 17],
            "data_offsets": [2 * num * i, 2 * num * i + 2 * num],
        }
        for i in range(4)
    }
    encoded = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + 8 * num)
    config = AutoConfig.for_model("llama")
    assert fingerprint(str(tmp_path), config) is not None


# What has none, or one of its own


def test_a_checkpoint_that_comes_quantized_has_one_that_is_compared_with_its_like_only(
    tiny_llama: Path, tmp_path: Path
) -> None:
    asked = quantization_config(Quantization.NF4, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16, quantization_config=asked)
    model.save_pretrained(tmp_path)
    packed, dense = of(tmp_path), of(tiny_llama)
    assert packed is not None
    assert packed.startswith("packed-")
    assert not can_compare(packed, dense)
    assert can_compare(packed, packed)
    assert not can_compare(packed, None)
    assert Base.load(BaseOptions(str(tmp_path), Quantization.NF4)).fingerprint == packed


def test_a_checkpoint_without_safetensors_has_none(tiny_llama: Path, copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"a pickle, which nobody opens")
    assert of(copy) is None


def test_a_hub_id_that_is_not_downloaded_has_none() -> None:
    assert fingerprint("nobody/nothing-of-the-kind", AutoConfig.for_model("llama")) is None
