"""The device tier: every byte accounted for, equal tensors stored once, and no slot that serves another's edits."""

import dataclasses
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters.checkpoint import Checkpoint
from server.adapters.device import DeviceTier
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.lowering import lower
from server.adapters.method import Edit, Lowered
from server.adapters.rows import NoRoom, stride
from server.adapters.step_edits import StepEdits
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import SiteKind
from server.ops import TokenLayout, expand, shrink
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


def snapshot(edits: StepEdits, base: Base) -> list[object]:
    """Everything that a step would read, as plain numbers."""
    return [plain(edits.group(group.index)) for group in base.sites.groups]


def plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


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
    before = counts(device), snapshot(device.batch([slot]), base)
    large = some_adapter(host, base, 2, max_rank=64)
    with pytest.raises(NoRoom, match="unload adapters or enlarge the buffer"):
        device.admit("large", large)
    assert (counts(device), snapshot(device.batch([slot]), base)) == before
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
    other = dataclasses.replace(edit, mid_scale=2 * edit.mid_scale)
    device = tier(base)
    slots = [
        device.admit(name, host.put(name, Lowered("test", 4, 1, {site.path: e})))
        for name, e in (("one", edit), ("two", other))
    ]
    step = device.batch(slots)
    group = step.dense(site.group)
    assert group.down is not None
    assert group.down.shape[0] == 4
    x = torch.randn(1, site.d_in, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    layout = TokenLayout(torch.tensor([step.local(slot) for slot in slots]), 2, ())
    h = shrink(x, group, layout)
    torch.testing.assert_close(h[1], 2 * h[0])


# Slots and batches


def test_a_reused_slot_serves_its_new_adapter_alone(base: Base, host: HostTier) -> None:
    device, fresh = tier(base), tier(base)
    slot = device.admit("old", some_adapter(host, base, 1))
    other = device.admit("other", some_adapter(host, base, 2))
    stale = [snapshot(device.batch([slot]), base), snapshot(device.batch([slot, other]), base)]
    device.release("old")
    assert device.admit("new", some_adapter(host, base, 3)) == slot
    assert fresh.admit("new", some_adapter(host, base, 3)) == slot
    assert fresh.admit("other", some_adapter(host, base, 2)) == other
    for numbers, old in zip(([slot], [slot, other]), stale, strict=True):
        now = snapshot(device.batch(numbers), base)
        assert now == snapshot(fresh.batch(numbers), base)
        assert now != old


def test_slots_keep_their_numbers_while_others_come_and_go(base: Base, host: HostTier) -> None:
    device = tier(base)
    slots = [device.admit(str(seed), some_adapter(host, base, seed)) for seed in range(4)]
    assert slots == [1, 2, 3, 4]
    device.release("1")
    device.release("3")
    assert device.admit("5", some_adapter(host, base, 5)) == 2
    assert device.admit("6", some_adapter(host, base, 6)) == 4
    assert device.admit("0", some_adapter(host, base, 0)) == 1


def test_a_batch_is_remembered_and_serves_its_parts(base: Base, host: HostTier) -> None:
    device = tier(base)
    one, two, three = (device.admit(str(seed), some_adapter(host, base, seed)) for seed in range(3))
    both = device.batch([two, one])
    assert device.batch([one, two]) is both
    assert device.batch([one]) is both
    assert (both.local(0), {both.local(one), both.local(two)}) == (0, {1, 2})
    assert device.batch([three]) is not both
    device.release("1")
    assert device.batch([one]) is not both


def test_a_part_of_a_remembered_batch_gives_equal_results(base: Base, host: HostTier) -> None:
    """Rows of adapters that the step does not use are masked for all its tokens."""
    device, fresh = tier(base), tier(base)
    adapters = {str(seed): some_adapter(host, base, seed) for seed in range(2)}
    one, two = (device.admit(name, adapter) for name, adapter in adapters.items())
    fresh.admit("0", adapters["0"])
    device.batch([one, two])
    shared, own = device.batch([one]), fresh.batch([1])
    assert shared is device.batch([one, two])
    for group in base.sites.groups:
        if group.sites[0].kind is SiteKind.LINEAR:
            x = torch.randn(3, group.sites[0].d_in, generator=torch.Generator().manual_seed(1))
            wide = _sums(shared, group.index, x, shared.local(one))
            torch.testing.assert_close(wide, _sums(own, group.index, x, own.local(1)))


def _sums(step: StepEdits, index: int, x: torch.Tensor, adapter: int) -> torch.Tensor:
    """The rank activations' sum for each token: the same whatever other rows stand between."""
    if not _has_rows(step, index):
        return torch.zeros(len(x))
    return shrink(x, step.dense(index), TokenLayout(torch.full((len(x),), adapter), len(x), ())).sum(dim=1)


def _has_rows(step: StepEdits, index: int) -> bool:
    group = step.group(index)
    return group is not None and any(edits is not None and edits.has_rows for edits in group.members)


def test_a_masked_adapter_may_be_released_before_the_steps_groups_are_made(base: Base, host: HostTier) -> None:
    device = tier(base)
    kept, gone = (device.admit(str(seed), some_adapter(host, base, seed)) for seed in range(2))
    device.batch([kept, gone])
    step = device.batch([kept])
    device.release("1")
    device.admit("2", some_adapter(host, base, 2))
    for group in base.sites.groups:
        if group.sites[0].kind is SiteKind.LINEAR:
            x = torch.ones(1, group.sites[0].d_in)
            expected = _sums(device.batch([kept]), group.index, x, 1)
            torch.testing.assert_close(_sums(step, group.index, x, step.local(kept)), expected)


def test_rows_given_away_in_mid_step_carry_no_nan_to_neighbours(base: Base) -> None:
    """The bits of a float32 vector, read as 16-bit numbers, may be anything."""
    host = HostTier(1 << 30, torch.bfloat16)
    site = base.sites.by_path["model.layers.0.mlp.down_proj"]
    device = DeviceTier(base.sites, 8 << 20, torch.bfloat16, CPU)
    kept, gone = (
        device.admit(name, host.put(name, Lowered("test", 2, 1, {site.path: random_edit(site, int(name), rank=2)})))
        for name in ("0", "1")
    )
    device.batch([kept, gone])
    step = device.batch([kept])
    device.release("1")
    numbers = step._rows[step._slots[1].edits[site.index].up or b""].numbers
    device.row_view(site.d_out)[numbers] = torch.nan
    y = torch.zeros(1, site.d_out, dtype=torch.bfloat16)
    layout = TokenLayout(torch.tensor([step.local(kept)]), 1, ())
    group = step.dense(site.group)
    h = shrink(torch.ones(1, site.d_in, dtype=torch.bfloat16), group, layout)
    edits = group.members[site.member]
    assert edits is not None
    expand(y, h, edits, layout)
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
    group = step.dense(site.group)
    member = group.members[site.member]
    assert member is not None
    vectors = getattr(group if field.startswith("mid") else member, field)
    identity = 0.0 if field.endswith("shift") else 1.0
    own = getattr(with_it, field)
    torch.testing.assert_close(vectors[step.local(slots[0])][: len(own)], own, rtol=0, atol=0)
    assert set(vectors[0].tolist()) == set(vectors[step.local(slots[1])].tolist()) == {identity}


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
    expected = snapshot(device.batch([kept]), base)
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
        assert snapshot(device.batch([kept]), base) == expected
    for thread in threads:
        thread.join()
    assert_accounted(device)
    assert device.num_slots == 1
    assert device.used_bytes == device.resident_bytes(some_adapter(host, base, 0))
