"""The device tier: every byte accounted for, equal tensors stored once, and no slot that serves another's edits."""

import dataclasses
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters.device.device import DeviceTier
from server.adapters.device.rows import NoRoom, stride
from server.adapters.device.step_edits import StepEdits
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.lowering import lower
from server.adapters.method import Edit, Lowered
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import SiteKind
from server.model.sites import BaseSite
from server.ops import Lanes, Run, TokenLayout, expand, expand_stack, shrink, shrink_stack
from tests.adapters.peft_adapters import make_adapter
from tests.adapters.random_edits import VECTOR_FIELDS, random_adapter, random_edit

FLOAT = torch.float32.itemsize
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


@pytest.fixture
def host() -> HostTier:
    return HostTier(1 << 30, torch.float32)


def tier(base: Base, max_bytes: int = 8 << 20) -> DeviceTier:
    return DeviceTier(base.sites, max_bytes, torch.float32, CPU)


def counts(device: DeviceTier) -> tuple[int, int, int, int]:
    return device.used_bytes, device.free_bytes, device.waste_bytes, device.num_slots


def assert_accounted(device: DeviceTier) -> None:
    assert device.used_bytes + device.free_bytes + device.waste_bytes == device.capacity_bytes


def effects(step: StepEdits, slot: int, base: Base) -> torch.Tensor:
    """What a slot does to two tokens at every linear: all its outputs, one after another."""
    out = []
    for group in base.sites.groups:
        if group.sites[0].kind is SiteKind.LINEAR:
            x = torch.randn(2, group.sites[0].d_in, generator=torch.Generator().manual_seed(group.index))
            out += [effect(step, slot, site, x).flatten() for site in group.sites]
    return torch.cat(out)


def effect(step: StepEdits, slot: int, site: BaseSite, x: torch.Tensor) -> torch.Tensor:
    """As a site does it, on a base of zeros, with a lane for one token and a run for the other, or both as mixed."""
    lane, group = step.local(slot), step.group(site.group)
    edits = group.members[site.member] if group is not None else None
    y = torch.zeros(2, site.d_out, dtype=x.dtype)
    if group is None or edits is None:
        return y
    layout = TokenLayout(torch.tensor([lane, lane]), 2, (), Lanes.of([lane], step.num_lanes, CPU), (Run(1, 2, lane),))
    if edits.has_rows and group.stack is not None:
        hidden = shrink_stack(x, group.stack, layout)
        expand_stack(y, hidden, group.stack, group.stack.spans[site.member], layout, edits.up_scale)
    elif edits.has_rows:
        own = slice(group.offsets[site.member], group.offsets[site.member + 1])
        expand(y, shrink(x, group, layout)[:, own], edits, layout)
    scales = [v[lane] - 1 for v in (edits.in_scale, edits.out_scale) if v is not None]
    shifts = [edits.out_shift[lane]] if edits.out_shift is not None else []
    return y + sum(v.sum() for v in (*scales, *shifts))


def some_adapter(host: HostTier, base: Base, seed: int, max_rank: int = 3) -> HostAdapter:
    return host.put(f"random-{seed}", random_adapter(base.sites.by_path.values(), seed, max_rank=max_rank))


# Accounts


def test_an_empty_tier_is_free(base: Base) -> None:
    device = tier(base)
    assert device.used_bytes == device.num_slots == 0
    assert_accounted(device)


def test_an_adapter_takes_the_bytes_that_were_foretold_and_returns_them(base: Base, host: HostTier) -> None:
    device = tier(base)
    empty = counts(device)
    adapter = some_adapter(host, base, 1)
    assert device.admit("one", adapter) == 1
    assert device.used_bytes == device.resident_bytes(adapter) > 0
    assert_accounted(device)
    assert device.release("one") == device.resident_bytes(adapter)
    assert counts(device) == empty


def test_admitting_again_is_the_same_slot_and_one_release_ends_it(base: Base, host: HostTier) -> None:
    device = tier(base)
    adapter = some_adapter(host, base, 1)
    first = device.admit("one", adapter)
    taken = counts(device)
    assert device.admit("one", adapter) == first
    assert counts(device) == taken
    device.release("one")
    assert device.num_slots == device.used_bytes == 0


def test_every_byte_is_accounted_for_through_any_storm(base: Base, host: HostTier) -> None:
    dice = random.Random(3)
    device = tier(base, max_bytes=96 << 10)
    adapters = {str(seed): some_adapter(host, base, seed, max_rank=1 + seed % 5) for seed in range(10)}
    resident: dict[str, int] = {}
    num_refused = 0
    for _ in range(200):
        digest = dice.choice(list(adapters))
        if digest in resident:
            device.release(digest)
            del resident[digest]
        else:
            before = counts(device)
            try:
                resident[digest] = device.admit(digest, adapters[digest])
            except NoRoom:
                num_refused += 1
                assert counts(device) == before
        assert_accounted(device)
        assert device.num_slots == len(set(resident.values())) == len(resident)
        assert 0 not in resident.values()
    assert num_refused > 10
    for digest in resident:
        device.release(digest)
    assert device.used_bytes == device.num_slots == 0
    assert device.waste_bytes == tier(base, max_bytes=96 << 10).waste_bytes


def test_no_room_changes_nothing_for_those_who_are_there(base: Base, host: HostTier) -> None:
    small = some_adapter(host, base, 1)
    device = tier(base, max_bytes=2 * tier(base).resident_bytes(small))
    slot = device.admit("small", small)
    before = counts(device), effects(device.batch([slot]), slot, base).tolist()
    large = some_adapter(host, base, 2, max_rank=64)
    with pytest.raises(NoRoom, match="unload adapters or enlarge the buffer"):
        device.admit("large", large)
    assert (counts(device), effects(device.batch([slot]), slot, base).tolist()) == before
    with pytest.raises(KeyError):
        device.release("large")


# Sharing


def test_vera_adapters_share_their_projections(base: Base, host: HostTier, tiny_llama: Path, tmp_path: Path) -> None:
    """The second adapter of a key costs its output vectors alone; its lambda_d lies beside the buffer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapters = []
    for seed in (1, 2):
        checkpoint = Checkpoint.open(make_adapter(model, "vera", tmp_path / str(seed), seed))
        adapters.append(host.put(str(seed), lower(checkpoint, base.sites.by_path)))
    device = tier(base)
    device.admit("first", adapters[0])
    alone = device.used_bytes
    assert alone == device.resident_bytes(adapters[0])
    device.admit("second", adapters[1])
    vectors = sum(stride(base.sites.by_path[path].d_out) * FLOAT for path in adapters[1].edits)
    assert device.used_bytes == alone + vectors
    assert vectors < alone / 5
    assert device.release("first") == vectors
    assert device.used_bytes == device.resident_bytes(adapters[1])


def test_a_tensor_used_at_several_sites_is_stored_once_and_freed_once(base: Base, host: HostTier) -> None:
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    edit = random_edit(base.sites.by_path[paths[0]], seed=1, rank=4)
    device = tier(base)
    device.admit("tied", host.put("tied", Lowered("test", 4, 1, dict.fromkeys(paths, edit))))
    assert device.used_bytes == 2 * 4 * 64 * FLOAT
    device.release("tied")
    assert device.used_bytes == 0


def test_adapters_with_equal_pairs_share_a_steps_rows_but_not_their_scales(base: Base, host: HostTier) -> None:
    site = base.sites.by_path["model.layers.0.self_attn.q_proj"]
    edit = random_edit(site, seed=1, rank=4, fields=["mid_scale"])
    assert edit.mid_scale is not None
    device = tier(base)
    slots = []
    for factor in (1, 2, 3):
        own = dataclasses.replace(edit, mid_scale=factor * edit.mid_scale)
        slots.append(device.admit(str(factor), host.put(str(factor), Lowered("test", 4, 1, {site.path: own}))))
    step = device.batch(slots)
    group = step.group(site.group)
    assert group is not None
    assert group.down is not None
    assert group.down.shape[0] == 4
    x = torch.randn(1, site.d_in, generator=torch.Generator().manual_seed(0)).expand(3, -1)
    layout = TokenLayout(torch.tensor([step.local(slot) for slot in slots]), 3, ())
    h = shrink(x, group, layout)
    torch.testing.assert_close(h, torch.tensor([[1.0], [2.0], [3.0]]) * h[0])


# Several on their way at once


def a_pair_that_shares(host: HostTier, base: Base) -> tuple[HostAdapter, HostAdapter]:
    """Two adapters with one `down` and an `up` each."""
    site = base.sites.by_path["model.layers.0.self_attn.q_proj"]
    one, other = (random_edit(site, seed, rank=4) for seed in (1, 2))
    edits = {"one": one, "other": dataclasses.replace(other, down=one.down)}
    one_adapter, other_adapter = (
        host.put(name, Lowered("test", 4, 1, {site.path: edit})) for name, edit in edits.items()
    )
    return one_adapter, other_adapter


def test_adapters_that_share_rows_and_come_together_end_with_one_copy(base: Base, host: HostTier) -> None:
    one, other = a_pair_that_shares(host, base)
    device, alone = tier(base), tier(base)
    device.reserve("one", one)
    device.reserve("other", other)
    device.copy("other")
    device.copy("one")
    slots = [device.place("one"), device.place("other")]
    for slot, adapter in zip(slots, (one, other), strict=True):
        step, expected = device.batch(slots), alone.batch([alone.admit(str(slot), adapter)])
        torch.testing.assert_close(effects(step, slot, base), effects(expected, slot, base))
    assert device.used_bytes == 3 * 4 * 64 * FLOAT
    device.release("one")
    assert device.used_bytes == 2 * 4 * 64 * FLOAT
    device.release("other")
    assert device.used_bytes == 0
    assert_accounted(device)


def test_who_is_on_its_way_keeps_the_rows_that_it_counts_on(base: Base, host: HostTier) -> None:
    one, other = a_pair_that_shares(host, base)
    device, alone = tier(base), tier(base)
    device.admit("one", one)
    device.reserve("other", other)
    device.release("one")
    device.copy("other")
    slot = device.place("other")
    expected = effects(alone.batch([alone.admit("other", other)]), 1, base)
    torch.testing.assert_close(effects(device.batch([slot]), slot, base), expected)
    device.release("other")
    assert device.used_bytes == 0


@pytest.mark.parametrize("is_copied", [False, True])
def test_what_is_abandoned_leaves_nothing(base: Base, host: HostTier, is_copied: bool) -> None:
    one, other = a_pair_that_shares(host, base)
    device = tier(base)
    slot = device.admit("one", one)
    before = counts(device), effects(device.batch([slot]), slot, base).tolist()
    device.reserve("other", other)
    if is_copied:
        device.copy("other")
    device.abandon("other")
    assert (counts(device), effects(device.batch([slot]), slot, base).tolist()) == before


def test_what_could_not_be_placed_can_be_abandoned(base: Base, host: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = a_pair_that_shares(host, base)
    device = tier(base)
    before = counts(device)
    device.reserve("one", one)
    device.copy("one")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device, "_make_slots", fail)
    with pytest.raises(torch.OutOfMemoryError):
        device.place("one")
    device.abandon("one")
    assert counts(device) == before


def test_lanes_that_could_not_be_written_serve_nobody(
    base: Base, host: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer whose rows did not get into its lane must not be answered with its former owner's."""
    device, alone = tier(base), tier(base)
    old, new = (some_adapter(host, base, seed) for seed in (1, 2))
    first, second = device.admit("old", old), device.admit("new", new)
    effects(device.batch([first]), first, base)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as failing:
        failing.setattr(StepEdits, "_matrices", fail)
        with pytest.raises(torch.OutOfMemoryError):
            effects(device.batch([second]), second, base)
    expected = effects(alone.batch([alone.admit("new", new)]), 1, base)
    torch.testing.assert_close(effects(device.batch([second]), second, base), expected)


# Slots and batches


def test_a_reused_slot_serves_its_new_adapter_alone(base: Base, host: HostTier) -> None:
    device, fresh = tier(base), tier(base)
    slot = device.admit("old", some_adapter(host, base, 1))
    other = device.admit("other", some_adapter(host, base, 2))
    old = effects(device.batch([slot, other]), slot, base)
    device.release("old")
    assert device.admit("new", some_adapter(host, base, 3)) == slot
    assert fresh.admit("new", some_adapter(host, base, 3)) == slot
    now = effects(device.batch([slot, other]), slot, base)
    torch.testing.assert_close(now, effects(fresh.batch([slot]), slot, base))
    assert not torch.equal(now, old)


def test_slots_keep_their_numbers_while_others_come_and_go(base: Base, host: HostTier) -> None:
    device = tier(base)
    slots = [device.admit(str(seed), some_adapter(host, base, seed)) for seed in range(4)]
    assert slots == [1, 2, 3, 4]
    device.release("1")
    device.release("3")
    assert device.admit("5", some_adapter(host, base, 5)) == 2
    assert device.admit("6", some_adapter(host, base, 6)) == 4
    assert device.admit("0", some_adapter(host, base, 0)) == 1


def test_a_step_goes_on_with_the_edits_of_the_last_one(base: Base, host: HostTier) -> None:
    device = tier(base)
    one, two, three = (device.admit(str(seed), some_adapter(host, base, seed)) for seed in range(3))
    step = device.batch([two, one])
    assert (step.local(0), step.local(one), step.local(two)) == (0, 1, 2)
    assert device.batch([one]) is step
    assert device.batch([three, one]) is step
    assert (step.local(one), step.local(three)) == (1, 2)
    more = device.batch([one, two, three])
    assert more is not step
    assert more.num_lanes == 3
    device.release("1")
    assert device.batch([one, three]) is more
    assert device.batch([one]) is not more, "two lanes of three would be computed for nothing"


@pytest.mark.parametrize("seed", range(6))
def test_lanes_that_are_given_on_serve_as_new_ones_do(base: Base, host: HostTier, seed: int) -> None:
    rng = random.Random(seed)
    device = tier(base, 64 << 20)
    numbers = {name: device.admit(str(name), some_adapter(host, base, name, 2 + name % 5)) for name in range(12)}
    num_kept, last = 0, None
    for _ in range(40):
        if rng.random() < 0.2:
            name = rng.choice(list(numbers))
            device.release(str(name))
            numbers[name] = device.admit(str(name), some_adapter(host, base, name, 2 + name % 5))
        wanted = rng.sample(list(numbers.values()), rng.choice([3, 4, 4, 4, 5]))
        step = device.batch(wanted)
        num_kept += step is last
        last = step
        fresh = StepEdits(device, [device._slots[number] for number in wanted])
        for slot in wanted:
            torch.testing.assert_close(effects(step, slot, base), effects(fresh, slot, base))
    assert num_kept > 15


def test_a_slot_may_be_released_before_the_groups_of_a_step_that_has_its_lane_are_made(
    base: Base, host: HostTier
) -> None:
    device = tier(base)
    kept, gone = (device.admit(str(seed), some_adapter(host, base, seed)) for seed in range(2))
    device.batch([kept, gone])
    step = device.batch([kept])
    expected = effects(StepEdits(device, [device._slots[kept]]), kept, base)
    device.release("1")
    device.admit("2", some_adapter(host, base, 2))
    torch.testing.assert_close(effects(step, kept, base), expected)


def test_rows_given_away_in_mid_step_carry_no_nan_to_neighbours(base: Base) -> None:
    """The bits of a float32 vector, read as 16-bit numbers, may be anything."""
    host = HostTier(1 << 30, torch.bfloat16)
    site = base.sites.by_path["model.layers.0.mlp.down_proj"]
    device = DeviceTier(base.sites, 8 << 20, torch.bfloat16, CPU)
    lowered = [Lowered("test", r, 1, {site.path: random_edit(site, r, rank=r)}) for r in (1, 2, 40)]
    kept, _, gone = (device.admit(str(one.rank), host.put(str(one.rank), one)) for one in lowered)
    step = StepEdits(device, list(device._slots.values()))
    numbers = list(step._rows[device._slots[gone].edits[site.index].up[0]].numbers)
    device.row_view(site.d_out)[numbers] = torch.nan
    group = step.group(site.group)
    assert group is not None
    assert group.down is not None, "the ranks are too different for a matrix per adapter"
    y = effect(step, kept, site, torch.ones(2, site.d_in, dtype=torch.bfloat16))
    assert y.isfinite().all()
    assert y.any()


def test_groups_that_no_adapter_touches_cost_nothing(base: Base, host: HostTier) -> None:
    site = base.sites.by_path["model.layers.1.mlp.down_proj"]
    device = tier(base)
    slot = device.admit("one", host.put("one", Lowered("test", 2, 1, {site.path: random_edit(site, seed=1, rank=2)})))
    step = device.batch([slot])
    assert [group.index for group in base.sites.groups if step.group(group.index) is not None] == [site.group]


@pytest.mark.parametrize("field", VECTOR_FIELDS)
def test_adapters_without_a_vector_have_its_identity_beside_one_with_it(base: Base, host: HostTier, field: str) -> None:
    site = base.sites.by_path["model.layers.0.mlp.down_proj"]
    with_it, without = random_edit(site, seed=1, rank=2, fields=[field]), random_edit(site, seed=2, rank=3)
    device = tier(base)
    slots = [
        device.admit(name, host.put(name, Lowered("test", 3, 1, {site.path: edit})))
        for name, edit in (("with", with_it), ("without", without))
    ]
    step = device.batch(slots)
    group = step.group(site.group)
    assert group is not None
    assert group.stack is not None
    vectors, first = getattr(group.members[site.member], field, None), 0
    if field.startswith("mid"):
        vectors, first = getattr(group.stack, field).squeeze(1), 1  # a matrix per adapter, and none of the base's
    identity = 0.0 if field.endswith("shift") else 1.0
    own = getattr(with_it, field)
    torch.testing.assert_close(vectors[step.local(slots[0]) - first][: len(own)], own, rtol=0, atol=0)
    assert set(vectors[step.local(slots[1]) - first].tolist()) == {identity}
    assert first or set(vectors[0].tolist()) == {identity}


def test_an_edit_of_no_rank_is_its_vectors(base: Base, host: HostTier) -> None:
    site = base.sites.by_path["model.layers.0.mlp.down_proj"]
    nothing = Edit(down=torch.zeros(0, site.d_in), up=torch.zeros(0, site.d_out), out_shift=torch.ones(site.d_out))
    device = tier(base)
    slot = device.admit("nothing", host.put("nothing", Lowered("test", 0, 1, {site.path: nothing})))
    group = device.batch([slot]).group(site.group)
    assert group is not None
    assert group.down is group.stack is None
    device.release("nothing")
    assert device.used_bytes == 0


def test_adapters_come_and_go_from_other_threads_while_steps_run(base: Base, host: HostTier) -> None:
    device = tier(base)
    kept = device.admit("kept", some_adapter(host, base, 0))
    expected = effects(device.batch([kept]), kept, base)
    adapters = [some_adapter(host, base, seed) for seed in range(1, 5)]

    def churn(name: str, adapter: HostAdapter) -> Callable[[], None]:
        def work() -> None:
            for _ in range(30):
                device.admit(name, adapter)
                device.release(name)

        return work

    threads = [threading.Thread(target=churn(str(i), adapter)) for i, adapter in enumerate(adapters)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(effects(device.batch([kept]), kept, base), expected)
    for thread in threads:
        thread.join()
    assert_accounted(device)
    assert device.num_slots == 1
    assert device.used_bytes == device.resident_bytes(some_adapter(host, base, 0))
