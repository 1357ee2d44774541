"""A pass through the modules of a decoder: what transformers' own way around them gives, in every kind of step."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.model.base import Base
from server.model.decoder_pass import DecoderPasses
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.models import VOCAB_SIZE

OF_THIS_KIND = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


def load(folder: Path, ops: str = "auto") -> Base:
    return Base.load(BaseOptions(str(folder), Quantization.NONE, torch.float32, ops=ops))


def rows_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def is_replaced(base: Base) -> bool:
    return "forward" in vars(base.model)


def with_stock_pass(base: Base) -> None:
    del vars(base.model)["forward"]


@pytest.mark.parametrize("ops", ["reference", "native"])
@pytest.mark.parametrize("architecture", OF_THIS_KIND)
def test_prefills_and_decodes_give_what_the_model_does(
    architecture: str, ops: str, model_folder: Callable[[str], Path]
) -> None:
    base = load(model_folder(architecture), ops)
    rows, is_native = rows_of(7, 4), ops == "native"
    assert is_replaced(base)
    found = base._probe(rows), base._decode_probe(rows, is_native=is_native)
    with_stock_pass(base)
    expected = base._probe(rows), base._decode_probe(rows, is_native=is_native)
    for ours, own in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=0)


def test_only_the_rows_that_are_kept_get_logits(model_folder: Callable[[str], Path]) -> None:
    base = load(model_folder("llama"))
    (row,), given = rows_of(6), list[torch.Tensor]()
    forward = base.forward

    def some_rows(ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, context: Any) -> torch.Tensor:
        given.extend((forward(ids, positions, keep, context), forward(ids, positions, keep[[1, 4]], context)))
        return given[-1]

    base.forward = some_rows  # type: ignore[method-assign]
    base._probe([row])
    whole, some = given
    assert some.shape == (2, VOCAB_SIZE)
    torch.testing.assert_close(some, whole[[1, 4]])


def test_a_call_that_is_no_packed_pass_is_the_models_own(model_folder: Callable[[str], Path]) -> None:
    base = load(model_folder("llama"))
    model: Any = base.model
    model.set_attn_implementation("eager")
    row = rows_of(5)[0]
    with torch.inference_mode():
        out = model(input_ids=row[None], use_cache=False, output_hidden_states=True)
    assert len(out.hidden_states) == base.num_layers + 1


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_models_of_other_code_are_left_alone(architecture: str, model_folder: Callable[[str], Path]) -> None:
    assert not is_replaced(load(model_folder(architecture)))


def test_a_pass_that_differs_is_not_taken(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = DecoderPasses._forward_of

    def other(self: DecoderPasses, module: Any) -> Callable[..., Any]:
        forward = stock(self, module)

        def doubled(**options: Any) -> Any:
            out = forward(**options)
            out.logits = out.logits * 2
            return out

        return doubled

    monkeypatch.setattr(DecoderPasses, "_forward_of", other)
    with caplog.at_level(logging.WARNING):
        base = load(model_folder("llama"))
    assert "with fewer operators it differs" in caplog.text
    assert not is_replaced(base)
