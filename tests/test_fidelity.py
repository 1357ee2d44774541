"""Law 2: what the running engine computes with an adapter equals PEFT with that adapter alone on the dense base.

All adapters of an architecture answer in one batch, their prompts in chunks beside each other's decodes. What is
compared is the whole distribution at every position, prompt and output.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from server.adapters.methods import discover
from server.model.quantize import Quantization
from tests.adapters.peft_adapters import (
    BIASED_KINDS,
    KINDS,
    LINEAR_KINDS,
    LLAMA_KINDS,
    OWN_KINDS,
    SAVED_KINDS,
    SEQUENCE_KINDS,
)
from tests.adapters.reft import KINDS as REFT_KINDS
from tests.fidelity import DEFAULTS, dense_model, dequantized_twin, serve_kinds
from tests.models import ARCHITECTURES

# Where an architecture differs from another of the list by its attention and norms only.
_MAIN = (
    "lora", "lora-wide", "lora-patterns", "lora-bias-of-b", "lora-embedding-and-head", "rslora", "dora",
    "dora-embedding-and-head", "vera", "vera-drawn", "ia3", "ia3-attention",
)  # fmt: skip
_OF_SEQUENCES = (*SEQUENCE_KINDS, *REFT_KINDS)
_LORA_BIASES = tuple(kind for kind in BIASED_KINDS if "oft" not in kind)  # PEFT has no OFT on GPT-2's modules
KINDS_OF: Mapping[str, tuple[str, ...]] = {
    "llama": (*KINDS, *LINEAR_KINDS, *OWN_KINDS, *BIASED_KINDS, *LLAMA_KINDS, *DEFAULTS, *_OF_SEQUENCES, *SAVED_KINDS),
    "mistral": (*_MAIN, *DEFAULTS),
    "qwen2": (*_MAIN, *BIASED_KINDS, *DEFAULTS),
    "qwen3": (*KINDS, *LINEAR_KINDS, *OWN_KINDS, *DEFAULTS),
    "gemma2": (*_MAIN, *DEFAULTS, *_OF_SEQUENCES, *SAVED_KINDS),
    "gemma3": (*_MAIN, *DEFAULTS),
    "phi3": (*KINDS, *LINEAR_KINDS, *OWN_KINDS, *_OF_SEQUENCES, *SAVED_KINDS),  # PEFT has no defaults for it
    "gpt2": (*KINDS, *_LORA_BIASES, *DEFAULTS, *_OF_SEQUENCES),
    "opt": (*_MAIN, *BIASED_KINDS, *DEFAULTS),
    "gpt_neox": (*_MAIN, *BIASED_KINDS, *DEFAULTS),
    # PEFT's own defaults match nothing in these.
    "mixtral": _MAIN,
    "qwen3_moe": _MAIN,
}
QUANTIZED_KINDS = ("lora", "dora", "vera", "ia3", "lora-wide", "rslora", "lora-bias-of-b", "dora-patterns")
# All of them where linears differ (biases, fused, transposed, none of these); a kind of each method elsewhere.
LINEARS_DIFFER = ("llama", "qwen3", "phi3", "gpt2")
# Of the methods with ops beside the normal form, where q, k and v are one product and where they are three.
OP_KINDS: Mapping[str, tuple[str, ...]] = dict.fromkeys(("llama", "phi3"), ("road", "oft", "lokr"))
QUANTIZED_KINDS_OF = {
    name: QUANTIZED_KINDS[: 8 if name in LINEARS_DIFFER else 4] + OP_KINDS.get(name, ()) for name in KINDS_OF
}
# In float32, where nothing but the adapters' own arithmetic is left: every method, fused and unfused.
_EVERY_METHOD = (*QUANTIZED_KINDS, "adalora", *LINEAR_KINDS, *OWN_KINDS, *_OF_SEQUENCES, *SAVED_KINDS)
EXACT_KINDS_OF = QUANTIZED_KINDS_OF | dict.fromkeys(("llama", "phi3"), _EVERY_METHOD)
# Where 16-bit rounding may send a token to another expert, an error says nothing about adapters.
HAS_EXPERTS = ("mixtral", "qwen3_moe")
REAL_STRENGTH = (
    0.2  # an adapter's part of a layer's output is then about a quarter of the base's; trained ones add less
)


@pytest.mark.parametrize("architecture", list(KINDS_OF))
def test_every_kind_in_one_batch_equals_peft_alone(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = dense_model(model_folder(architecture))
    with serve_kinds(model_folder(architecture), dense, KINDS_OF[architecture], tmp_path) as case:
        answers = case.answers()
        errors = {name: case.relative_error(name, *found) for name, found in answers.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_every_architecture_is_compared() -> None:
    assert KINDS_OF.keys() == ARCHITECTURES.keys()


def test_every_method_is_among_the_kinds() -> None:
    """A method file without test data here is not served with a promise."""
    named = {kind.split("-")[0] for kind in (*KINDS, *LINEAR_KINDS, *OWN_KINDS, *_OF_SEQUENCES, *SAVED_KINDS)}
    named.add("bottleneck")  # whose reference is another library's forward: test_bottleneck.py
    assert {method.name for method in discover()} <= named


@pytest.mark.parametrize("architecture", [name for name in KINDS_OF if name not in HAS_EXPERTS])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_on_a_quantized_base_an_adapter_adds_no_error_of_its_own(
    quantize: str, architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bare base (slot 0) differs from its dense twin by what quantized products round; adapters by little more."""
    folder = model_folder(architecture)
    dense = dequantized_twin(folder, Quantization(quantize), torch.bfloat16)
    flags = {"quantize": quantize, "dtype": "bfloat16"}
    kinds = QUANTIZED_KINDS_OF[architecture]
    with serve_kinds(folder, dense, kinds, tmp_path, strength=REAL_STRENGTH, **flags) as case:
        errors = case.overall_errors(num_prompts=4 if architecture in LINEARS_DIFFER else 2)
    limit = 1.5 * errors.pop(None)
    assert 0 < limit < 0.1
    assert {name: error for name, error in errors.items() if not error <= limit} == {}


@pytest.mark.parametrize("architecture", list(KINDS_OF))
def test_nf4_in_float32_is_as_exact_as_the_dense_base(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Then the product dequantizes the very same values, so nothing is left to excuse an error with."""
    folder = model_folder(architecture)
    dense = dequantized_twin(folder, Quantization.NF4, torch.float32)
    with serve_kinds(folder, dense, EXACT_KINDS_OF[architecture], tmp_path, quantize="nf4") as case:
        errors = {name: case.relative_error(name, *found) for name, found in case.answers().items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
