"""Adapters of two parts and adapters with ops on the device tier: their slots, their bytes, and their tokens."""

from pathlib import Path

import pytest
import torch

from server.adapters.device.device import DeviceTier
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.method import Edit, Lowered
from server.adapters.positions import PromptEnds, Reach
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import SiteKind
from tests.adapters.random_edits import random_adapter

RULE = PromptEnds(1, 1, last_part=2)


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def host(request: pytest.FixtureRequest) -> HostTier:
    return HostTier(1 << 30, request.param)


def tier(base: Base, host: HostTier) -> DeviceTier:
    return DeviceTier(base.sites, 8 << 20, host.dtype, base.device)


def of_two_parts(base: Base, host: HostTier) -> HostAdapter:
    first, last = (random_adapter(base.sites.by_path.values(), seed).edits for seed in (1, 2))
    return host.put("two parts", Lowered("random", 3, 1, first, positions=RULE, last_edits=last))


def with_tokens(base: Base, host: HostTier, name: str, num: int, seed: int = 0) -> HostAdapter:
    """Rows of an embedding's table; 40 of them are in the buffer, one is too small for that."""
    site = next(site for site in base.sites.sites if site.kind is SiteKind.EMBEDDING)
    rows = torch.randn(num, site.d_out, generator=torch.Generator().manual_seed(seed))
    edit = Edit(ops={"token_rows": {"ids": torch.arange(float(num)), "rows": rows}})
    return host.put(name, Lowered("rows", 0, 1, {site.path: edit}))


def test_each_part_has_a_slot_and_they_leave_together(base: Base, host: HostTier) -> None:
    device, adapter = tier(base, host), of_two_parts(base, host)
    slot = device.admit("two parts", adapter)
    assert device.reach(slot) == Reach((1, 2), RULE)
    assert device.num_slots == 2
    assert device.used_bytes == device.resident_bytes(adapter)
    assert device.release("two parts") == device.resident_bytes(adapter)
    assert (device.num_slots, device.used_bytes, device.reach(slot)) == (0, 0, None)


def test_parts_take_slots_that_are_free(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    plain = host.put("plain", random_adapter(base.sites.by_path.values(), 3))
    assert [device.admit(name, plain) for name in ("one", "two", "three")] == [1, 2, 3]
    device.release("two")
    slot = device.admit("two parts", of_two_parts(base, host))
    assert device.reach(slot) == Reach((2, 4), RULE)
    assert device.admit("four", plain) == 5
    device.release("two parts")
    assert device.admit("five", plain) == 2


@pytest.mark.parametrize("num", [40, 1])
def test_an_ops_tensors_come_back_from_the_device_as_they_were(base: Base, host: HostTier, num: int) -> None:
    """In float32, whatever rank rows are served in."""
    device, adapter = tier(base, host), with_tokens(base, host, f"{num} rows", num)
    slot = device.admit("rows", adapter)
    site = next(iter(adapter.edits))
    step = device.ops([slot, 0], [], 2, torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64))
    assert step is not None
    [placed] = step.at(base.sites.by_path[site].index, is_head=False)
    host_rows = adapter.edits[site].ops["token_rows"]["rows"].tensor
    assert torch.equal(placed.stacked["rows"][1], host_rows)
    assert placed.tokens.lanes.tolist() == [1, 0]
    assert (device.used_bytes > 0) == (num == 40)
    device.release("rows")
    assert device.used_bytes == 0


def test_equal_tensors_of_ops_are_stored_once(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    one, twin, other = (with_tokens(base, host, f"twin-{n}", 40, seed) for n, seed in enumerate((0, 0, 1)))
    device.admit("one", one)
    taken = device.used_bytes
    device.admit("twin", twin)
    assert device.used_bytes == taken
    device.admit("other", other)
    assert device.used_bytes > taken


def test_a_step_without_ops_has_none(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    device.admit("plain", host.put("plain", random_adapter(base.sites.by_path.values(), 3)))
    none = torch.tensor([], dtype=torch.int64)
    assert device.ops([1, 0], [], 2, torch.tensor([0, 0]), none) is None
    assert device.ops([0, 0], [], 2, torch.tensor([0, 0]), none) is None


def test_a_slot_that_is_given_away_has_its_new_owners_ops(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    site = next(site for site in base.sites.sites if site.kind is SiteKind.EMBEDDING)
    found = []
    for seed in (5, 6):
        slot = device.admit(f"rows-{seed}", with_tokens(base, host, f"seed-{seed}", 40, seed))
        step = device.ops([slot], [], 1, torch.tensor([0]), torch.tensor([], dtype=torch.int64))
        assert step is not None
        found.append(step.at(site.index, is_head=False)[0].stacked["rows"][1].clone())
        device.release(f"rows-{seed}")
    assert not torch.equal(*found)
