"""LoReFT's interventions: the formula at the positions of the config, nowhere else, and the saved folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from examples.loreft import IGNORED, Loreft, LoreftConfig, load_loreft, masks, save_loreft

HIDDEN, LAYERS = 64, (0, 1)
Make = Callable[..., Loreft]


@pytest.fixture
def make(tiny_llama: Path) -> Make:
    """A model with interventions that change its answers much."""

    def loreft(**fields: Any) -> Loreft:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        made = Loreft(model, LoreftConfig(**({"r": 3, "layers": LAYERS} | fields))).eval()
        for intervention in made.interventions.values():
            torch.nn.init.normal_(intervention.source.weight, std=0.3)
            torch.nn.init.normal_(intervention.source.bias)
        return made

    return loreft


def prompt_and_answer(num_prompt: int = 12, num_answer: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 100, (1, num_prompt + num_answer), generator=torch.Generator().manual_seed(num_prompt))
    labels = ids.clone()
    labels[:, :num_prompt] = IGNORED
    return ids, labels


def logits(loreft: Loreft, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = loreft(input_ids=ids, labels=labels, use_cache=False).logits
    return out


def by_definition(loreft: Loreft, ids: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Logits with h + R (W h + b - R^T h) written after each layer, one position at a time."""
    model = AutoModelForCausalLM.from_pretrained(loreft.model.config._name_or_path, dtype=torch.float32).eval()

    def edit(layer: int) -> Callable[..., torch.Tensor]:
        intervention = loreft.interventions[f"{layer}_all"]
        w, b, r = intervention.source.weight, intervention.source.bias, intervention.rotation.weight

        def hook(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
            states = states.clone()
            for i in positions:
                h = states[0, i]
                states[0, i] = h + r @ (w @ h + b - r.T @ h)
            return states

        return hook

    for layer in LAYERS:
        model.model.layers[layer].register_forward_hook(edit(layer))
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits
    return out


def test_the_first_and_last_tokens_of_the_prompt_are_edited_and_no_others(make: Make) -> None:
    loreft = make(positions="f2+l3")
    ids, labels = prompt_and_answer()
    expected = by_definition(loreft, ids, [0, 1, 9, 10, 11])
    assert (logits(loreft, ids, labels) - expected).abs().max() < 1e-5
    assert (expected - by_definition(loreft, ids, [])).abs().max() > 0.01


def test_without_positions_every_token_behind_the_prompt_is_edited_and_no_other(make: Make) -> None:
    loreft = make(positions=None)
    ids, labels = prompt_and_answer(12, 5)
    expected = by_definition(loreft, ids, [12, 13, 14, 15, 16])
    assert (logits(loreft, ids, labels) - expected).abs().max() < 1e-5
    assert (expected - by_definition(loreft, ids, []))[0, 12:].abs().max() > 0.01


@pytest.mark.parametrize(
    ("positions", "length", "edited"),
    [
        ("f2+l2", 6, [0, 1, 4, 5]),
        ("f4+l4", 5, [0, 1, 3, 4]),
        ("f4+l4", 1, []),
        ("f3", 6, [0, 1, 2]),
        ("l1", 6, [5]),
    ],
)
def test_a_short_prompt_gives_each_end_half_of_it_at_most(positions: str, length: int, edited: list[int]) -> None:
    config = LoreftConfig(r=1, layers=(0,), positions=positions)
    (mask,) = masks(config, torch.tensor([length]), torch.arange(8)[None]).values()
    assert mask[0].nonzero().flatten().tolist() == edited


def test_an_untrained_intervention_changes_nothing(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids, labels = prompt_and_answer()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    untrained = Loreft(model, LoreftConfig(r=3, layers=LAYERS)).eval()
    assert (logits(untrained, ids, labels) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["f4+l4", None])
def test_rows_of_a_padded_batch_are_edited_each_by_its_own_prompt(make: Make, positions: str | None) -> None:
    loreft = make(positions=positions)
    rows = [prompt_and_answer(12, 5), prompt_and_answer(6, 3)]
    length = max(ids.shape[1] for ids, _ in rows)
    padded = [
        torch.cat([torch.nn.functional.pad(row[k], (0, length - row[k].shape[1]), value=fill) for row in rows])
        for k, fill in ((0, 0), (1, IGNORED))
    ]
    together = logits(loreft, *padded)
    for i, (ids, labels) in enumerate(rows):
        assert (together[i, : ids.shape[1]] - logits(loreft, ids, labels)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["f4+l4", None])
@pytest.mark.parametrize("num_prompt", [7, 1])
def test_generation_edits_what_one_whole_pass_does_also_beside_a_longer_prompt(
    make: Make, positions: str | None, num_prompt: int
) -> None:
    loreft = make(positions=positions)
    long, short = prompt_and_answer(12, 0)[0], prompt_and_answer(num_prompt, 0)[0]
    alone = loreft.generate(
        input_ids=short, attention_mask=torch.ones_like(short), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    batch = torch.cat([long, torch.nn.functional.pad(short, (12 - num_prompt, 0))])
    mask = torch.ones_like(batch)
    mask[1, : 12 - num_prompt] = 0
    both = loreft.generate(input_ids=batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(both[1, 12:], alone[0, num_prompt:])
    for i in range(6):  # each token is the best one of a whole pass over what is there so far
        ids = alone[:, : num_prompt + i]
        labels = torch.full_like(alone[:, : num_prompt + 1 + i], IGNORED)
        labels[:, num_prompt:] = 0
        ahead = logits(loreft, torch.cat([ids, ids[:, :1]], dim=1), labels)[0, num_prompt - 1 + i]
        assert int(ahead.argmax()) == int(alone[0, num_prompt + i])


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"share_weights": True}, {"all"}),
        ({"share_weights": False}, {"prefix", "suffix"}),
        ({"share_weights": False, "positions": "l2"}, {"all"}),
        ({"positions": None}, {"all"}),
    ],
)
def test_what_is_saved_can_be_loaded_and_answers_the_same(
    make: Make, fields: dict[str, Any], parts: set[str], tmp_path: Path, tiny_llama: Path
) -> None:
    loreft = make(**fields)
    save_loreft(loreft, tmp_path, "demo/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOREFT"
    assert config["layers"] == [0, 1]
    assert (config["positions"] is None) == (config["applies_to"] == "generated")
    assert config["positions"] == loreft.config.positions
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {
        f"layers.{layer}.{part}.{name}"
        for layer in LAYERS
        for part in parts
        for name in ("weight", "bias", "rotate_layer")
    }
    for name, tensor in tensors.items():
        shapes = {"weight": (3, HIDDEN), "bias": (3,), "rotate_layer": (HIDDEN, 3)}
        assert (tensor.dtype, tensor.shape) == (torch.float32, shapes[name.rpartition(".")[2]])
    loaded = load_loreft(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tmp_path).eval()
    batch = prompt_and_answer()
    assert (logits(loaded, *batch) - logits(loreft, *batch)).abs().max() < 1e-5


def test_what_was_halved_since_can_be_loaded_too(make: Make, tmp_path: Path, tiny_llama: Path) -> None:
    loreft = make()
    save_loreft(loreft, tmp_path, "demo/base")
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: t.half() for key, t in load_file(weights).items()}, weights)
    loaded = load_loreft(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tmp_path).eval()
    expected = logits(loreft, *prompt_and_answer())
    difference = (logits(loaded, *prompt_and_answer()) - expected).abs().max()
    assert difference / expected.abs().max() < 2e-3  # float16 has 11 bits


def test_training_moves_the_interventions_and_keeps_them_orthonormal(make: Make) -> None:
    loreft = make().train()
    base = {name: p.clone() for name, p in loreft.model.named_parameters()}
    trained = [p for p in loreft.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    ids, labels = prompt_and_answer()
    losses = []
    for _ in range(10):
        loss = loreft(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in loreft.model.named_parameters())
    for intervention in loreft.interventions.values():
        rotation = intervention.rotation.weight
        assert (rotation.T @ rotation - torch.eye(3)).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["", "g4", "f", "l4+f4", "f4l4x"])
def test_positions_that_say_nothing_are_refused(positions: str) -> None:
    with pytest.raises(ValueError, match="must be like"):
        LoreftConfig(r=1, layers=(0,), positions=positions)
