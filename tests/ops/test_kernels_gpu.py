"""The kernels on a GPU in 16 bits, against float64 on the very same numbers, and held by a CUDA graph."""

from collections.abc import Sequence

import pytest
import torch

from tests.ops.resident import EVERY_FIELD, Resident, Shape, drawn, normal

pytest.importorskip("triton")
from server.ops import kernels
from server.ops.kernels import expand, shrink
from tests.ops.test_kernels import Cached, Device, Heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the norm of what is added. Inputs and rows are exact; the hidden activations and the result are rounded once each:
# half a unit in the last of 8 or 11 bits, and some room.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


def relative_error(case: Resident, slots: Sequence[int]) -> float:
    tokens, group, table = case.runs(slots), case.group, case.sheets
    x = normal(len(slots), case.d_in, seed=1).to(case.dtype).to(DEVICE)
    base = torch.zeros(len(slots), sum(case.widths), dtype=case.dtype, device=DEVICE)
    y = base.clone()
    expand(y, shrink(x, group, table, tokens), group, table, tokens)
    parts = base.split(case.widths, dim=1)
    expected = torch.cat([case.expected(x, part, slots, m) for m, part in enumerate(parts)], dim=1)
    return ((y.double().cpu() - expected).norm() / expected.norm()).item()


@dtypes
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 100], ids=str)
def test_mixed_ranks_and_every_field(dtype: torch.dtype, num_tokens: int) -> None:
    case = Resident(320, (320, 64, 33), dtype, DEVICE)
    shapes = [Shape(8), Shape(64), EVERY_FIELD, Shape(17, ("out_scale", "out_shift")), Shape(0, ("out_shift",))]
    slots = [
        case.admit({member: drawn(case, member, shape, 10 * number + member) for member in range(3)})
        for number, shape in enumerate(shapes)
    ]
    assert relative_error(case, [0, *slots * num_tokens]) < LIMITS[dtype]


@dtypes
def test_shared_projections_of_a_high_rank(dtype: torch.dtype) -> None:
    case = Resident(256, (48,), dtype, DEVICE)
    first = drawn(case, 0, Shape(256, ("mid_scale", "up_scale")), 1)
    edits = [first, *(drawn(case, 0, Shape(256, ("mid_scale", "up_scale")), n, first, "down up") for n in range(2, 9))]
    slots = [case.admit({0: edit}) for edit in edits]
    assert relative_error(case, slots * 5) < LIMITS[dtype]


@dtypes
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_decode_attention(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    cached = Cached(
        Device(kernels, DEVICE), [1, 63, 64, 500], Heads(2, 4, 128, 64, window, softcap, True), dtype, seed=3
    )
    expected = cached.expected()
    error = (cached.decode().double() - expected).norm() / expected.norm()
    assert error < LIMITS[dtype]


def test_a_graph_follows_slots_that_change() -> None:
    """Captured once; replayed with other adapters, and with none, by writing into the tensors that it holds."""
    case = Resident(64, (64,), torch.float16, DEVICE)
    slots = [case.admit({0: drawn(case, 0, Shape(rank), rank)}) for rank in (4, 30, 16)]
    x = normal(4, 64, seed=1).half().to(DEVICE)
    y, group, table = torch.zeros(4, 64, dtype=torch.float16, device=DEVICE), case.group, case.sheets
    tokens = case.runs([slots[0]] * 4, is_static=True)
    expand(y, shrink(x, group, table, tokens), group, table, tokens)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        expand(y, shrink(x, group, table, tokens), group, table, tokens)
    for batch in ([slots[1], 0, slots[2], slots[0]], [slots[2]] * 4, [0] * 4):
        other = case.runs(batch, is_static=True)
        tokens.slots.copy_(other.slots)
        for held, new in ((tokens.by_down, other.by_down), (tokens.by_up, other.by_up)):
            held.order.copy_(new.order)
            held.starts.copy_(new.starts)
        y.zero_()
        graph.replay()
        expected = case.expected(x, torch.zeros_like(y), batch, 0)
        assert (y.double().cpu() - expected).norm() <= LIMITS[torch.float16] * expected.norm()
