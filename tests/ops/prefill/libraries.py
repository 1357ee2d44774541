"""Libraries of attention in plain PyTorch, with the signatures of those that need a GPU, right ones and wrong ones.

What they insist on is what the real ones do: dtypes, shapes, strides, the number of splits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# What may be wrong with a library, each of which a trial must find.
FAULTS = (
    "counts the window itself",
    "has no window",
    "aligns the mask at the first key",
    "reads blocks in the order of the pool",
    "reads the last block to its end",
    "writes the first sequence only",
    "spreads key heads over query heads",
    "scales by the width",
    "adds where it should mask",
    "has no cap",
)


@dataclass(frozen=True, slots=True)
class Sequence:
    """One chunk as a library sees it: query (n, heads, width), keys and values (rows, kv_heads, width) in their blocks.

    `length` rows are the sequence's; what lies behind them is a former user's.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: int


def attention(one: Sequence, scale: float, left: int, softcap: float, fault: str | None) -> torch.Tensor:
    """Causal attention of the last n positions, each to itself and `left` before it (-1: all)."""
    num_new, num_heads, width = one.query.shape
    num_rows, kv_heads = one.keys.shape[:2]
    length = num_rows if fault == "reads the last block to its end" else one.length
    group = num_heads // kv_heads
    heads = torch.arange(num_heads) % kv_heads if fault == "spreads key heads over query heads" else None
    heads = torch.arange(num_heads) // group if heads is None else heads
    keys, values = one.keys[:, heads].double(), one.values[:, heads].double()
    scale = width**-0.5 if fault == "scales by the width" else scale
    scores = torch.einsum("nhd,lhd->hnl", one.query.double(), keys) * scale
    if softcap and fault != "has no cap":
        scores = softcap * torch.tanh(scores / softcap)
    first = 0 if fault == "aligns the mask at the first key" else length - num_new
    place = torch.arange(first, first + num_new)[:, None]
    position = torch.arange(num_rows)[None]
    left += fault == "counts the window itself" and left >= 0
    seen = position <= place
    if left >= 0 and fault != "has no window":
        seen &= position >= place - left
    if fault == "adds where it should mask":
        scores += -1e30 * (~seen).double()
    else:
        scores.masked_fill_(~seen, -torch.inf)
    return torch.einsum("hnl,lhd->nhd", torch.softmax(scores, dim=-1), values).to(one.query.dtype)


def paged(cache: torch.Tensor, blocks: torch.Tensor, fault: str | None) -> torch.Tensor:
    """(rows, kv_heads, width) of a sequence's blocks in a cache (blocks, tokens, kv_heads, width)."""
    if fault == "reads blocks in the order of the pool":
        blocks = blocks.sort().values
    return cache.index_select(0, blocks.long()).flatten(0, 1)


def varlen_attn(
    fault: str | None = None, page: int = 1, calls: list[dict[str, Any]] | None = None
) -> Callable[..., Any]:
    """A function with the signature of `torch.nn.attention.varlen.varlen_attn`, on blocks of a multiple of `page`.

    `calls` gets the arguments of each call.
    """

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        told = dict(locals())
        if calls is not None:
            calls.append(told)
        assert scale is not None
        assert cu_seq_k is not None
        assert seqused_k is not None
        assert block_table is not None
        assert num_splits == 1, "with more, PyTorch leaves rows unwritten"
        assert enable_gqa == (query.shape[1] != key.shape[2])
        assert query.dtype == key.dtype == value.dtype
        assert {t.stride(-1) for t in (query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table)} == {1}
        assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
        assert key.shape[1] % page == 0
        num = len(cu_seq_q) - 1
        assert (len(cu_seq_k), len(seqused_k), len(block_table)) == (num + 1, num, num)
        starts, lengths = cu_seq_q.tolist(), seqused_k.tolist()
        assert starts[-1] == len(query)
        assert max_q == max(b - a for a, b in zip(starts, starts[1:], strict=False))
        assert (max_k, cu_seq_k[-1]) == (max(lengths), sum(lengths))
        assert window_size[1] == 0
        out = torch.full_like(query, torch.nan)
        for number, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
            if number and fault == "writes the first sequence only":
                break
            blocks = block_table[number, : -(-length // key.shape[1])]
            keys, values = (paged(cache, blocks, fault) for cache in (key, value))
            one = Sequence(query[start:end], keys, values, length)
            out[start:end] = attention(one, scale, window_size[0], 0.0, fault)
        return out

    return varlen_attn


@dataclass
class BatchPrefill:
    """What `flashinfer.BatchPrefillWithPagedKVCacheWrapper` does with what it is given here."""

    workspace: torch.Tensor
    kv_layout: str
    fault: str | None = None
    plans: list[dict[str, Any]] = field(default_factory=list)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        told = dict(locals())
        del told["self"]
        assert causal
        assert {t.dtype for t in told.values() if isinstance(t, torch.Tensor)} == {torch.int32}
        assert qo_indptr.device.type == paged_kv_indptr.device.type == paged_kv_last_page_len.device.type == "cpu"
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        assert 1 <= int(paged_kv_last_page_len.min()) <= int(paged_kv_last_page_len.max()) <= page_size
        self.plans.append(told)

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        told, (key, value) = self.plans[-1], paged_kv_cache
        assert self.kv_layout == "HND"
        assert q.is_contiguous()
        assert q.dtype == told["q_data_type"]
        assert key.dtype == value.dtype == told["kv_data_type"]
        assert tuple(q.shape[1:]) == (told["num_qo_heads"], told["head_dim_qk"])
        assert tuple(key.shape[1:]) == (told["num_kv_heads"], told["page_size"], told["head_dim_qk"])
        starts, firsts = told["qo_indptr"].tolist(), told["paged_kv_indptr"].tolist()
        assert starts[-1] == len(q)
        out = torch.full_like(q, torch.nan)
        for number, last in enumerate(told["paged_kv_last_page_len"].tolist()):
            if number and self.fault == "writes the first sequence only":
                break
            blocks = told["paged_kv_indices"][firsts[number] : firsts[number + 1]]
            length = (len(blocks) - 1) * told["page_size"] + last
            keys, values = (paged(cache.transpose(1, 2), blocks, self.fault) for cache in (key, value))
            one = Sequence(q[starts[number] : starts[number + 1]], keys, values, length)
            options = (told["sm_scale"], told["window_left"], told["logits_soft_cap"] or 0.0, self.fault)
            out[starts[number] : starts[number + 1]] = attention(one, *options)
        return out
