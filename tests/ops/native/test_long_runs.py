"""Long runs: products of a library in the midst of the kernels' own loops, with the same result."""

import pytest
import torch

from server.ops import native
from server.ops.native.long_runs import LONGEST
from server.ops.runs import Stretch, long_stretches
from tests.ops.resident import EVERY_FIELD, Resident, Shape, drawn, normal

CPU = torch.device("cpu")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the norm of what is added; rounded twice in 16 bits


def check(case: Resident, slots: list[int], *, is_joint: bool = True) -> None:
    x = normal(len(slots), case.d_in, seed=1).to(case.dtype)
    y = torch.zeros(len(slots), sum(case.widths), dtype=case.dtype)
    tokens = case.runs(slots)
    h = native.shrink(x, case.group, case.sheets, tokens)
    parts = y.split(case.widths, dim=1)
    if is_joint:
        native.expand(y, h, case.group, case.sheets, tokens)
    else:
        for member, part in enumerate(parts):
            native.expand(part, h, case.group, case.sheets, tokens, member=member)
    base = torch.zeros_like(y).split(case.widths, dim=1)
    expected = torch.cat([case.expected(x, part, slots, m) for m, part in enumerate(base)], dim=1)
    assert (y.double() - expected).norm() / expected.norm() < LIMITS[case.dtype]
    bare = [token for token, slot in enumerate(slots) if not slot]
    assert not y[bare].any()


@pytest.mark.parametrize("is_joint", [True, False], ids=["side by side", "one by one"])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_chunks_of_all_lengths_beside_decodes(dtype: torch.dtype, is_joint: bool) -> None:
    case = Resident(130, (48, 33, 7), dtype, CPU)
    shapes = [Shape(8), EVERY_FIELD, Shape(40, ("out_scale",)), Shape(0, ("out_shift",)), Shape(64)]
    slots = [
        # Of the last, one member has nothing.
        case.admit({member: drawn(case, member, shape, 10 * n + member) for member in range(2 if n == 4 else 3)})
        for n, shape in enumerate(shapes)
    ]
    chunks = [[slot] * length for slot, length in zip(slots, (200, 41, 64, 90, 130), strict=True)]
    check(case, [*slots, 0, *(token for chunk in chunks for token in chunk), 0, slots[1]], is_joint=is_joint)


def test_adapters_that_share_rows_are_one_product_and_differ_in_their_vectors() -> None:
    case = Resident(64, (48,), torch.float32, CPU)
    first = drawn(case, 0, EVERY_FIELD, 1)
    slots = [case.admit({0: edit}) for edit in (first, drawn(case, 0, EVERY_FIELD, 2, first, "down up"))]
    check(case, [slot for _ in range(70) for slot in slots])


def test_a_chunk_is_one_stretch_and_short_runs_are_none() -> None:
    case = Resident(16, (16,), torch.float32, CPU)
    one, two, three = (case.admit({0: drawn(case, 0, Shape(2), seed)}) for seed in range(3))
    tokens = case.runs([one] * 200 + [two] * 30 + [three] * 64)
    # 200 are three runs of 64 and one of 8, which the kernels' own loops take.
    found = long_stretches(tokens.slots, tokens.by_down, LONGEST)
    assert found == (Stretch(0, 192, one, slice(0, 192)), Stretch(230, 294, three, slice(230, 294)))
    assert long_stretches(tokens.slots, tokens.by_down, LONGEST) is found
    decodes = case.runs([one, two, one])
    assert long_stretches(decodes.slots, decodes.by_down, LONGEST) == ()
