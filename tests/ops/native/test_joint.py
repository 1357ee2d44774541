"""One call for a group: shrink and expand to the bit, as often as it is called, and nothing where they differ."""

from dataclasses import replace

import pytest
import torch

from server.ops import native
from tests.ops.resident import EVERY_FIELD, Resident, Shape, drawn, normal

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
@pytest.mark.parametrize(
    "shapes",
    [[Shape(8), Shape(8)], [EVERY_FIELD, Shape(17), Shape(0, ("out_shift",))], [Shape(0, ("out_scale",))]],
    ids=["plain", "every field", "no rows"],
)
def test_it_is_shrink_and_expand_in_one(shapes: list[Shape], dtype: torch.dtype) -> None:
    case = Resident(70, (40, 9), dtype, CPU)
    slots = [
        case.admit({member: drawn(case, member, shape, 10 * n + member) for member in range(2)})
        for n, shape in enumerate(shapes)
    ]
    tokens = case.runs([*slots, 0, slots[0]])
    has_rows = any(shape.rank for shape in shapes)
    apply = native.joint(case.group, case.sheets, tokens, has_rows=has_rows)
    assert apply is not None
    for seed in (1, 2):  # the same call for another step
        x = normal(len(slots) + 2, 140, seed=seed).to(dtype)[:, ::2]
        y = normal(len(slots) + 2, 49, seed=seed + 5).to(dtype)
        expected = y.clone()
        h = native.shrink(x, case.group, case.sheets, tokens) if has_rows else None
        native.expand(expected, h, case.group, case.sheets, tokens)
        apply(y, x)
        assert torch.equal(y, expected)


def test_embeddings_and_long_runs_have_none() -> None:
    case = Resident(16, (16,), torch.float32, CPU)
    slot = case.admit({0: drawn(case, 0, Shape(2), 1)})
    assert native.joint(case.group, case.sheets, case.runs([slot] * 41), has_rows=True) is None
    assert native.joint(case.group, case.sheets, case.runs([slot] * 40), has_rows=True) is not None
    embedding = replace(case.group, is_embedding=True)
    assert native.joint(embedding, case.sheets, case.runs([slot]), has_rows=True) is None
