"""A decoder layer in one call: what its modules compute, for every kind of edit, and its modules wherever it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.engine.sequence import SamplingParams
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops import native
from tests.fidelity import dense_model, serve_kinds
from tests.models import VOCAB_SIZE
from tests.serving import Ask, answer_all, logprob_rows

WAYS = [Quantization.NF4, Quantization.NONE]
KINDS = ("lora", "lora-wide", "dora", "vera", "ia3-defaults", "lora-bias-of-b")


def load(folder: Path, quantize: Quantization) -> Base:
    if quantize is Quantization.NONE and not native.multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16")
    return Base.load(BaseOptions(str(folder), quantize, torch.bfloat16, ops="native"))


def layers_of(base: Base) -> list[nn.Module]:
    (layers,) = (module for module in base.model.modules() if isinstance(module, nn.ModuleList))
    return list(layers)


def with_stock_layers(base: Base) -> None:
    """As `DecodeLayers.remove` leaves them; the attention and the MLPs stay native."""
    for module in layers_of(base):
        forward: Any = module.forward
        names = forward.__code__.co_freevars
        module.forward = forward.__closure__[names.index("stock")].cell_contents


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each layer's call."""
    found: list[int] = []
    stock = native.DecodeLayer.__call__

    def call(self: native.DecodeLayer, x: torch.Tensor, *others: Any) -> torch.Tensor:
        found.append(x.shape[0])
        return stock(self, x, *others)

    monkeypatch.setattr(native.DecodeLayer, "__call__", call)
    return found


@pytest.mark.parametrize("quantize", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_a_decode_is_what_the_modules_give(
    architecture: str, quantize: Quantization, model_folder: Callable[[str], Path], calls: list[int]
) -> None:
    base = load(model_folder(architecture), quantize)
    rows = list(torch.randint(0, VOCAB_SIZE, (3, 2), generator=torch.Generator().manual_seed(5)))
    calls.clear()
    found = base._decode_probe(rows, is_native=True)
    assert calls == [3] * 2 * base.num_layers
    with_stock_layers(base)
    torch.testing.assert_close(found, base._decode_probe(rows, is_native=True), rtol=2e-2, atol=2e-2)
    assert len(calls) == 2 * base.num_layers


def test_layers_with_angles_of_their_own_are_turned_by_them(
    model_folder: Callable[[str], Path], calls: list[int]
) -> None:
    """As in models whose local and global layers rotate differently."""
    base = load(model_folder("llama"), Quantization.NF4)
    last = layers_of(base)[-1]
    given: Any = last.forward

    def other_angles(hidden_states: torch.Tensor, *args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        turned = tuple(t.flip(-1).roll(1, -1) for t in position_embeddings)
        return given(hidden_states, *args, position_embeddings=turned, **kwargs)

    rows = [torch.tensor([5, 7])]
    plain = base._decode_probe(rows, is_native=True)
    last.forward = other_angles
    calls.clear()
    found = base._decode_probe(rows, is_native=True)
    assert calls == [1] * 2 * base.num_layers
    last.forward = given
    with_stock_layers(base)
    given = last.forward
    last.forward = other_angles
    expected = base._decode_probe(rows, is_native=True)
    assert (found - expected).norm() < 3e-2 * expected.norm()
    assert (found - plain).norm() > 2 * (found - expected).norm()


def test_a_processor_that_does_not_multiply_bfloat16_has_the_call_for_four_bits(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    rows = list(torch.randint(0, VOCAB_SIZE, (3, 2), generator=torch.Generator().manual_seed(5)))
    expected = load(model_folder("llama"), Quantization.NF4)._decode_probe(rows, is_native=True)
    for way in ("has_matrix_unit", "has_pair_vectors"):
        monkeypatch.setattr(f"server.ops.native.weights.{way}", lambda: False)
    base = load(model_folder("llama"), Quantization.NF4)
    calls.clear()
    found = base._decode_probe(rows, is_native=True)
    assert (found - expected).norm() < 3e-2 * expected.norm()  # levels rounded to bfloat16, or not
    assert calls == [3] * 2 * base.num_layers


@pytest.mark.parametrize("quantize", WAYS)
def test_adapters_of_all_kinds_in_one_batch_get_what_the_modules_give(
    quantize: Quantization, model_folder: Callable[[str], Path], tmp_path: Path, calls: list[int]
) -> None:
    """IA3 scales what `down` reads: that is in the call as well."""
    folder = model_folder("llama")
    load(folder, quantize)
    flags = {"quantize": str(quantize.value), "dtype": "bfloat16", "ops": "native"}
    params = SamplingParams(16, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE)
    asks = [Ask(kind, (number, 2, 3, 5, 7), params) for number, kind in enumerate((None, *KINDS))]
    with serve_kinds(folder, dense_model(folder), KINDS, tmp_path, strength=0.2, **flags) as case:
        answer_all(case.server, asks)  # so that all of them are loaded
        calls.clear()
        found = answer_all(case.server, asks)
        assert max(calls) == len(asks), "all of them, and the base, in one call"
        num_calls = len(calls)
        with_stock_layers(case.server.base)
        expected = answer_all(case.server, asks)
        assert len(calls) == num_calls
    for ask, ours, theirs in zip(asks, found, expected, strict=True):
        num_same = next((n for n in range(16) if ours.token_ids[n] != theirs.token_ids[n]), 16)  # rounding may tip one
        rows, stock = (logprob_rows(a.logprobs, VOCAB_SIZE)[: num_same + 1].exp() for a in (ours, theirs))
        assert (rows - stock).norm() < 3e-2 * stock.norm(), ask.adapter
        assert num_same > 1, ask.adapter


def test_a_scale_at_linears_that_share_their_input_takes_the_modules(
    model_folder: Callable[[str], Path], tmp_path: Path, calls: list[int]
) -> None:
    folder = model_folder("llama")
    params = SamplingParams(8, temperature=0.0, ignore_eos=True)
    flags = {"quantize": "nf4", "dtype": "bfloat16", "ops": "native"}
    with serve_kinds(folder, dense_model(folder), ("ia3-feedforward",), tmp_path, **flags) as case:
        calls.clear()
        (answer,) = answer_all(case.server, [Ask("ia3-feedforward", (1, 2, 3), params)])
    assert answer.error is None
    assert calls == []


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "gpt2", "qwen3"])
def test_layers_of_other_code_are_left_alone(
    architecture: str, model_folder: Callable[[str], Path], calls: list[int]
) -> None:
    base = load(model_folder(architecture), Quantization.NF4)
    base._decode_probe([torch.tensor([1, 2])], is_native=True)
    assert calls == []


def test_a_base_in_float32_keeps_its_layers(model_folder: Callable[[str], Path], calls: list[int]) -> None:
    base = Base.load(BaseOptions(str(model_folder("llama")), Quantization.NF4, torch.float32, ops="native"))
    base._decode_probe([torch.tensor([1, 2])], is_native=True)
    assert calls == []


def test_a_call_that_differs_is_not_taken(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = native.DecodeLayer.__call__
    monkeypatch.setattr(native.DecodeLayer, "__call__", lambda *given: stock(*given) * 1.5)
    base = load(model_folder("llama"), Quantization.NF4)
    assert "with fewer operators it differs" in caplog.text
    monkeypatch.setattr(native.DecodeLayer, "__call__", lambda *_: pytest.fail("called"))
    base._decode_probe([torch.tensor([1, 2])], is_native=True)
