"""Rows of an adapter's own for some token ids: trained token rows, and the virtual tokens of soft prompts.

Owns the op at an embedding, and at a head of the same vocabulary. Knows nothing about prompts or vocabularies: virtual
tokens are ids below 0, which no tokenizer gives.

Semantics, for a token t of a lane with `ids` (n,) and `rows` (n, width):
    at an embedding:  y[t] = gain * rows[i] where ids[i] is the token's id; without the gain where that is below 0
    at a head:        y[t, ids[i]] = rows[i] . x[t]
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors

_NO_ID = -(1 << 40)


class TokenRows(SiteOp):
    name = "token_rows"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        ids, rows = tensors["ids"], tensors["rows"]
        is_embedding = site.kind == "embedding"
        width, num_ids = (site.d_out, site.d_in) if is_embedding else (site.d_in, site.d_out)
        if tuple(rows.shape) != (len(ids), width):
            raise ValueError(f"its rows have the shape {list(rows.shape)}, and this base needs {[len(ids), width]}")
        if len(ids) and not ids.max() < num_ids:
            raise ValueError(f"it has a row for the token {int(ids.max())}, and the vocabulary ends at {num_ids - 1}")
        if len(set(ids.tolist())) != len(ids):
            raise ValueError("it has two rows for one token")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Tensors:
        num, width = max(len(own["ids"]) for own in of_lane), of_lane[0]["rows"].shape[1]
        like = of_lane[0]["rows"]
        ids = torch.full((len(of_lane) + 1, num), _NO_ID, dtype=torch.int64, device=like.device)
        rows = like.new_zeros(len(of_lane) + 1, num, width)
        for lane, own in enumerate(of_lane, start=1):
            ids[lane, : len(own["ids"])] = own["ids"].long()
            gain = torch.where(own["ids"] < 0, 1.0, site.gain if site.kind == "embedding" else 1.0)
            rows[lane, : len(own["ids"])] = own["rows"] * gain[:, None]
        return {"ids": ids, "rows": rows}

    def after(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        if site.kind == "embedding":
            return self._embed(y, stacked, tokens)
        return self._score(y, x, stacked, tokens)

    def _embed(self, y: torch.Tensor, stacked: Tensors, tokens: OpTokens) -> torch.Tensor:
        is_own = stacked["ids"].index_select(0, tokens.lanes) == tokens.ids[:, None]  # (tokens, n)
        own = stacked["rows"][tokens.lanes, is_own.int().argmax(1)]
        return torch.where(is_own.any(1)[:, None], own.to(y.dtype), y)

    def _score(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens) -> torch.Tensor:
        for lane in range(1, stacked["ids"].shape[0]):
            own = (tokens.lanes == lane).nonzero()
            numbers = (stacked["ids"][lane] >= 0).nonzero().flatten()  # virtual tokens are never scored
            ids, rows = stacked["ids"][lane, numbers], stacked["rows"][lane, numbers]
            y[own, ids] = (x[own.flatten()].float() @ rows.T).to(y.dtype)
        return y
