"""The device tier's tables for kernels: sheets that say what resident slots are, and what a step is told of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from server.adapters.device.device import DeviceTier
from server.adapters.device.slot_tables import SlotTables
from server.adapters.host import HostTier
from server.adapters.method import Lowered
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops.sheets import DOWN, NUM_FIELDS, OUT_SCALE, RANK, UP, StepTables
from tests.adapters.random_edits import random_adapter, random_edit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


class Tier:
    """A device tier with tables, and what is to be seen of them."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.host = HostTier(1 << 30, torch.float32)
        self.device = DeviceTier(base.sites, 8 << 20, torch.float32, CPU, has_tables=True)

    @property
    def tables(self) -> SlotTables:
        assert self.device._tables is not None
        return self.device._tables

    def admit(self, name: str, lowered: Lowered) -> int:
        return self.device.admit(name, self.host.put(name, lowered))

    def step(self, slots: Sequence[int], kept: Sequence[int]) -> StepTables:
        step = self.device.tables(slots, kept)
        assert step is not None
        return step

    def sheet(self, number: int) -> torch.Tensor:
        return self.tables._entries[number].sheet


@pytest.fixture
def tier(base: Base) -> Tier:
    return Tier(base)


def on_site(base: Base, path: str, **options: object) -> Lowered:
    site = base.sites.by_path[path]
    return Lowered("test", 4, 1, {path: random_edit(site, **options)})  # type: ignore[arg-type]


def num_runs(step: StepTables) -> tuple[int, int]:
    return step.tokens.by_down.num, step.tokens.by_up.num


def test_a_sheet_leads_to_the_adapters_rows(tier: Tier) -> None:
    lowered = random_adapter(tier.base.sites.by_path.values(), 3)
    sheet = tier.sheet(tier.admit("one", lowered))
    for path, site in tier.base.sites.by_path.items():
        fields = sheet[site.index * NUM_FIELDS : (site.index + 1) * NUM_FIELDS].tolist()
        edit = lowered.edits.get(path)
        rank = 0 if edit is None or edit.down is None else len(edit.down)
        assert fields[RANK] == rank
        for width, at, matrix in ((site.d_in, DOWN, edit and edit.down), (site.d_out, UP, edit and edit.up)):
            if rank:
                assert isinstance(matrix, torch.Tensor)
                rows = tier.device.row_view(width)[sheet[fields[at] : fields[at] + rank].long()]
                assert torch.equal(rows, matrix)
        if edit is not None and edit.out_scale is not None:
            assert torch.equal(tier.device.row_view(site.d_out)[fields[OUT_SCALE]], edit.out_scale)


def test_a_step_of_the_bare_base_has_no_tables(tier: Tier) -> None:
    tier.admit("one", random_adapter(tier.base.sites.by_path.values(), 1))
    assert tier.device.tables([0, 0], [0]) is None


def test_adapters_are_one_run_where_they_share_rows(tier: Tier) -> None:
    path = "model.layers.0.self_attn.q_proj"
    one, two = (random_edit(tier.base.sites.by_path[path], seed=seed, rank=3) for seed in range(2))
    mixed = type(one)(down=one.down, up=two.up)
    slots = [tier.admit(str(i), Lowered("test", 3, 1, {path: edit})) for i, edit in enumerate((one, two, mixed))]
    assert num_runs(tier.step(slots, [])) == (2, 2)
    tier.device.release("0")
    assert num_runs(tier.step(slots[1:], [])) == (2, 1)


def test_adapters_of_vectors_alone_are_one_run(tier: Tier) -> None:
    paths = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")
    slots = [tier.admit(p, on_site(tier.base, p, seed=1, rank=0, fields=["out_scale"])) for p in paths]
    assert num_runs(tier.step(slots, [])) == (1, 1)


def test_a_step_names_the_sites_that_its_own_adapters_edit(tier: Tier) -> None:
    paths = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    fields = {paths[0]: ["in_scale"], paths[1]: ["out_shift"]}
    slots = [tier.admit(p, on_site(tier.base, p, seed=1, rank=i, fields=fields[p])) for i, p in enumerate(paths)]
    down, up = (1 << tier.base.sites.by_path[path].index for path in paths)
    step = tier.step([0, slots[0]], [0])
    assert (step.edited, step.scaled, step.with_rows) == (down, down, 0)
    both = tier.step(slots, [])
    assert (both.edited, both.scaled, both.with_rows) == (down | up, down, up)


def test_steps_of_the_same_slots_share_their_tables_until_a_slot_changes(tier: Tier) -> None:
    path = "model.layers.0.self_attn.q_proj"
    first = tier.admit("first", on_site(tier.base, path, seed=0, rank=3))
    step = tier.step([first, 0], [first])
    assert tier.step([first, 0], [first]) is step
    assert tier.step([0, first], [first]) is not step
    step = tier.step([first, 0], [first])
    tier.admit("second", on_site(tier.base, "model.layers.1.mlp.up_proj", seed=1, rank=4))
    assert tier.step([first, 0], [first]) is not step
    tier.device.release("first")
    again = tier.admit("again", on_site(tier.base, "model.layers.1.mlp.up_proj", seed=2, rank=2))
    assert again == first
    assert tier.step([first, 0], [first]).edited == 1 << tier.base.sites.by_path["model.layers.1.mlp.up_proj"].index


def test_more_slots_than_there_were_places(tier: Tier) -> None:
    """A step that was given the smaller table keeps it, and what it says of its own slots stays true."""
    path = "model.layers.0.self_attn.q_proj"
    first = tier.admit("first", on_site(tier.base, path, seed=0, rank=1))
    before = tier.step([first], [])
    num_places = len(before.sheets.addresses)
    numbers = [tier.admit(str(i), on_site(tier.base, path, seed=i, rank=1)) for i in range(1, num_places + 2)]
    after = tier.step([first, numbers[-1]], [])
    assert len(after.sheets.addresses) == 2 * num_places
    assert before.sheets.addresses[first] == after.sheets.addresses[first] == tier.sheet(first).data_ptr()
    assert after.sheets.addresses[numbers[-1]] == tier.sheet(numbers[-1]).data_ptr()


def test_a_released_slots_number_stands_for_the_base(tier: Tier) -> None:
    adapter = random_adapter(tier.base.sites.by_path.values(), 1)
    number = tier.admit("one", adapter)
    tier.device.release("one")
    assert tier.tables._addresses[number] == tier.tables._addresses[0]
    assert not tier.tables._classes[:, number].any()
    assert tier.tables._class_of == ({}, {})
    assert tier.admit("two", adapter) == number


def test_the_heads_rows_are_ordered_only_where_an_adapter_edits_the_head(tier: Tier) -> None:
    paths = ("model.layers.0.self_attn.q_proj", "lm_head")
    slots = [
        tier.admit(path, on_site(tier.base, path, seed=1, rank=rank)) for path, rank in zip(paths, (1, 17), strict=True)
    ]
    assert tier.step(slots[:1], slots[:1]).kept is None
    both = tier.step(slots, [slots[1], 0])
    assert both.sheets.max_rank == 32
    assert both.kept is not None
    assert both.kept.slots.tolist() == [slots[1], 0]
