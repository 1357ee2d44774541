"""Delta-LoRA, trained with its weights really moved, is the same model when the base that never moved serves it."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from examples.delta_lora import DeltaLoraConfig, save_delta_lora, train_delta_lora
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from tests.adapters.dense import edited_logits, sites_of

IDS = torch.tensor([[1, 5, 9, 94, 3, 22, 47, 8], [7, 7, 2, 60, 61, 62, 0, 33]])
NUM_STEPS = 12
TARGETS = ("q_proj", "v_proj", "down_proj")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1,
            )
        ).eval()  # fmt: skip


def batches() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        ids = torch.randint(0, 96, (4, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def trained(base: PreTrainedModel, config: DeltaLoraConfig) -> PreTrainedModel:
    model = copy.deepcopy(base)
    train_delta_lora(model, batches(), config, on_step=lambda step, loss: None)
    return model


def served(base: PreTrainedModel, model: PreTrainedModel, config: DeltaLoraConfig, folder: Path) -> Lowered:
    save_delta_lora(model, config, folder)
    return lower(Checkpoint.open(folder), sites_of(base))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("start_step", "rank"), [(0, 4), (5, 8), (NUM_STEPS + 3, 8)])
def test_the_telescoped_adapter_is_the_model_whose_weights_were_moved(
    start_step: int, rank: int, base: PreTrainedModel, tmp_path: Path
) -> None:
    config = DeltaLoraConfig(TARGETS, r=4, lora_alpha=8, delta_lambda=1.5, start_step=start_step, learning_rate=0.02)
    model = trained(base, config)
    moved = model.get_parameter(f"{Q}.linear.weight") - base.get_parameter(f"{Q}.weight")
    assert (float(moved.detach().abs().max()) > 0.01) == (start_step < NUM_STEPS)
    adapter = served(base, model, config, tmp_path)
    assert (adapter.method, adapter.rank, len(adapter.edits)) == ("delta_lora", rank, 2 * len(TARGETS))
    assert difference(edited_logits(base, adapter.edits, IDS), logits(model)) < 1e-5
    assert difference(logits(base), logits(model)) > 1e-2, "training changed nothing, so the comparison says nothing"


def test_what_moved_the_weights_matters(base: PreTrainedModel, tmp_path: Path) -> None:
    """The pair alone, without the movement, is another model: lambda is no detail."""
    config = DeltaLoraConfig(TARGETS, r=4, lora_alpha=8, delta_lambda=1.5, learning_rate=0.02)
    still = DeltaLoraConfig(TARGETS, r=4, lora_alpha=8, delta_lambda=0.0, learning_rate=0.02)
    model = trained(base, config)
    adapter = served(base, model, still, tmp_path)
    assert difference(edited_logits(base, adapter.edits, IDS), logits(model)) > 1e-2


def test_the_loss_is_told_and_falls_on_what_is_repeated(base: PreTrainedModel) -> None:
    told: list[tuple[int, float]] = []
    config = DeltaLoraConfig(TARGETS, learning_rate=0.02)
    model = copy.deepcopy(base)
    train_delta_lora(model, [next(batches())] * 8, config, on_step=lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == list(range(1, 9))
    assert told[-1][1] < told[0][1]


def test_the_pair_of_the_start_is_saved_only_where_it_is_needed(base: PreTrainedModel, tmp_path: Path) -> None:
    config = DeltaLoraConfig(("q_proj",), r=2)
    save_delta_lora(trained(base, config), config, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.removeprefix(f"{Q}.") for key in keys if key.startswith(Q)} == {"lora_A.weight", "lora_B.weight"}


def test_a_base_of_16_bits_is_not_trained(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is not float32. Load the base with dtype"):
        train_delta_lora(copy.deepcopy(base).bfloat16(), batches(), DeltaLoraConfig(("q_proj",)), lambda *_: None)
    with pytest.raises(ValueError, match="No linear module of this model is named fc1"):
        train_delta_lora(copy.deepcopy(base), batches(), DeltaLoraConfig(("fc1",)), lambda *_: None)
