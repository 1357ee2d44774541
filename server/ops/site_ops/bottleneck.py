"""Two small layers with a nonlinearity between them, added to a site's output: bottleneck adapters.

Owns the op at a linear, and the one at the norm before it, which keeps the residual stream for those that read it.
Knows nothing about where in a model they stand, or how their formats write them.

Semantics, for a token t of a lane with `down` (r, width), `down_bias` (r,), `up` (r, width) transposed, `up_bias`
(width,), `act` (1,) or (r,) the indices of its rows into ACTIVATIONS and `reads` (2,), and perhaps `before` and `after`
(2, width), weight and bias of a layer norm, and `is_last` (1,):
    z = reads[0] * y[t] + reads[1] * stream[t]           the stream: what the norm before the site was given
    z = layer_norm(z; before)                            where there is `before`
    u = up^T act(down z + down_bias) + up_bias
    y[t] = y[t] + u                                      without `after`
    y[t] = y[t] + layer_norm(u; after)                   with it, if is_last = 0
    y[t] = layer_norm(y[t] + u; after)                   if is_last = 1
All in float32. Ranks may differ from lane to lane, and none is padded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.ops.sending import send
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors, joined

LN_EPS = 1e-5  # PyTorch's own, which the adapters' norms have
_STREAM = "residual stream"


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_10(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x).clamp(-10, 10)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


_FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "linear": _same,
    "relu6": F.relu6,
    "relu2": _relu_squared,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "gelu_10": _gelu_10,
}
ACTIVATIONS = tuple(_FUNCTIONS)
"""The nonlinearities by number. `leaky_relu` has the slope 0.01."""

NAMES: Mapping[str, str] = {
    "relu": "relu", "relu2": "relu2", "relu6": "relu6", "leaky_relu": "leaky_relu", "silu": "silu", "swish": "silu",
    "mish": "mish", "tanh": "tanh", "sigmoid": "sigmoid", "linear": "linear", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_10": "gelu_10", "quick_gelu": "quick_gelu",
}  # fmt: skip
"""What transformers calls them."""


class KeepStream(SiteOp):
    """Before a norm: keeps what it reads for the rest of the step, until another norm does."""

    name = "keep_stream"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        if site.kind != "norm":
            raise ValueError(f"the residual stream is kept at a norm, and this is a {site.kind}")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Tensors:
        return {}

    def before(self, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        tokens.kept[_STREAM] = x
        return x


class Bottleneck(SiteOp):
    name = "bottleneck"
    looked_at = frozenset({"act"})

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        rank, width = tensors["down"].shape[0], site.d_out
        wanted = {"down": (rank, width), "up": (rank, width), "down_bias": (rank,), "up_bias": (width,)}
        wanted |= {
            "act": (1,) if tensors["act"].numel() == 1 else (rank,),
            "reads": (2,),
            "before": (2, width),
            "after": (2, width),
            "is_last": (1,),
        }
        for field, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[field]:
                raise ValueError(
                    f"its {field} has the shape {list(tensor.shape)}, and this base needs {list(wanted[field])}"
                )
        strange = [act for act in tensors["act"].tolist() if act not in range(len(ACTIVATIONS))]
        if strange:
            raise ValueError(f"its act is {strange[0]}, and the last has the number {len(ACTIVATIONS) - 1}")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> "_Stacked":
        """Vectors by lane, after those of lane 0, and the two layers of each lane."""
        like = of_lane[0]["up_bias"]
        layers = tuple(_Layers.of(own) for own in of_lane)
        stacked: dict[str, torch.Tensor] = {
            "up_bias": _by_lane(of_lane, "up_bias", torch.zeros_like(like)),
            "reads": _by_lane(of_lane, "reads", send(torch.tensor([1.0, 0.0]), like.device)),
        }
        no_norm = torch.stack([torch.ones_like(like), torch.zeros_like(like)])
        for field in ("before", "after"):
            if any(field in own for own in of_lane):
                stacked[field] = _by_lane(of_lane, field, no_norm)
                has_field = torch.tensor([False, *(field in own for own in of_lane)])
                stacked[f"has_{field}"] = send(has_field, like.device)
        if "after" in stacked:
            stacked["is_last"] = _by_lane(of_lane, "is_last", like.new_zeros(1))
        return _Stacked(stacked, layers, _Joined.of(layers) if _reads_all_rows(like.device) else None)

    def after(
        self, y: torch.Tensor, x: torch.Tensor, stacked: "_Stacked", tokens: OpTokens, site: OpSite
    ) -> torch.Tensor:
        of_token = {field: vectors.index_select(0, tokens.lanes) for field, vectors in stacked.vectors.items()}
        own = y.float()
        read = own * of_token["reads"][:, :1]
        stream = tokens.kept.get(_STREAM)
        if stream is not None:
            read = torch.where(of_token["reads"][:, 1:] > 0, read + stream.float(), read)
        if "before" in of_token:
            read = torch.where(of_token["has_before"][:, None], _layer_norm(read, of_token["before"]), read)
        change = _through(read, stacked, tokens) + of_token["up_bias"]
        total = own + change
        if "after" in of_token:
            after, is_last = of_token["after"], of_token["is_last"] > 0
            normed = torch.where(is_last, _layer_norm(total, after), own + _layer_norm(change, after))
            total = torch.where(of_token["has_after"][:, None], normed, total)
        return torch.where((tokens.lanes > 0)[:, None], total.to(y.dtype), y)


@dataclass(frozen=True, slots=True)
class _Layers:
    """The two layers of a lane, or of several under one another."""

    down: torch.Tensor  # (r, width)
    down_bias: torch.Tensor  # (r,)
    up: torch.Tensor  # (r, width)
    row_act: torch.Tensor  # (r,)
    acts: tuple[float, ...]  # those of `row_act`

    @classmethod
    def of(cls, own: Tensors) -> "_Layers":
        down, act = own["down"], own["act"].cpu()
        acts = tuple(sorted(set(act.tolist())))
        row_act = send(act.expand(down.shape[0]).contiguous(), down.device)
        return cls(down, own["down_bias"], own["up"], row_act, acts)


@dataclass(frozen=True, slots=True)
class _Joined:
    """The layers of all lanes, and the lane of each row: (rows,)."""

    layers: _Layers
    owner: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[_Layers]) -> "_Joined":
        ranks = torch.tensor([len(own.down) for own in layers])
        acts = tuple(sorted({act for own in layers for act in own.acts}))
        tensors = [
            {"down": own.down, "down_bias": own.down_bias, "up": own.up, "row_act": own.row_act} for own in layers
        ]
        down, down_bias, up, row_act = (joined(tensors, field) for field in tensors[0])
        owner = send(torch.arange(1, len(layers) + 1).repeat_interleave(ranks), down.device)
        return cls(_Layers(down, down_bias, up, row_act, acts), owner)


@dataclass(frozen=True, slots=True)
class _Stacked:
    vectors: Tensors  # each (lanes, ...), lane 0 before them
    of_lane: tuple[_Layers, ...]
    joined: _Joined | None  # where mixed tokens read all rows


def _reads_all_rows(device: torch.device) -> bool:
    """Whether mixed tokens go through the rows of all lanes: where the lanes of tokens cannot be looked at, or launches
    cost more than rows."""
    return device.type != "cpu"


def _by_lane(of_lane: Sequence[Tensors], field: str, blank: torch.Tensor) -> torch.Tensor:
    return torch.stack([blank, *(own.get(field, blank) for own in of_lane)])


def _layer_norm(x: torch.Tensor, of_token: torch.Tensor) -> torch.Tensor:
    """x (tokens, width) normalized, with the weight and bias of each token: (tokens, 2, width)."""
    return torch.addcmul(of_token[:, 1], of_token[:, 0], F.layer_norm(x, x.shape[-1:], eps=LN_EPS))


def _through(x: torch.Tensor, stacked: _Stacked, tokens: OpTokens) -> torch.Tensor:
    """up^T act(down x + down_bias) of each token's own lane, (tokens, width); zeros where it has none."""
    out = torch.zeros_like(x)
    if tokens.num_mixed and stacked.joined is None:
        _lane_by_lane(out, x, stacked.of_lane, tokens)
    elif tokens.num_mixed and stacked.joined is not None:
        _all_rows(out, x, stacked.joined, tokens)
    for run in tokens.runs:
        layers = stacked.of_lane[run.adapter - 1]
        torch.mm(_hidden(x[run.start : run.end], layers), layers.up, out=out[run.start : run.end])
    return out


def _lane_by_lane(out: torch.Tensor, x: torch.Tensor, of_lane: Sequence[_Layers], tokens: OpTokens) -> None:
    """The mixed tokens where the lanes can be looked at: 16 lanes take 0.3 to 0.4 of the time that `_all_rows` does."""
    for lane in sorted(set(tokens.mixed.tolist()) - {0}):
        own = (tokens.mixed == lane).nonzero()[:, 0]
        layers = of_lane[lane - 1]
        out[own] = _hidden(x[own], layers) @ layers.up


def _all_rows(out: torch.Tensor, x: torch.Tensor, rows: _Joined, tokens: OpTokens) -> None:
    """The mixed tokens without a look at their lanes: through the rows of all of them, those of others masked.

    Every row is read once, and the launches are as many for any number of lanes.
    """
    is_own = rows.owner == tokens.mixed[:, None]
    hidden = _hidden(x[: tokens.num_mixed], rows.layers)
    torch.mm(torch.where(is_own, hidden, 0.0), rows.layers.up, out=out[: tokens.num_mixed])


def _hidden(x: torch.Tensor, layers: _Layers) -> torch.Tensor:
    summed = torch.addmm(layers.down_bias, x, layers.down.t())
    if len(layers.acts) == 1:
        return _FUNCTIONS[ACTIVATIONS[int(layers.acts[0])]](summed)
    hidden = summed
    for number in layers.acts:
        activated = _FUNCTIONS[ACTIVATIONS[int(number)]](summed)
        hidden = torch.where(layers.row_act == number, activated, hidden)
    return hidden
