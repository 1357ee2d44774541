"""Rows of an adapter's own for some token ids: trained token rows, and the virtual tokens of soft prompts.

Owns the op at an embedding, and at a head of the same vocabulary. Knows nothing about prompts or vocabularies: virtual
tokens are ids below 0, which no tokenizer gives.

Semantics, for a token t of a lane with `ids` (n,) and `rows` (n, width):
    at an embedding:  y[t] = gain * rows[i] where ids[i] is the token's id; without the gain where that is below 0
    at a head:        y[t, ids[i]] = rows[i] . x[t]
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from server.ops.sending import send
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors, joined

_LANE = 1 << 40  # from one lane's keys to the next one's, beyond any id


class TokenRows(SiteOp):
    name = "token_rows"
    looked_at = frozenset({"ids"})

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
        """Rows of all lanes under one another; keys of (lane, id) in ascending order, and the row of each (`order`).

        Of the rows that a head scores the numbers (`scored`) with their ids (`scored_ids`), and where those of a lane
        begin (`starts`, on the CPU, lane 0 and the end included).
        """
        rows, own_ids = joined(of_lane, "rows"), [own["ids"].cpu().long() for own in of_lane]
        ids = torch.cat(own_ids)
        nums = torch.tensor([len(own) for own in own_ids])
        keys, order = (torch.arange(1, len(nums) + 1).repeat_interleave(nums) * _LANE + ids).sort()
        scored = (ids >= 0).nonzero().flatten()  # virtual tokens are never scored
        starts = torch.tensor([0, *accumulate((int((own >= 0).sum()) for own in own_ids), initial=0)])
        sent = {"keys": keys, "order": order, "scored": scored, "scored_ids": ids[scored]}
        return {"rows": rows, "starts": starts, **{name: send(tensor, rows.device) for name, tensor in sent.items()}}

    def after(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        if not len(stacked["keys"]):
            return y
        if site.kind == "embedding":
            return self._embed(y, stacked, tokens, site.gain)
        return self._score(y, x, stacked, tokens)

    def _embed(self, y: torch.Tensor, stacked: Tensors, tokens: OpTokens, gain: float) -> torch.Tensor:
        keys, wanted = stacked["keys"], tokens.lanes * _LANE + tokens.ids
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        own = stacked["rows"][stacked["order"][place]]
        if gain != 1:
            own = own * torch.where(tokens.ids < 0, 1.0, gain)[:, None]
        return torch.where((keys[place] == wanted)[:, None], own.to(y.dtype), y)

    def _score(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens) -> torch.Tensor:
        starts = stacked["starts"].tolist()
        for lane in range(1, len(starts) - 1):
            own, at = tokens.of_lane(lane), slice(starts[lane], starts[lane + 1])
            ids, rows = stacked["scored_ids"][at], stacked["rows"][stacked["scored"][at]]
            y[own[:, None], ids] = (x[own].float() @ rows.T).to(y.dtype)
        return y
