"""An edit as a change of weights: folded in, it does what it did beside the weight."""

import itertools

import pytest
import torch

from server.adapters.merging.change import Change, change_of, what_is_no_change
from server.adapters.merging.folding import FOLDED
from server.adapters.method import Edit, Lowered
from server.ops.site_ops import SITE_OPS
from tests.adapters.dense import apply

D_IN, D_OUT, RANK = 5, 7, 3
CPU = torch.device("cpu")
SHAPES = {
    "mid_scale": (RANK,),
    "mid_shift": (RANK,),
    "in_scale": (D_IN,),
    "up_scale": (D_OUT,),
    "out_scale": (D_OUT,),
    "out_shift": (D_OUT,),
}


@pytest.mark.parametrize(
    "fields", [names for n in range(len(SHAPES) + 1) for names in itertools.combinations(SHAPES, n)], ids=" ".join
)
@pytest.mark.parametrize("has_rows", [True, False])
def test_every_combination_of_fields_folds_into_weight_and_bias(fields: tuple[str, ...], has_rows: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if name in fields}
    rows = {"down": torch.randn(RANK, D_IN), "up": torch.randn(RANK, D_OUT)} if has_rows else {}
    edit = Edit(**draw, **rows)
    weight, bias, x = torch.randn(D_OUT, D_IN), torch.randn(D_OUT), torch.randn(4, D_IN)
    change = change_of(edit)
    delta, shift = change.of_weight(weight, CPU), change.of_bias(bias)
    folded = x @ (weight if delta is None else weight + delta).T + (bias if shift is None else bias + shift)
    torch.testing.assert_close(folded, apply(edit, lambda x: x @ weight.T + bias, x, ids=False), rtol=1e-4, atol=1e-4)


def test_a_low_rank_change_needs_no_weight_and_a_scale_does() -> None:
    assert Change().of_weight(None, CPU) is None
    with pytest.raises(ValueError, match="needs the weight"):
        Change(out_scale=torch.ones(D_OUT)).of_weight(None, CPU)


def test_an_op_is_a_change_of_weights_for_those_alone_who_fold_it() -> None:
    ops = {"pair_rotation": {}, "norm_weight": {}}
    lowered = Lowered("turned", 0, 1, {"q": Edit(ops=ops)})
    assert what_is_no_change(lowered) == "its turned has norm_weight and pair_rotation beside the normal form"
    assert what_is_no_change(lowered, FOLDED) == "its turned has norm_weight beside the normal form"
    assert what_is_no_change(lowered, FOLDED | {"norm_weight"}) is None
    assert SITE_OPS.keys() >= FOLDED


def test_what_dora_gives_back_of_the_bias_is_no_change_of_it() -> None:
    scale, bias = torch.rand(D_OUT) + 0.5, torch.randn(D_OUT)
    assert change_of(Edit(out_scale=scale, out_shift=(1 - scale) * bias)).of_bias(bias) is None
