"""What the fidelity tests stand on: a served model with adapters, the dense model that PEFT answers on, and the error.

What is compared is the whole distribution at every position, prompt and output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.assemble import Server
from server.engine.sequence import SamplingParams
from server.model.quantize import Quantization, dequantized_weight, is_quantized, quantization_config
from tests.adapters.peft_adapters import INVOCATION, make_adapter, peft_logits, save_trained
from tests.adapters.reft import KINDS as REFT_KINDS
from tests.adapters.reft import make_reft, reft_logits
from tests.models import VOCAB_SIZE
from tests.serving import Answer, Ask, answer_all, logprob_rows, serving

NUM_NEW_TOKENS = 6

# Adapters with the target_modules (and IA3's feedforward_modules) that PEFT itself chooses for an architecture.
DEFAULTS: Mapping[str, Callable[[], PeftConfig]] = {
    "lora-defaults": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=7),
    "ia3-defaults": lambda: IA3Config(task_type="CAUSAL_LM"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A served model with an adapter of each kind, and the dense model that PEFT answers on."""

    server: Server
    dense: PreTrainedModel
    folders: Mapping[str, Path]

    def answers(self) -> dict[str | None, tuple[tuple[int, ...], Answer]]:
        """(prompt, answer) of the base and of every adapter, all in flight at once, with prompts of all lengths.

        Those of the base and of one more are longer than a block of the cache; most, than the windows of the models
        that have one.
        """
        generator = torch.Generator().manual_seed(5)
        names = [None, *self.folders]
        lengths = [140 if number % 20 == 0 else 3 + 11 * (number % 5) for number in range(len(names))]
        prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
        return self._ask(names, [_invoking(*pair) for pair in zip(names, prompts, strict=True)])

    def overall_errors(self, num_prompts: int = 4) -> dict[str | None, float]:
        """By adapter: norm of the error over norm of the log-probabilities, all on the same prompts."""
        prompts = torch.randint(0, 256, (num_prompts, 60), generator=torch.Generator().manual_seed(5)).tolist()
        names = [None, *self.folders]
        found = [self._ask(names, [prompt] * len(names)) for prompt in prompts]
        errors = {}
        for name in names:
            actual, expected = self._log_probabilities(name, [answers[name] for answers in found])
            errors[name] = ((actual - expected).norm() / expected.norm()).item()
        return errors

    def relative_error(self, name: str | None, prompt: tuple[int, ...], got: Answer) -> float:
        """Largest difference of log-probabilities over their scale, all positions of prompt and output."""
        actual, expected = self._log_probabilities(name, [(prompt, got)])
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
        self, name: str | None, answers: Sequence[tuple[tuple[int, ...], Answer]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(served, PEFT's) for answers of one length, each (answers, positions, vocabulary) float64.

        The first position has none.
        """
        assert [got.error for _, got in answers] == [None] * len(answers)
        ids = torch.tensor([[*prompt, *got.token_ids] for prompt, got in answers])
        if name is None:
            with torch.no_grad():
                logits = self.dense(input_ids=ids).logits
        elif name in REFT_KINDS:
            logits = reft_logits(self.dense, self.folders[name], ids, len(answers[0][0]))
        else:
            logits = peft_logits(self.dense, self.folders[name], ids)
        actual = [logprob_rows([*got.prompt_logprobs[1:], *got.logprobs], VOCAB_SIZE) for _, got in answers]
        return torch.stack(actual).double(), torch.log_softmax(logits[:, :-1].double(), dim=-1)


def _invoking(name: str | None, prompt: list[int]) -> list[int]:
    """The prompt of an activated LoRA has its invocation, here twice where there is room: the last one counts."""
    if name is None or not name.startswith("alora") or len(prompt) < 2 * len(INVOCATION):
        return prompt
    middle, size = len(prompt) // 2, len(INVOCATION)
    return [*INVOCATION, *prompt[size:middle], *INVOCATION, *prompt[middle + size :]]


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
        kind: _adapter(dense, kind, scratch / "adapters" / kind, seed, strength) for seed, kind in enumerate(kinds)
    }
    extra = {"adapters": str(scratch / "adapters"), "max_sequences": "24", "max_batch_tokens": "50"}
    with serving(model, scratch, **extra, **flags) as server:
        yield Case(server, dense, folders)


def _adapter(dense: PreTrainedModel, kind: str, folder: Path, seed: int, strength: float) -> Path:
    if kind in REFT_KINDS:
        return make_reft(dense, kind, folder, seed)
    if kind in DEFAULTS:
        return save_trained(dense, DEFAULTS[kind](), folder, seed, strength)
    return make_adapter(dense, kind, folder, seed, strength)


def dense_model(folder: Path) -> PreTrainedModel:
    """The oracle. Eager, because transformers' other attentions leave out Gemma 2's cap on scores."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def dequantized_twin(folder: Path, how: Quantization | BitsAndBytesConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The dense float32 model whose linears hold the values that the quantized ones of a base in `dtype` stand for."""
    config = quantization_config(how, dtype) if isinstance(how, Quantization) else how
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    # In the dtype of the base first: its unquantized weights are rounded, too.
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    dense = dense.float().eval()
    for path, module in quantized.named_modules():
        if is_quantized(module):
            plain = dense.get_submodule(path)
            values = dequantized_weight(module).float().cpu()  # bitsandbytes' modules go to a GPU by themselves
            plain.weight.data = (values.T if isinstance(plain, Conv1D) else values).clone()
    return dense
