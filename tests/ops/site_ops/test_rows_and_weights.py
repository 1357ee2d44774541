"""Ops that put rows, weights, keys and values of an adapter's own in place of the base's: against loops over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from server.ops import Run
from server.ops.site_ops import SITE_OPS, OpTokens, Tensors

D_IN, D_OUT, VOCABULARY = 6, 8, 10


@dataclass(frozen=True)
class Place:
    """A site, as ops see it."""

    kind: str
    d_in: int
    d_out: int
    gain: float = 1.0
    weight_offset: float = 0.0
    index: int = 0

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)


def tokens_of(lanes: Sequence[int], ids: Sequence[int] | None = None, num_mixed: int = 3) -> OpTokens:
    """The first tokens mixed, the rest in runs of one lane."""
    runs = [Run(i, i + 1, lane) for i, lane in enumerate(lanes) if i >= num_mixed and lane]
    return OpTokens(torch.tensor(lanes), num_mixed, tuple(runs), torch.tensor(ids or [0] * len(lanes)))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(op: str, of_lane: Sequence[Tensors], site: Place, x: torch.Tensor, y: torch.Tensor, tokens: OpTokens):  # type: ignore[no-untyped-def]
    """(what the site reads, what it gives), for copies of x and y."""
    for tensors in of_lane:
        SITE_OPS[op].check(tensors, site)
    stacked = SITE_OPS[op].stack(of_lane, site)
    return (
        SITE_OPS[op].before(x.clone(), stacked, tokens, site),
        SITE_OPS[op].after(y.clone(), x, stacked, tokens, site),
    )


LANES = [0, 1, 2, 2, 1, 0]
IDS = [4, 4, 9, -1, -2, -1]
ROWS: list[Tensors] = [
    {"ids": torch.tensor([4.0, -2.0]), "rows": normal(2, D_OUT)},
    {"ids": torch.tensor([-1.0, 9.0, 3.0]), "rows": normal(3, D_OUT)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_gives_an_adapters_own_rows_for_its_ids(dtype: torch.dtype) -> None:
    """With the embedding's gain for tokens, without it for virtual ones."""
    site, y = Place("embedding", VOCABULARY, D_OUT, gain=3.0), normal(6, D_OUT).to(dtype)
    _, got = run("token_rows", ROWS, site, torch.tensor(IDS), y, tokens_of(LANES, IDS))
    expected = y.clone()
    expected[1] = (3 * ROWS[0]["rows"][0]).to(dtype)
    expected[2] = (3 * ROWS[1]["rows"][1]).to(dtype)
    expected[3] = ROWS[1]["rows"][0].to(dtype)
    expected[4] = ROWS[0]["rows"][1].to(dtype)
    assert torch.equal(got, expected)


def test_a_head_scores_an_adapters_own_rows() -> None:
    """Virtual tokens are never scored; neither is what pads the shorter list."""
    site, x, y = Place("linear", D_OUT, VOCABULARY), normal(6, D_OUT), normal(6, VOCABULARY)
    _, got = run("token_rows", ROWS, site, x, y, tokens_of(LANES, IDS))
    expected = y.clone()
    for token, lane in enumerate(LANES):
        for number, row in zip(ROWS[lane - 1]["ids"], ROWS[lane - 1]["rows"], strict=True) if lane else ():
            if number >= 0:
                expected[token, int(number)] = row @ x[token]
    torch.testing.assert_close(got, expected)


def test_virtual_tokens_have_an_adapters_own_keys_and_values() -> None:
    site, x = Place("attention", D_OUT, D_OUT), normal(6, D_OUT)
    rows: list[Tensors] = [{"rows": normal(3, D_OUT)}, {"rows": normal(1, D_OUT)}]
    got, _ = run("kv_rows", rows, site, x, x, tokens_of(LANES, IDS))
    expected = x.clone()
    expected[3], expected[4] = rows[1]["rows"][0], rows[0]["rows"][1]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_takes_an_adapters_own_weight_and_bias(offset: float) -> None:
    site, x, y = Place("norm", D_OUT, D_OUT, weight_offset=offset), normal(6, D_OUT), normal(6, D_OUT)
    own: list[Tensors] = [{"weight": normal(D_OUT), "bias": normal(D_OUT)} for _ in range(2)]
    _, got = run("norm_weight", own, site, x, y, tokens_of(LANES))
    expected = [
        (own[lane - 1]["weight"] + offset) * site.normalized(x[t]) + own[lane - 1]["bias"] if lane else y[t]
        for t, lane in enumerate(LANES)
    ]
    torch.testing.assert_close(got, torch.stack(expected))


def test_a_linear_takes_an_adapters_own_weight() -> None:
    site, x, y = Place("linear", D_IN, D_OUT), normal(6, D_IN), normal(6, D_OUT)
    own: list[Tensors] = [{"weight": normal(D_OUT, D_IN), "bias": normal(D_OUT)}, {"weight": normal(D_OUT, D_IN)}]
    _, got = run("own_weight", own, site, x, y, tokens_of(LANES))
    expected = [
        own[lane - 1]["weight"] @ x[t] + own[lane - 1].get("bias", torch.zeros(1)) if lane else y[t]
        for t, lane in enumerate(LANES)
    ]
    torch.testing.assert_close(got, torch.stack(expected))


def test_an_embedding_takes_an_adapters_own_table() -> None:
    site, ids, y = Place("embedding", VOCABULARY, D_OUT, gain=2.0), torch.arange(6), normal(6, D_OUT)
    own: list[Tensors] = [{"weight": normal(D_OUT, VOCABULARY)}, {"weight": 2 * normal(D_OUT, VOCABULARY)}]
    _, got = run("own_weight", own, site, ids, y, tokens_of(LANES))
    expected = [2 * own[lane - 1]["weight"][:, t] if lane else y[t] for t, lane in enumerate(LANES)]
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize(
    ("op", "kind", "tensors", "message"),
    [
        ("token_rows", "embedding", {"ids": torch.ones(2), "rows": normal(2, D_OUT)}, "two rows for one token"),
        ("token_rows", "embedding", {"ids": torch.tensor([10.0]), "rows": normal(1, D_OUT)}, "vocabulary ends at 9"),
        ("token_rows", "embedding", {"ids": torch.ones(1), "rows": normal(1, 3)}, r"the shape \[1, 3\]"),
        ("kv_rows", "attention", {"rows": normal(2, 3)}, "its rows have the shape"),
        ("norm_weight", "norm", {"weight": normal(3), "bias": normal(D_OUT)}, "its weight has the shape"),
        ("own_weight", "linear", {"weight": normal(3, 3)}, "its weight has the shape"),
    ],
)
def test_what_does_not_fit_its_site_is_refused(op: str, kind: str, tensors: Tensors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SITE_OPS[op].check(tensors, Place(kind, VOCABULARY, D_OUT))
