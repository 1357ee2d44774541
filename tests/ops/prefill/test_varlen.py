"""What `varlen_attn` is told of a step, as numbers, and what of PyTorch it stands on."""

import inspect
import logging
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as installed

from server.ops.prefill import Chunks
from server.ops.prefill import varlen as module
from server.ops.prefill.varlen import Varlen, varlen_lacks
from tests.ops.prefill.libraries import varlen_attn

CPU = torch.device("cpu")
CHUNKS = Chunks(starts=(0, 3, 8), lengths=(11, 5), blocks=((7, 2, 4), (5, 1)))


def called(window: int | None, kv_heads: int = 2) -> dict[str, Any]:
    """What the function gets for a layer of four heads of 8 numbers, blocks of 4 tokens."""
    calls: list[dict[str, Any]] = []
    caches = torch.randn(2, 9, kv_heads, 4, 8, dtype=torch.float16)
    plan = Varlen(varlen_attn(calls=calls)).plan(CHUNKS, 4, CPU)
    out = plan.attend(torch.randn(8, 4, 8), *caches, scaling=0.5, window=window)
    assert (out.dtype, out.shape) == (torch.float32, (8, 4, 8))
    assert calls[0]["key"].data_ptr() == caches[0].data_ptr(), "the cache is read where it lies"
    assert calls[0]["key"].shape == (9, 4, kv_heads, 8)
    return calls[0]


def test_the_numbers_of_a_step() -> None:
    told = called(window=None)
    numbers = {name: told[name].tolist() for name in ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table")}
    assert numbers == {
        "cu_seq_q": [0, 3, 8],
        "cu_seq_k": [0, 11, 16],
        "seqused_k": [11, 5],
        "block_table": [[7, 2, 4], [5, 1, 0]],
    }
    rest = {name: told[name] for name in ("max_q", "max_k", "scale", "window_size", "enable_gqa", "num_splits")}
    assert rest == {
        "max_q": 5, "max_k": 11, "scale": 0.5, "window_size": (-1, 0), "enable_gqa": True, "num_splits": 1,
    }  # fmt: skip
    assert told["query"].dtype is torch.float16, "as the cache"


@pytest.mark.parametrize(("window", "left"), [(1, 0), (2, 1), (4096, 4095)])
def test_a_window_of_w_tokens_leaves_w_minus_1_before_a_token_s_own(window: int, left: int) -> None:
    assert called(window)["window_size"] == (left, 0)


def test_as_many_heads_of_keys_need_no_groups() -> None:
    assert called(None, kv_heads=4)["enable_gqa"] is False


def test_the_function_of_the_tests_has_the_signature_of_pytorch_s() -> None:
    if varlen_lacks() is not None:
        pytest.skip(str(varlen_lacks()))
    theirs, ours = (
        {name: (one.kind, one.default) for name, one in inspect.signature(function).parameters.items()}
        for function in (installed.varlen_attn, varlen_attn())
    )
    assert theirs == ours


def test_a_pytorch_without_block_tables_is_told_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: torch.Tensor, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> None:
        """As in PyTorch 2.11."""

    monkeypatch.setattr(installed, "varlen_attn", older)
    assert varlen_lacks() == f"the varlen_attn of PyTorch {torch.__version__} has no block table, and that of 2.12 has"
    monkeypatch.setattr(module, "_MODULE", "torch.nn.attention.no_such_module")
    assert varlen_lacks() == f"PyTorch {torch.__version__} has no varlen_attn, and 2.12 has"


def test_the_log_does_not_hear_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torch.nn.attention.varlen")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    Varlen.load(CPU)
    assert not logger.isEnabledFor(logging.INFO)
