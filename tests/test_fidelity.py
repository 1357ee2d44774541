"""Law 2: what the running engine computes with an adapter equals PEFT with that adapter alone on the dense base.

All adapters of an architecture answer in one batch, their prompts in chunks beside each other's decodes. What is
compared is the whole distribution at every position, prompt and output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.adapters.methods import discover
from server.assemble import Server
from server.engine.sequence import SamplingParams
from server.model.quantize import Quantization, dequantized_weight, is_quantized, quantization_config
from tests.adapters.peft_adapters import BIASED_KINDS, KINDS, LLAMA_KINDS, make_adapter, peft_logits
from tests.models import VOCAB_SIZE
from tests.serving import Answer, Ask, answer_all, logprob_rows, serving

KINDS_OF: Mapping[str, tuple[str, ...]] = {
    "llama": (*KINDS, *BIASED_KINDS, *LLAMA_KINDS),
    "qwen3": tuple(KINDS),
    "phi3": tuple(KINDS),
    # bias="all" of GPT-2 trains the biases of its norms, which are no sites yet: refused by name.
    "gpt2": (*KINDS, "lora-bias-only", "dora-bias-only"),
}
QUANTIZED_KINDS = ("lora", "lora-wide", "rslora", "dora", "vera", "ia3", "lora-bias-of-b", "dora-patterns")
REAL_STRENGTH = (
    0.2  # an adapter's part of a layer's output is then about a quarter of the base's; trained ones add less
)
NUM_NEW_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Case:
    """A served model with an adapter of each kind, and the dense model that PEFT answers on."""

    server: Server
    dense: PreTrainedModel
    folders: Mapping[str, Path]

    def answers(self) -> dict[str | None, tuple[tuple[int, ...], Answer]]:
        """(prompt, answer) of the base and of every adapter, all in flight at once, with prompts of all lengths."""
        generator = torch.Generator().manual_seed(5)
        names = [None, *self.folders]
        lengths = [3 + 11 * (number % 5) for number in range(len(names))]
        return self._ask(names, [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths])

    def overall_errors(self) -> dict[str | None, float]:
        """By adapter: norm of the error over norm of the log-probabilities, all on the same four prompts."""
        prompts = torch.randint(0, 256, (4, 60), generator=torch.Generator().manual_seed(5)).tolist()
        names = [None, *self.folders]
        squares = dict.fromkeys(names, (0.0, 0.0))
        for prompt in prompts:
            found = self._ask(names, [prompt] * len(names))
            for name in names:
                actual, expected = self._log_probabilities(name, *found[name])
                error, scale = (actual - expected).square().sum().item(), expected.square().sum().item()
                squares[name] = (squares[name][0] + error, squares[name][1] + scale)
        return {name: (error / scale) ** 0.5 for name, (error, scale) in squares.items()}

    def relative_error(self, name: str | None, prompt: tuple[int, ...], got: Answer) -> float:
        """Largest difference of log-probabilities over their scale, all positions of prompt and output."""
        actual, expected = self._log_probabilities(name, prompt, got)
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    def _ask(
        self, names: Sequence[str | None], prompts: Sequence[list[int]]
    ) -> dict[str | None, tuple[tuple[int, ...], Answer]]:
        params = SamplingParams(
            NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE
        )
        asks = [Ask(name, tuple(prompt), params) for name, prompt in zip(names, prompts, strict=True)]
        return {ask.adapter: (ask.prompt, got) for ask, got in zip(asks, answer_all(self.server, asks), strict=True)}

    def _log_probabilities(
        self, name: str | None, prompt: tuple[int, ...], got: Answer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(served, PEFT's), each (positions, vocabulary) float64; the first position has none."""
        assert got.error is None
        ids = torch.tensor([[*prompt, *got.token_ids]])
        if name is None:
            with torch.no_grad():
                logits = self.dense(input_ids=ids).logits
        else:
            logits = peft_logits(self.dense, self.folders[name], ids)
        expected = torch.log_softmax(logits[0, :-1].double(), dim=-1)
        return logprob_rows([*got.prompt_logprobs[1:], *got.logprobs], VOCAB_SIZE).double(), expected


@contextmanager
def serve_kinds(
    model: Path,
    dense: PreTrainedModel,
    kinds: tuple[str, ...],
    scratch: Path,
    *,
    strength: float = 1.0,
    **flags: str,
) -> Iterator[Case]:
    folders = {
        kind: make_adapter(dense, kind, scratch / "adapters" / kind, seed, strength) for seed, kind in enumerate(kinds)
    }
    extra = {"adapters": str(scratch / "adapters"), "max_sequences": "24", "max_batch_tokens": "50"}
    with serving(model, scratch, **extra, **flags) as server:
        yield Case(server, dense, folders)


@pytest.mark.parametrize("architecture", list(KINDS_OF))
def test_every_kind_in_one_batch_equals_peft_alone(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(model_folder(architecture), dtype=torch.float32).eval()
    with serve_kinds(model_folder(architecture), dense, KINDS_OF[architecture], tmp_path) as case:
        answers = case.answers()
        errors = {name: case.relative_error(name, *found) for name, found in answers.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_every_method_is_among_the_kinds() -> None:
    """A method file without test data here is not served with a promise."""
    named = {kind.split("-")[0] for kind in KINDS}
    assert {method.name for method in discover()} <= named


@pytest.mark.parametrize("architecture", list(KINDS_OF))
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_on_a_quantized_base_an_adapter_adds_no_error_of_its_own(
    quantize: str, architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bare base (slot 0) differs from its dense twin by what quantized products round; adapters by little more."""
    folder = model_folder(architecture)
    dense = dequantized_twin(folder, Quantization(quantize), torch.bfloat16)
    flags = {"quantize": quantize, "dtype": "bfloat16"}
    with serve_kinds(folder, dense, QUANTIZED_KINDS, tmp_path, strength=REAL_STRENGTH, **flags) as case:
        errors = case.overall_errors()
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
    with serve_kinds(folder, dense, QUANTIZED_KINDS, tmp_path, quantize="nf4") as case:
        errors = {name: case.relative_error(name, *found) for name, found in case.answers().items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def dequantized_twin(folder: Path, quantization: Quantization, dtype: torch.dtype) -> PreTrainedModel:
    """The dense float32 model whose linears hold the values that the quantized ones of a base in `dtype` stand for."""
    config = quantization_config(quantization, dtype)
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float().eval()
    for path, module in quantized.named_modules():
        if is_quantized(module):
            plain = dense.get_submodule(path)
            values = dequantized_weight(module).float()
            plain.weight.data = (values.T if isinstance(plain, Conv1D) else values).clone()
    return dense
