"""RoPE by length: the rule, the frequencies against transformers' own module, and what is refused.

That served answers equal transformers' generation is in `tests/test_length_rope.py`.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from server.ground.errors import StartupRefused
from server.model.context import AttentionBatch, Scope, StepContext
from server.model.rope import RopeRule, attach_rope
from server.ops import TokenLayout

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 2.0,
    "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "dynamic": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=DYNAMIC),
    "longrope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LONGROPE),
    "phi3": lambda: transformers.Phi3Config(**SMALL, original_max_position_embeddings=32, rope_parameters=LONGROPE),
}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def step(rope_lengths: list[int]) -> StepContext:
    nothing = torch.zeros(len(rope_lengths), dtype=torch.long)
    layout = TokenLayout(nothing, len(rope_lengths), ())
    attention = AttentionBatch(nothing, nothing, None, 0, ())
    return StepContext(attention, layout, layout, None, rope_lengths=torch.tensor(rope_lengths))


# The rule


def test_a_prompt_has_its_length_and_an_output_token_its_place() -> None:
    rule = RopeRule(None, 100)
    assert rule.lengths(num_prompt_tokens=5, num_tokens=5, start=2, stop=5) == [5, 5, 5]
    assert rule.lengths(num_prompt_tokens=5, num_tokens=8, start=7, stop=8) == [8]
    # A preempted sequence computes its output again, and gets what it had.
    assert rule.lengths(num_prompt_tokens=5, num_tokens=8, start=0, stop=8) == [5, 5, 5, 5, 5, 6, 7, 8]
    assert not rule.is_stale(num_prompt_tokens=5, num_computed_tokens=7)


def test_where_the_cache_is_computed_again_all_tokens_have_the_number_that_is_known() -> None:
    rule = RopeRule(32, 64)
    assert rule.lengths(num_prompt_tokens=5, num_tokens=8, start=0, stop=3) == [8, 8, 8]
    assert [rule.is_stale(5, computed) for computed in (31, 32, 33)] == [False, True, False]
    assert not rule.is_stale(num_prompt_tokens=33, num_computed_tokens=32)  # long from its beginning


# The frequencies


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_each_token_has_the_angles_that_its_sequence_has_alone(kind: str) -> None:
    model = model_of(MODELS[kind]())
    rotary = model.get_submodule("model.rotary_emb")
    untouched = copy.deepcopy(rotary)
    scope = Scope()
    attach_rope(model, "tiny", scope)
    lengths = [9, 32, 33, 64, 65, 100, 7]  # a long one between short ones
    x = torch.zeros(1, 1)
    rows = [torch.tensor([[0, length // 2, length - 1]]) for length in lengths]
    with scope.enter(step([length for length in lengths for _ in range(3)])):
        packed = rotary(x, torch.cat(rows, dim=1))
    alone = [copy.deepcopy(untouched)(x, row) for row in rows]
    for actual, expected in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.cat(expected, dim=1), rtol=0, atol=2e-5)


def test_outside_of_a_step_the_module_is_transformers_own() -> None:
    model = model_of(MODELS["longrope"]())
    rotary = model.get_submodule("model.rotary_emb")
    expected = copy.deepcopy(rotary)(torch.zeros(1, 1), torch.arange(40)[None])
    attach_rope(model, "tiny", Scope())
    actual = rotary(torch.zeros(1, 1), torch.arange(40)[None])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("dynamic", RopeRule(None, 128)), ("longrope", RopeRule(None, 64)), ("phi3", RopeRule(32, 64))],
)
def test_the_rule_follows_the_model(kind: str, rule: RopeRule) -> None:
    """NTK scaling reads its factor beyond the trained context; longrope's config names the stretched one itself."""
    assert attach_rope(model_of(MODELS[kind]()), "tiny", Scope()) == rule


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}], ids=str)
def test_a_rope_that_asks_for_no_length_is_left_alone(rope: dict[str, Any] | None) -> None:
    model = model_of(transformers.LlamaConfig(**SMALL, rope_parameters=rope))
    assert attach_rope(model, "tiny", Scope()) is None
    assert "forward" not in vars(model.get_submodule("model.rotary_emb"))


# Refused by name


def phimoe() -> PreTrainedModel:
    """Scales its angles by the longest sequence in a forward of its own."""
    rope = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.2}
    return model_of(transformers.PhimoeConfig(**SMALL, num_local_experts=2, rope_parameters=rope))


def phi3_dynamic() -> PreTrainedModel:
    config = transformers.Phi3Config(**SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=32)
    model = model_of(config)
    model.get_submodule("model.rotary_emb").rope_type = "dynamic"
    return model


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            phimoe,
            "tiny: PhimoeRotaryEmbedding computes RoPE of type 'longrope' in a way of its own.*; use a checkpoint",
        ),
        (phi3_dynamic, "tiny: RoPE of type 'dynamic' in a model of type 'phi3' is not served; use a checkpoint with"),
    ],
)
def test_what_cannot_be_computed_by_length_is_refused(model: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(StartupRefused, match=sentence):
        attach_rope(model(), "tiny", Scope())
