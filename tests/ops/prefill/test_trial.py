"""A trial lets a right library through, in every dtype, and none that is wrong in one of the ways that there are."""

import math
from dataclasses import replace

import pytest
import torch

from server.ops.prefill import AttentionLayer, PrefillLibrary
from server.ops.prefill.flashinfer_plan import FlashInfer
from server.ops.prefill.trial import LIMITS, difference
from server.ops.prefill.varlen import Varlen
from tests.ops.prefill.libraries import FAULTS, BatchPrefill, varlen_attn

CPU = torch.device("cpu")
PLAIN = AttentionLayer(num_heads=4, kv_heads=2, width=16, scaling=0.3)
WINDOW = replace(PLAIN, window=4096)
CAPPED = replace(WINDOW, softcap=50.0)


def varlen(fault: str | None = None) -> PrefillLibrary:
    return Varlen(varlen_attn(fault, page=8))


def flashinfer(fault: str | None = None) -> PrefillLibrary:
    return FlashInfer(lambda workspace, layout: BatchPrefill(workspace, layout, fault), CPU)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("layer", [PLAIN, WINDOW, replace(PLAIN, kv_heads=4), replace(PLAIN, scaling=1.0)], ids=str)
def test_what_is_right_passes(layer: AttentionLayer, dtype: torch.dtype) -> None:
    for library in (varlen(), flashinfer()):
        assert difference(library, layer, dtype, 64, CPU) <= LIMITS[dtype] / 2


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_what_caps_scores_right_passes(dtype: torch.dtype) -> None:
    assert difference(flashinfer(), CAPPED, dtype, 64, CPU) <= LIMITS[dtype] / 2


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_does_not(fault: str) -> None:
    """In the dtype that forgives most."""
    error = difference(flashinfer(fault), CAPPED, torch.bfloat16, 64, CPU)
    assert not error <= 3 * LIMITS[torch.bfloat16]


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"has no cap"}))
def test_what_is_wrong_on_large_blocks_does_not(fault: str) -> None:
    error = difference(varlen(fault), WINDOW, torch.bfloat16, 256, CPU)
    assert not error <= 3 * LIMITS[torch.bfloat16]


def test_rows_that_are_not_written_are_found_whatever_lies_there() -> None:
    assert math.isnan(difference(varlen("writes the first sequence only"), PLAIN, torch.float32, 64, CPU))
