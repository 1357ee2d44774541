"""Adapters of two parts and adapters with ops on the device tier: their slots, their bytes, and their tokens."""

from collections.abc import Sequence
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
from server.model.sites import BaseSite
from server.ops.site_ops import PlacedOp
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
    """Rows of an embedding's table."""
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
    assert torch.equal(placed.stacked["rows"], host_rows)
    assert placed.tokens.lanes.tolist() == [1, 0]
    assert device.used_bytes >= adapter.tensor_bytes, "however small they are"
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
        found.append(step.at(site.index, is_head=False)[0].stacked["rows"].clone())
        device.release(f"rows-{seed}")
    assert not torch.equal(*found)


# Wide rows: an op's tensor costs few numbers in Python, however narrow it is


def with_op(base: Base, host: HostTier, name: str, op: str, tensors: dict[str, torch.Tensor]) -> HostAdapter:
    """An adapter that has this op at one linear, with tensors of the test's own."""
    return host.put(name, Lowered("op", 0, 1, {linear(base).path: Edit(ops={op: tensors})}))


def linear(base: Base) -> BaseSite:
    return next(site for site in base.sites.sites if site.kind is SiteKind.LINEAR)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(device: DeviceTier, base: Base, slots: Sequence[int]) -> PlacedOp:
    """The op at the first linear, for a token of each of these slots."""
    step = device.ops(slots, [], len(slots), torch.zeros(len(slots)).long(), torch.tensor([], dtype=torch.int64))
    assert step is not None
    [found] = step.at(linear(base).index, is_head=False)
    return found


@pytest.mark.parametrize(
    "shape", [(65536, 2, 2), (1024, 1024, 1), (512, 16, 32), (262144,)], ids=["OFT", "C3A", "LoKr", "vector"]
)
def test_narrow_tensors_take_no_more_rows_than_a_lora_of_the_same_bytes(
    base: Base, host: HostTier, shape: tuple[int, ...]
) -> None:
    device = DeviceTier(base.sites, 64 << 20, host.dtype, base.device)
    adapter = with_op(base, host, f"of {shape}", "any", {"narrow": drawn(*shape)})
    device.reserve("narrow", adapter)
    num_rows = device.num_used_rows
    device.abandon("narrow")
    rows_of_a_lora = adapter.tensor_bytes // (4096 * host.dtype.itemsize)  # on a base as wide as Llama-8B
    assert 0 < num_rows <= rows_of_a_lora // 4


@pytest.mark.parametrize("num", [0, 1, 2, 63, 64, 1000, 4095, 4096 * 8 + 1, 100_003])
def test_tensors_of_any_size_are_read_where_they_lie(base: Base, host: HostTier, num: int) -> None:
    device = tier(base, host)
    device.admit("before", with_op(base, host, "before", "own_weight", {"weight": drawn(7)}))
    adapter = with_op(base, host, f"of {num}", "own_weight", {"weight": drawn(num, seed=1)})
    slot = device.admit("own", adapter)
    [weight] = placed(device, base, [slot]).stacked.values()
    assert torch.equal(weight, drawn(num, seed=1))
    assert device.holds(weight) == (num > 0), "nothing lies nowhere"
    assert device.copied_bytes == 0


def test_a_tensor_in_scattered_rows_is_gathered(base: Base, host: HostTier) -> None:
    """The room for it is there, but not in one piece."""
    device = tier(base, host)
    num = device.capacity_bytes // 4 // 8
    small = {str(seed): with_op(base, host, f"{num}-{seed}", "own_weight", {"weight": drawn(num, seed=seed)})
             for seed in range(7)}  # fmt: skip
    for name, adapter in small.items():
        device.admit(name, adapter)
    for name in ("1", "3", "5"):
        device.release(name)
    slot = device.admit("large", with_op(base, host, "large", "own_weight", {"weight": drawn(2 * num, seed=9)}))
    [weight] = placed(device, base, [slot]).stacked.values()
    assert torch.equal(weight, drawn(2 * num, seed=9))
    assert not device.holds(weight)


def test_an_ops_tensor_that_equals_a_vector_lies_beside_it(base: Base, host: HostTier) -> None:
    """They are laid out in different rows, so neither is read as the other."""
    device, site = tier(base, host), linear(base)
    ones = torch.ones(site.d_out)
    edit = Edit(out_shift=ones, ops={"own_weight": {"weight": ones.clone()}})
    slot = device.admit("both", host.put("both", Lowered("both", 0, 1, {site.path: edit})))
    [weight] = placed(device, base, [slot]).stacked.values()
    assert torch.equal(weight, ones)
    group = device.batch({slot}).group(site.group)
    assert group is not None
    member = group.members[site.member]
    assert member is not None
    assert member.out_shift is not None
    assert torch.equal(member.out_shift[1], ones)


# Copies: counted, bounded and let go


def rotated(base: Base, host: HostTier, seed: int) -> HostAdapter:
    """Small enough that the blocks of several adapters are stacked for faster gathering."""
    d_in = linear(base).d_in
    return with_op(base, host, f"rotated-{seed}", "block_rotation", {"blocks": drawn(d_in // 4, 4, 4, seed=seed)})


def test_one_adapters_tensors_are_never_copied_and_large_ones_neither(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    one, other = (device.admit(str(seed), rotated(base, host, seed)) for seed in (1, 2))
    placed(device, base, [one])
    assert device.copied_bytes == 0
    placed(device, base, [one, other])
    assert device.copied_bytes == 2 * linear(base).d_in * 4 * 4
    device.release("1")
    device.release("2")
    weights = {name: {"weight": drawn(1 << 17, seed=seed)} for seed, name in enumerate(("three", "four"))}
    slots = [device.admit(name, with_op(base, host, name, "own_weight", own)) for name, own in weights.items()]
    placed(device, base, slots)
    assert device.copied_bytes == 0


def test_copies_go_with_the_last_step_that_needs_them(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    slots = [device.admit(str(seed), rotated(base, host, seed)) for seed in (1, 2)]
    plain = device.admit("plain", host.put("plain", random_adapter(base.sites.by_path.values(), 3)))
    none = torch.tensor([], dtype=torch.int64)
    for end in (lambda: device.ops([plain], [], 1, torch.tensor([0]), none), device.rest, lambda: device.release("1")):
        placed(device, base, slots)
        assert device.copied_bytes > 0
        end()
        assert device.copied_bytes == 0


def test_copies_beyond_the_limit_serve_one_step(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    slots = [device.admit(str(seed), rotated(base, host, seed)) for seed in (1, 2)]
    device.max_copied_bytes = 2 * linear(base).d_in * 4 * 4 - 1
    x = drawn(2, linear(base).d_in, seed=5)
    found = []
    for _ in range(2):
        op = placed(device, base, slots)
        found.append(op.op.before(x, op.stacked, op.tokens, linear(base)))
        assert device.copied_bytes == 0
    for seed, row in zip((1, 2), found[0], strict=True):
        wanted = torch.einsum("nk,nkc->nc", x[seed - 1].view(-1, 4), drawn(linear(base).d_in // 4, 4, 4, seed=seed))
        torch.testing.assert_close(row, wanted.flatten())
    assert torch.equal(*found)


def test_rows_that_were_given_away_are_in_no_stack_of_the_step_under_way(base: Base, host: HostTier) -> None:
    device = tier(base, host)
    slots = [device.admit(str(seed), rotated(base, host, seed)) for seed in (1, 2)]
    step = device.ops(slots, [], 2, torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64))
    assert step is not None
    device.release("2")
    [found] = step.at(linear(base).index, is_head=False)
    assert found.stacked[0].lanes == (1,)
