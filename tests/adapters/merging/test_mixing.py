"""A mix is the weighted sum of what its adapters change in the base's outputs: exactly, or not at all."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.lowering import lower
from server.adapters.merging.mixing import Mixed, MixedEdit, Part, mix
from server.adapters.method import Edit, Lowered
from server.ground.errors import BadRequest
from tests.adapters.dense import DenseSite, apply, edited_logits, sites_of
from tests.adapters.peft_adapters import make_adapter
from tests.adapters.peft_mixes import merged_logits
from tests.adapters.random_edits import random_edit

PATH = "site"
SHAPES: Mapping[str, tuple[int, Sequence[str]]] = {
    "lora": (3, ()),
    "lora-shifted": (2, ("out_shift",)),
    "vera": (4, ("mid_scale", "up_scale")),
    "bottleneck": (2, ("mid_scale", "mid_shift")),
    "dora": (3, ("out_scale", "out_shift")),
    "ia3": (0, ("out_scale",)),
    "ia3-input": (0, ("in_scale",)),
    "bias": (0, ("out_shift",)),
}


@pytest.fixture
def site() -> DenseSite:
    torch.manual_seed(7)
    return DenseSite(0, PATH, nn.Linear(12, 10))


def edit_of(site: DenseSite, shape: str, seed: int) -> Edit:
    rank, fields = SHAPES[shape]
    return random_edit(site, seed, rank, fields)


def mixed(parts: Mapping[str, tuple[Edit, float]]) -> MixedEdit:
    edits = [Part(name, Lowered("test", 1, 1, {PATH: edit}, weight=weight)) for name, (edit, weight) in parts.items()]
    return mix(edits).edits[PATH]


def joined(edit: MixedEdit) -> Edit:
    """The same with all rows in one tensor, as the oracle takes it."""
    return Edit(**{name: torch.cat(tensors) for name, tensors in edit.stored().items()})


def assert_sums(site: DenseSite, parts: Mapping[str, tuple[Edit, float]], sum_of: MixedEdit) -> None:
    base = site.module.double()
    x = torch.randn(5, site.d_in, generator=torch.Generator().manual_seed(1)).double()

    def output(edit: Edit) -> torch.Tensor:
        return apply(_double(edit), base, x, ids=False)

    expected = base(x) + sum(weight * (output(edit) - base(x)) for edit, weight in parts.values())
    torch.testing.assert_close(output(joined(sum_of)), expected, rtol=1e-5, atol=1e-5)


def _double(edit: Edit) -> Edit:
    return replace(edit, **{name: tensor.double() for name, tensor in edit.tensors().items()})


# The algebra


def fits(shapes: Sequence[str]) -> bool:
    return not ("ia3-input" in shapes and {"dora", "ia3"} & set(shapes))


PAIRS = [pair for pair in itertools.combinations_with_replacement(SHAPES, 2) if fits(pair)]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_a_mix_changes_the_output_by_the_weighted_sum_of_its_parts_changes(
    site: DenseSite, one: str, other: str
) -> None:
    parts = {"a": (edit_of(site, one, 1), 0.7), "b": (edit_of(site, other, 2), -0.4)}
    assert_sums(site, parts, mixed(parts))


def test_many_parts_of_all_kinds_sum_up(site: DenseSite) -> None:
    shapes = [shape for shape in SHAPES if shape != "ia3-input"]
    parts = {shape: (edit_of(site, shape, seed), 0.2 * seed - 0.5) for seed, shape in enumerate(shapes)}
    assert_sums(site, parts, mixed(parts))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5, -1.0])
def test_a_weight_on_one_adapter_is_so_much_of_its_change(site: DenseSite, shape: str, weight: float) -> None:
    parts = {"a": (edit_of(site, shape, 1), weight)}
    assert_sums(site, parts, mixed(parts))


@pytest.mark.parametrize("others", [("dora",), ("ia3",), ("lora", "ia3")])
def test_scales_of_input_and_of_output_at_one_site_are_refused_by_name(site: DenseSite, others: Sequence[str]) -> None:
    parts = {"inner": (edit_of(site, "ia3-input", 1), 1.0)}
    parts |= {f"outer-{shape}": (edit_of(site, shape, 2), 1.0) for shape in others}
    with pytest.raises(BadRequest, match=f"inner scales the input of {PATH} and outer-{others[-1]} its output") as told:
        mixed(parts)
    assert told.value.param == "adapter"


def test_scales_that_cancel_an_output_leave_no_place_for_rows(site: DenseSite) -> None:
    """1 + (l - 1) + (-1)(1 - 0) = 0 where both scale the same output away."""
    none = Edit(out_scale=torch.zeros(site.d_out))
    with pytest.raises(BadRequest, match=f"scale an output of {PATH} to nothing"):
        mixed({"off": (none, 1.0), "lora": (edit_of(site, "lora", 1), 1.0)})
    alone = mixed({"off": (none, 0.5), "also": (none, 0.5)})
    assert joined(alone).tensors()["out_scale"].eq(0).all(), "without rows nothing is divided"


# What is shared


@pytest.mark.parametrize("shape", ["lora", "lora-shifted", "bottleneck"])
def test_the_rows_of_a_mix_are_those_of_its_parts(site: DenseSite, shape: str) -> None:
    one, other = edit_of(site, shape, 1), edit_of(site, shape, 2)
    stored = mixed({"a": (one, 0.7), "b": (other, 0.3)}).stored()
    assert stored["down"][0] is one.down
    assert stored["down"][1] is other.down
    assert stored["up"][0] is one.up
    assert stored["up"][1] is other.up


def test_one_scale_for_all_rows_copies_none(site: DenseSite) -> None:
    """LoRA beside IA3: what divides the rows is a vector."""
    lora, other = edit_of(site, "lora", 1), edit_of(site, "lora", 3)
    edit = mixed({"a": (lora, 0.7), "b": (edit_of(site, "ia3", 2), 0.5), "c": (other, 1.0)})
    assert (edit.stored()["up"][0] is lora.up, edit.stored()["up"][1] is other.up) == (True, True)
    assert "up_scale" in edit.vectors


def test_dora_keeps_its_rows_beside_others(site: DenseSite) -> None:
    dora, lora = edit_of(site, "dora", 1), edit_of(site, "lora", 2)
    stored = mixed({"a": (dora, 1.0), "b": (lora, 0.5)}).stored()
    assert stored["up"][0] is dora.up
    assert stored["up"][1] is not lora.up
    assert stored["out_scale"][0] is dora.out_scale


def test_what_is_the_identity_is_left_out(site: DenseSite) -> None:
    edit = mixed({"a": (edit_of(site, "lora", 1), 1.0), "b": (edit_of(site, "lora", 2), 1.0)})
    assert edit.vectors == {}


def test_sites_of_one_part_alone_are_in_the_mix(site: DenseSite) -> None:
    one, other = edit_of(site, "lora", 1), edit_of(site, "ia3", 2)
    parts = [
        Part("a", Lowered("test", 3, 10, {"q": one}, weight=0.5)),
        Part("b", Lowered("test", 0, 5, {"v": other, "q": edit_of(site, "lora", 3)}, weight=2.0)),
    ]
    result = mix(parts)
    assert result.edits.keys() == {"q", "v"}
    assert (result.rank, result.num_parameters, result.method) == (6, 15, "mix")
    assert result.edits["v"].stored().keys() == {"out_scale"}


def test_a_mix_on_the_host_shares_the_rows_of_its_parts(site: DenseSite) -> None:
    host = HostTier(1 << 20, torch.bfloat16)
    one, other = (Lowered("lora", 3, 1, {PATH: edit_of(site, "lora", seed)}) for seed in (1, 2))
    parts = [host.put("a", one), host.put("b", other)]
    before = host.used_bytes
    made = host.put("mix", mix([Part("a", replace(one, weight=0.7)), Part("b", replace(other, weight=0.3))]))
    edit = made.edits[PATH]
    assert edit.down == tuple(part.edits[PATH].down[0] for part in parts)
    assert edit.rank == 6
    assert edit.mid_scale is not None
    assert edit.mid_scale.tensor.tolist() == pytest.approx([0.7] * 3 + [0.3] * 3)
    assert host.used_bytes == before + edit.mid_scale.tensor.nbytes


# The meaning of a weight, against PEFT


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return model.eval()


IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))


def lowered_mix(dense: PreTrainedModel, parts: Mapping[Path, float]) -> Mixed:
    sites = sites_of(dense)
    return mix([Part(folder.name, lower(Checkpoint.open(folder), sites, w)) for folder, w in parts.items()])


@pytest.mark.parametrize("weight", [0.4, -1.5])
@pytest.mark.parametrize("kind", ["lora", "rslora", "lora-bias-of-b", "dora", "dora-rslora", "vera", "ia3"])
def test_a_weight_means_what_peft_means_by_a_scaling(
    dense: PreTrainedModel, kind: str, weight: float, tmp_path: Path
) -> None:
    """LoRA and DoRA: scaling times the weight. VeRA: lambda_b times the weight. IA3: l is 1 + w (l - 1)."""
    parts = {make_adapter(dense, kind, tmp_path / kind, 1, strength=0.5): weight}
    edits = {path: joined(edit) for path, edit in lowered_mix(dense, parts).edits.items()}
    torch.testing.assert_close(edited_logits(dense, edits, IDS), merged_logits(dense, parts, IDS), rtol=1e-4, atol=1e-4)


def test_what_turns_outputs_has_no_weight_and_no_sum(dense: PreTrainedModel, tmp_path: Path) -> None:
    turned, plain = (make_adapter(dense, kind, tmp_path / kind, 1) for kind in ("road", "lora"))
    for parts in ({turned: 0.5}, {plain: 1.0, turned: 1.0}):
        with pytest.raises(BadRequest, match="road cannot be mixed .* has pair_rotation .* alone, without a weight"):
            lowered_mix(dense, parts)


def test_dora_with_a_weight_keeps_the_rows_of_the_unweighted_one(dense: PreTrainedModel, tmp_path: Path) -> None:
    """So that they are stored once; the weight is beside them, and the lengths are computed anew."""
    checkpoint = make_adapter(dense, "dora", tmp_path / "dora", 1)
    plain, half = (lower(Checkpoint.open(checkpoint), sites_of(dense), weight) for weight in (1.0, 0.5))
    for path, edit in plain.edits.items():
        other = half.edits[path]
        assert edit.up is not None
        assert other.up is not None
        assert torch.equal(edit.up, other.up)
        assert other.mid_scale is not None
        assert set(other.mid_scale.tolist()) == {0.5}
        assert not torch.equal(edit.tensors()["out_scale"], other.tensors()["out_scale"])
    assert (plain.weight, half.weight) == (1.0, 1.0), "nothing of the weight is left to be given"
