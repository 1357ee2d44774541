"""The bottleneck's op against its Semantics, token by token in float64, for any mix of lanes and runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from random import Random

import pytest
import torch
import torch.nn.functional as F

from server.ops.edits import Run
from server.ops.site_ops import bottleneck as ops_bottleneck
from server.ops.site_ops.bottleneck import _FUNCTIONS, ACTIVATIONS, Bottleneck, KeepStream
from server.ops.site_ops.site_op import OpTokens

WIDTH = 6
BOTTLENECK, KEEP = Bottleneck(), KeepStream()


@dataclass(frozen=True)
class Place:
    """A linear that is as wide as the residual stream, or the norm before it."""

    kind: str = "linear"
    index: int = 0
    d_in: int = WIDTH
    d_out: int = WIDTH
    gain: float = 1.0

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def adapter(rank: int, seed: int, **kinds: float) -> dict[str, torch.Tensor]:
    """Random tensors of a lane. `stream` and `output` are what it reads; `before`, `after` and `last` its norms."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (rank, WIDTH), "down_bias": (rank,), "up": (rank, WIDTH), "up_bias": (WIDTH,)}
    shapes |= {name: (2, WIDTH) for name in ("before", "after") if name in kinds}
    own = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "after" in kinds:
        own["is_last"] = torch.tensor([kinds.get("last", 0.0)])
    act = torch.tensor([float(seed % len(ACTIVATIONS))])
    return own | {"act": act, "reads": torch.tensor([kinds.get("output", 1.0), kinds.get("stream", 0.0)])}


ADAPTERS = [
    adapter(3, 0),
    adapter(1, 1, stream=1.0),
    adapter(5, 2, stream=1.0, output=0.0),
    adapter(2, 3, before=1.0),
    adapter(4, 4, after=1.0, stream=1.0),
    adapter(4, 4, after=1.0, last=1.0, before=1.0),
]


def by_definition(own: Mapping[str, torch.Tensor], y: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
    """One token's new output, (WIDTH,) float64."""
    own = {name: tensor.double() for name, tensor in own.items()}
    z = own["reads"][0] * y
    if stream is not None:
        z = z + own["reads"][1] * stream
    if "before" in own:
        z = F.layer_norm(z, (WIDTH,), *own["before"])
    h = _FUNCTIONS[ACTIVATIONS[int(own["act"])]](own["down"] @ z + own["down_bias"])
    u = own["up"].T @ h + own["up_bias"]
    if "after" not in own:
        return y + u
    return (
        F.layer_norm(y + u, (WIDTH,), *own["after"]) if own["is_last"] else y + F.layer_norm(u, (WIDTH,), *own["after"])
    )


def tokens_of(lanes: list[int], num_mixed: int) -> OpTokens:
    runs, place = [], num_mixed
    for lane, group in groupby(lanes[num_mixed:]):
        start, place = place, place + len(list(group))
        runs += [Run(start, place, lane)] if lane else []
    return OpTokens(torch.tensor(lanes), num_mixed, tuple(runs), torch.zeros(len(lanes), dtype=torch.int64))


@pytest.fixture(params=["lane by lane", "all rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways for mixed tokens, that of a GPU too."""
    monkeypatch.setattr(ops_bottleneck, "_reads_all_rows", lambda device: request.param == "all rows")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(12))
def test_every_token_gets_what_its_own_adapter_gives_it(seed: int) -> None:
    rng = Random(seed)
    chosen = rng.sample(ADAPTERS, rng.randint(1, len(ADAPTERS)))
    mixed = [rng.randint(0, len(chosen)) for _ in range(rng.randint(0, 9))]
    runs = [lane for _ in range(rng.randint(0, 3)) for lane in [rng.randint(0, len(chosen))] * rng.randint(1, 4)]
    lanes = [*mixed, *runs] or [0]
    tokens = tokens_of(lanes, len(mixed))
    stream, y = torch.randn(2, len(lanes), WIDTH, generator=torch.Generator().manual_seed(seed))
    KEEP.before(stream, {}, tokens, Place("norm"))
    stacked = BOTTLENECK.stack(chosen, Place())
    got = BOTTLENECK.after(y.clone(), y, stacked, tokens, Place())
    for token, lane in enumerate(lanes):
        if lane:
            wanted = by_definition(chosen[lane - 1], y[token].double(), stream[token].double())
            torch.testing.assert_close(got[token].double(), wanted, rtol=1e-4, atol=1e-4)
        else:
            assert got[token].equal(y[token])


def test_what_no_norm_has_kept_is_not_needed_by_who_does_not_read_it() -> None:
    y = torch.randn(3, WIDTH)
    got = BOTTLENECK.after(y.clone(), y, BOTTLENECK.stack(ADAPTERS[:1], Place()), tokens_of([1, 0, 1], 3), Place())
    wanted = by_definition(ADAPTERS[0], y[0].double(), None)
    torch.testing.assert_close(got[0].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_a_token_out_of_range_stays_a_matter_of_its_own() -> None:
    """Infinity in one row of a batch reaches no other row."""
    lanes = [1, 2, 0, 1, 1]
    y = torch.ones(5, WIDTH)
    y[1] = torch.inf
    y[2] = torch.nan
    got = BOTTLENECK.after(y.clone(), y, BOTTLENECK.stack(ADAPTERS[:2], Place()), tokens_of(lanes, 3), Place())
    assert [bool(row.isfinite().all()) for row in got] == [True, False, False, True, True]


def test_sixteen_bit_outputs_keep_their_type_and_the_base_its_bits() -> None:
    y = torch.randn(4, WIDTH).bfloat16()
    got = BOTTLENECK.after(y.clone(), y, BOTTLENECK.stack(ADAPTERS[:1], Place()), tokens_of([0, 1, 0, 1], 4), Place())
    assert got.dtype is torch.bfloat16
    assert got[0].equal(y[0])
    wanted = by_definition(ADAPTERS[0], y[1].double(), None)
    torch.testing.assert_close(got[1].double(), wanted, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"up": torch.ones(3, 5)}, r"its up has the shape \[3, 5\], and this base needs \[3, 6\]"),
        ({"down_bias": torch.ones(2)}, "its down_bias has the shape"),
        ({"before": torch.ones(6)}, "its before has the shape"),
        ({"act": torch.tensor([99.0])}, "its act is 99.0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BOTTLENECK.check(ADAPTERS[0] | changed, Place())


def test_the_stream_is_kept_at_norms_alone() -> None:
    KEEP.check({}, Place("norm"))
    with pytest.raises(ValueError, match="this is a linear"):
        KEEP.check({}, Place())
