"""Quantized bases: the answers of the dequantized weight, however the checkpoint came and whatever the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from server.model import quantize
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization, dequantized_weight, is_quantized, quantization_config
from server.model.site import PRODUCTS
from server.model.sites import BaseSite
from tests.adapters.dense import DenseSite
from tests.models import VOCAB_SIZE

NF4, INT8 = Quantization.NF4, Quantization.INT8
FP32, BF16 = torch.float32, torch.bfloat16
# By the arithmetic of the product: the same numbers in another order, 8 mantissa bits, 8-bit activations.
EXACT, ROUNDED, COARSE = 1e-5, 3e-2, 5e-2
KINDS = [(NF4, FP32, EXACT), (NF4, BF16, ROUNDED), (INT8, FP32, COARSE), (INT8, BF16, COARSE)]
IDS = torch.randint(0, VOCAB_SIZE, (10,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Path:
    return model_folder(request.param)


def load(folder: Path, kind: Quantization, dtype: torch.dtype) -> Base:
    return Base.load(BaseOptions(str(folder), kind, dtype))


def products(base: Base) -> list[tuple[str, BaseSite]]:
    return [(site.path, site) for site in base.sites.sites if site.kind in PRODUCTS]


def quantized_by_transformers(folder: Path, config: BitsAndBytesConfig | None, dtype: torch.dtype) -> nn.Module:
    """A model that has not run yet, so that its weights can still be read and saved."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )
    return model


def dense_twin(folder: Path, kind: Quantization, dtype: torch.dtype) -> nn.Module:
    """The same quantized weights, dequantized, in a plain float32 model."""
    model = quantized_by_transformers(folder, quantization_config(kind, dtype), dtype)
    for path, module in [(p, m) for p, m in model.named_modules() if is_quantized(m)]:
        weight = dequantized_weight(module).float()
        plain = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
        plain.weight.data = weight
        if module.bias is not None:
            plain.bias.data = module.get_parameter("bias").data.float()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.eval()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS[None]).logits[0]
    return logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("kind", "dtype", "limit"), KINDS)
def test_a_quantized_base_answers_as_its_dequantized_weights(
    folder: Path, kind: Quantization, dtype: torch.dtype, limit: float
) -> None:
    base = load(folder, kind, dtype)
    assert base.quantization is kind
    expected = logits_of(dense_twin(folder, kind, dtype))
    assert difference(base._probe([IDS]), expected) < limit
    # The limit means something: quantizing itself moves the answer by more.
    assert difference(logits_of(dense_twin(folder, Quantization.NONE, dtype)), expected) > 2e-3


@pytest.mark.parametrize(("kind", "dtype", "limit"), KINDS)
def test_methods_learn_of_the_dequantized_weight(
    folder: Path, kind: Quantization, dtype: torch.dtype, limit: float
) -> None:
    """After the passes of loading, which repack 4-bit weights; int8's codes can be read at any time."""
    base = load(folder, kind, dtype)
    twin = dense_twin(folder, kind, dtype)
    for path, site in products(base):
        expected = DenseSite(site.index, path, twin.get_submodule(path))
        torch.testing.assert_close(site.row_norms_squared, expected.row_norms_squared, rtol=1e-5, atol=1e-6)
        rows = torch.randn(3, site.d_in, generator=torch.Generator().manual_seed(0))
        is_rounded = kind is NF4 and is_quantized(site.module)
        assert difference(site.project(rows), expected.project(rows)) < (limit if is_rounded else EXACT)
        if expected.bias is not None:
            assert site.bias is not None
            torch.testing.assert_close(site.bias, expected.bias, rtol=0, atol=0)


def test_learning_of_an_int8_weight_changes_nothing_of_it(tiny_llama: Path) -> None:
    base = load(tiny_llama, INT8, BF16)
    before = base._probe([IDS])
    biases = {path: site.module.bias.dtype for path, site in products(base) if site.bias is not None}
    for _, site in products(base):
        site.project(torch.ones(1, site.d_in))
    assert {path: base.sites.by_path[path].module.bias.dtype for path in biases} == biases
    assert torch.equal(base._probe([IDS]), before)


# Checkpoints that are quantized already


@pytest.mark.parametrize("asked", [NF4, INT8, Quantization.NONE])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_4_bit_checkpoint_is_served_as_it_is(
    tiny_llama: Path, tmp_path: Path, asked: Quantization, dtype: torch.dtype
) -> None:
    quantized_by_transformers(tiny_llama, quantization_config(NF4, dtype), dtype).save_pretrained(tmp_path)  # type: ignore[operator]
    stored = load(tmp_path, asked, dtype)
    assert stored.quantization is NF4
    assert torch.equal(stored._probe([IDS]), load(tiny_llama, NF4, dtype)._probe([IDS]))


def test_an_fp4_checkpoint_is_called_so_and_runs_on_the_fast_product(tiny_llama: Path, tmp_path: Path) -> None:
    config = quantization_config(NF4, BF16)
    assert config is not None
    config.bnb_4bit_quant_type = "fp4"
    quantized_by_transformers(tiny_llama, config, BF16).save_pretrained(tmp_path)  # type: ignore[operator]
    stored, exact = load(tmp_path, NF4, BF16), load(tmp_path, NF4, FP32)
    assert stored.quantization is exact.quantization is Quantization.FP4
    assert difference(stored._probe([IDS]), exact._probe([IDS])) < ROUNDED
    assert difference(exact._probe([IDS]), load(tiny_llama, NF4, FP32)._probe([IDS])) > ROUNDED


def test_an_8_bit_checkpoint_loses_the_threshold_that_would_let_requests_meet(tiny_llama: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)  # type: ignore[no-untyped-call]
    quantized_by_transformers(tiny_llama, config, FP32).save_pretrained(tmp_path)  # type: ignore[operator]
    stored = load(tmp_path, NF4, FP32)
    assert stored.quantization is INT8
    modules = [module for module in stored.model.modules() if isinstance(module, Linear8bitLt)]
    assert {module.state.threshold for module in modules} == {0.0}
    torch.testing.assert_close(stored._probe([IDS]), load(tiny_llama, INT8, FP32)._probe([IDS]))


# CPUs


def test_without_the_fast_product_layers_are_held_dequantized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "has_avx512bf16", lambda: False)
    base = load(folder, NF4, BF16)
    assert base.note is not None
    assert base.quantization is NF4  # the values still are
    assert "this CPU has no AVX512-BF16, so" in base.note
    assert not any(isinstance(module, Linear4bit) for module in base.model.modules())
    assert difference(base._probe([IDS]), logits_of(dense_twin(folder, NF4, BF16))) < ROUNDED


def test_float32_is_computed_in_float32_on_any_cpu(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "has_avx512bf16", lambda: False)
    base = load(tiny_llama, NF4, FP32)
    assert base.note is None
    assert difference(base._probe([IDS]), logits_of(dense_twin(tiny_llama, NF4, FP32))) < EXACT


def test_layers_of_a_shape_that_the_fast_product_refuses_run_on_the_plain_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    base = load(tmp_path, NF4, BF16)
    assert difference(base._probe([IDS]), logits_of(dense_twin(tmp_path, NF4, BF16))) < ROUNDED
