"""The laws on a GPU: the same engine with --device cuda. Run by `make gpu` where there is one."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.sequence import SamplingParams
from server.model.quantize import Quantization
from server.ops.prefill.varlen import varlen_lacks
from tests.adapters.peft_adapters import KINDS, make_adapter
from tests.fidelity import dense_model, dequantized_twin, serve_kinds
from tests.models import VOCAB_SIZE
from tests.serving import Ask, answer_all, logprob_rows, serving
from tests.test_fidelity import KINDS_OF, QUANTIZED_KINDS, REAL_STRENGTH
from tests.test_isolation import asks, check_isolation, check_nothing_leaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize("ops", ["reference", "triton"])
@pytest.mark.parametrize("architecture", list(KINDS_OF))
def test_every_kind_in_one_batch_equals_peft_alone(
    architecture: str, ops: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder(architecture)
    dense = dense_model(folder)
    with serve_kinds(folder, dense, KINDS_OF[architecture], tmp_path, device="cuda", ops=ops) as case:
        errors = {name: case.relative_error(name, *found) for name, found in case.answers().items()}
    # PEFT answers on the CPU: other sums in another order, in float32 on both sides.
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


@pytest.mark.parametrize("ops", ["reference", "triton"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_on_a_quantized_base_an_adapter_adds_no_error_of_its_own(
    quantize: str, ops: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder("llama")
    dense = dequantized_twin(folder, Quantization(quantize), torch.bfloat16)
    flags = {"quantize": quantize, "dtype": "bfloat16", "device": "cuda", "ops": ops}
    with serve_kinds(folder, dense, QUANTIZED_KINDS, tmp_path, strength=REAL_STRENGTH, **flags) as case:
        errors = case.overall_errors()
    limit = 1.5 * errors.pop(None)
    assert {name: error for name, error in errors.items() if not error <= limit} == {}


@pytest.mark.parametrize("ops", ["reference", "triton"])
def test_on_4_bit_weights_that_triton_multiplies_an_adapter_adds_no_error_of_its_own(
    ops: str, wide_llama: Path, tmp_path: Path
) -> None:
    """In 16 bits, and in recorded steps with --ops triton."""
    dense = dequantized_twin(wide_llama, Quantization.NF4, torch.bfloat16)
    flags = {"quantize": "nf4", "dtype": "bfloat16", "device": "cuda", "ops": ops, "four_bit_products": "triton"}
    with serve_kinds(wide_llama, dense, QUANTIZED_KINDS, tmp_path, strength=REAL_STRENGTH, **flags) as case:
        errors = case.overall_errors()
    limit = 1.5 * errors.pop(None)
    assert {name: error for name, error in errors.items() if not error <= limit} == {}


@pytest.mark.parametrize("ops", ["reference", "triton"])
def test_a_mixed_batch_answers_as_each_request_alone(ops: str, tiny_llama: Path, tmp_path: Path) -> None:
    dense = dense_model(tiny_llama)
    for seed, kind in enumerate(KINDS):
        make_adapter(dense, kind, tmp_path / "adapters" / kind, seed)
    flags = {"adapters": str(tmp_path / "adapters"), "max_sequences": "20", "max_batch_tokens": "64"}
    with serving(tiny_llama, tmp_path, **flags, device="cuda", ops=ops) as server:
        check_isolation(server, asks(random.Random(0)))
        check_nothing_leaks(server)


@pytest.mark.parametrize("ops", ["reference", "triton"])
def test_prompts_that_varlen_attn_computed_answer_as_pytorchs(ops: str, tiny_llama: Path, tmp_path: Path) -> None:
    """In 16 bits, beside decodes, which graphs compute with --ops triton."""
    reason = varlen_lacks()
    if reason is not None:
        pytest.skip(reason)
    params = SamplingParams(6, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE)
    dice = random.Random(1)
    sent = [Ask(None, tuple(dice.randrange(256) for _ in range(dice.choice((2, 40, 200)))), params) for _ in range(12)]
    rows = {}
    for attention in ("torch", "varlen"):
        flags = {"dtype": "bfloat16", "max_batch_tokens": "100", "attention": attention, "block_size": "256"}
        with serving(tiny_llama, tmp_path / attention, **flags, device="cuda", ops=ops) as server:
            answers = answer_all(server, sent)
        rows[attention] = torch.cat([logprob_rows(answer.prompt_logprobs[1:], VOCAB_SIZE) for answer in answers])
    # Rounding came to 0.3 on a CPU, a wrong mask to 25.
    assert (rows["varlen"] - rows["torch"]).abs().max() < 2
