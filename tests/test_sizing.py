"""What the settings and a config say of a base before it is loaded, and what the loaded base says then."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server import sizing
from server.ground.config import load
from server.model.base import Base
from server.ops.prefill import PrefillNeeds
from server.ops.prefill.choice import CANDIDATES
from server.sizing import base_options, expected_needs, expected_plan, prefill_needs
from tests.models import VOCAB_SIZE, WINDOW


def settings_of(model: Path, tmp_path: Path, **flags: str):  # type: ignore[no-untyped-def]
    given = {"model": str(model), "store": str(tmp_path / "store"), "quantize": "none", "device": "cpu"}
    return load(given | {"dtype": "float32"} | flags)


def needs_of(model: Path, tmp_path: Path, **flags: str) -> PrefillNeeds:
    settings = settings_of(model, tmp_path, **flags)
    return expected_needs(settings, base_options(settings))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 128),
        ({"block_size": "64"}, 64),
        ({"attention": "varlen"}, 256),
        ({"attention": "varlen", "block_size": "64"}, 64),
        ({"attention": "flashinfer"}, 128),
        ({"attention": "varlen", "max_context": "100"}, 104),
    ],
    ids=str,
)
def test_blocks_are_as_large_as_the_library_for_attention_reads(
    flags: dict[str, str], expected: int, tiny_llama: Path, tmp_path: Path
) -> None:
    assert needs_of(tiny_llama, tmp_path, **flags).block_size == expected
    settings = settings_of(tiny_llama, tmp_path, **flags)
    plan = expected_plan(settings, base_options(settings))
    assert plan is not None
    assert plan.needs.block_tokens == expected


def test_recorded_steps_are_given_room_for_the_logits_that_each_keeps(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: 1 and 2 sequences, with adapters and without."""
    monkeypatch.setattr(sizing, "makes_graphs", lambda settings, device: True)
    found = []
    for max_sequences in ("1", "2"):
        settings = settings_of(tiny_llama, tmp_path, max_sequences=max_sequences)
        plan = expected_plan(settings, base_options(settings))
        assert plan is not None
        found.append(plan.needs.graph_bytes)
    assert found[1] - found[0] == 2 * 2 * VOCAB_SIZE * torch.float32.itemsize


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "phi3"])
def test_a_config_tells_of_heads_and_caps_what_the_loaded_base_does(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder(architecture)
    base = Base.load(base_options(settings_of(folder, tmp_path)))
    found, (expected,) = prefill_needs(base, 128), needs_of(folder, tmp_path).layers
    told = {(layer.num_heads, layer.kv_heads, layer.width, layer.softcap) for layer in found.layers}
    assert told == {(expected.num_heads, expected.kv_heads, expected.width, expected.softcap)}
    assert (found.device, found.dtype, found.block_size) == (torch.device("cpu"), torch.float32, 128)
    windows = {layer.window for layer in found.layers}
    assert windows == {
        "llama": {None}, "mistral": {WINDOW}, "gemma2": {WINDOW, None}, "gemma3": {WINDOW, None}, "gpt2": {None},
        "phi3": {None},
    }[architecture]  # fmt: skip


def test_what_flashinfer_holds_is_in_the_memory_plan(tiny_llama: Path, tmp_path: Path) -> None:
    plans = []
    for attention in ("torch", "flashinfer"):
        settings = settings_of(tiny_llama, tmp_path, attention=attention)
        plans.append(expected_plan(settings, base_options(settings)))
    assert None not in plans
    without, with_it = (plan.needs.workspace_bytes for plan in plans if plan is not None)
    assert with_it - without == (128 << 20) + 2 * ((8 << 20) + (128 << 10))


def test_each_library_is_a_choice_of_the_flag(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("auto", "torch", *CANDIDATES):
        assert settings_of(tiny_llama, tmp_path, attention=name).attention == name
