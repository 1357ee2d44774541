"""A step on the device: whatever is packed together, each sequence gets the logits that it has alone by definition."""

import itertools
import random
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from server.adapters.device.device import DeviceTier
from server.adapters.host import HostTier
from server.adapters.method import Edit, Lowered
from server.engine.runner import Runner, StepLogits
from server.engine.sequence import Batch, SamplingParams, ScheduledSequence, Sequence
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.sites import BaseSite
from server.ops import DecodeBatch
from tests.adapters.dense import edited_logits
from tests.adapters.random_edits import random_adapter, random_edit
from tests.models import ARCHITECTURES, VOCAB_SIZE

BLOCK_SIZE, NUM_BLOCKS = 4, 40
NOTHING = Lowered("none", 0, 0, {})


class Workbench:
    """A runner, the adapters on its device, and the dense model that says what is right."""

    def __init__(self, folder: Path, adapters: Listing[Lowered]) -> None:
        base = Base.load(BaseOptions(str(folder), Quantization.NONE, torch.float32))
        self.base = base
        self.dense: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
        self.device = DeviceTier(base.sites, 32 << 20, torch.float32, base.device)
        self.host = HostTier(1 << 30, torch.float32)
        self.runner = Runner(base, self.device, NUM_BLOCKS, BLOCK_SIZE)
        self.adapters: dict[int, Lowered] = {0: NOTHING}
        self._names: dict[int, str] = {}
        self._numbers = itertools.count()
        for adapter in adapters:
            self.admit(adapter)

    def admit(self, adapter: Lowered) -> int:
        name = f"adapter-{next(self._numbers)}"
        slot = self.device.admit(name, self.host.put(name, adapter))
        self.adapters[slot] = adapter
        self._names[slot] = name
        return slot

    def release(self, slot: int) -> None:
        del self.adapters[slot]
        self.device.release(self._names.pop(slot))

    def expected(self, sequence: Sequence) -> torch.Tensor:
        """(tokens, vocabulary): the logits of all tokens of a sequence with its adapter alone, on the dense model."""
        return edited_logits(self.dense, self.adapters[sequence.slot].edits, torch.tensor([sequence.all_ids]))[0]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def workbench(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Workbench:
    bench = Workbench(model_folder(request.param), [])
    for seed in range(3):
        bench.admit(random_adapter(bench.base.sites.by_path.values(), seed))
    return bench


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Workbench:
    bench = Workbench(tiny_llama, [])
    for seed in range(3):
        bench.admit(random_adapter(bench.base.sites.by_path.values(), seed))
    return bench


@dataclass
class Play:
    """Sequences with known tokens, put through the runner in pieces that the dice choose."""

    bench: Workbench
    dice: random.Random
    scored: bool = False
    free: list[int] = field(default_factory=lambda: list(range(NUM_BLOCKS)))
    flying: list[Sequence] = field(default_factory=list)
    num_compared: int = 0

    def __post_init__(self) -> None:
        self.dice.shuffle(self.free)

    @cached_property
    def _expected(self) -> dict[str, torch.Tensor]:
        return {}

    def add(self, slot: int, length: int) -> Sequence:
        ids = [self.dice.randrange(VOCAB_SIZE) for _ in range(length)]
        sequence = Sequence(f"sequence-{len(self._expected)}", ids, SamplingParams(max_tokens=1), slot=slot)
        sequence.blocks = [self.free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        self._expected[sequence.sequence_id] = self.bench.expected(sequence)
        self.flying.append(sequence)
        return sequence

    def step(self, sizes: dict[str, int]) -> None:
        """Computes so many of each sequence's next tokens, compares all logits that come back, frees what is done."""
        by_id = {sequence.sequence_id: sequence for sequence in self.flying}
        items = []
        for name, size in sizes.items():
            start = by_id[name].num_computed_tokens
            items.append(ScheduledSequence(by_id[name], start, size, not self.scored, self.scored))
        self.compare(self.bench.runner.run(Batch(tuple(items))), items)
        for item in items:
            item.sequence.num_computed_tokens += item.num_tokens
        for sequence in [s for s in self.flying if not s.num_pending]:
            self.free += sequence.blocks
            self.flying.remove(sequence)

    def compare(self, logits: StepLogits, items: Listing[ScheduledSequence]) -> None:
        assert len(logits.samplers) == len(logits.sampled) == sum(item.samples for item in items)
        for item, row in zip(logits.samplers, logits.sampled, strict=True):
            self._assert_equal(item, row[None], 1)
        assert set(logits.scored) == {item.sequence.sequence_id for item in items if item.wants_prompt_logits}
        for item in items:
            if item.wants_prompt_logits:
                self._assert_equal(item, logits.scored[item.sequence.sequence_id], item.num_tokens)

    def _assert_equal(self, item: ScheduledSequence, rows: torch.Tensor, num_rows: int) -> None:
        expected = self._expected[item.sequence.sequence_id]
        end = item.start + item.num_tokens
        scale = float(expected.abs().max())
        torch.testing.assert_close(rows / scale, expected[end - num_rows : end] / scale, rtol=0, atol=2e-5)
        self.num_compared += num_rows

    def random_step(self, max_size: int = 6) -> None:
        """New sequences while blocks last, then a random part of all of them: single tokens beside chunks."""
        while len(self.flying) < 5 and len(self.free) > 6:
            self.add(self.dice.choice(list(self.bench.adapters)), self.dice.randint(1, 20))
        chosen = self.dice.sample(self.flying, self.dice.randint(1, len(self.flying)))
        limits = {s.sequence_id: min(s.num_pending, max_size) for s in chosen}
        self.step({name: 1 if self.dice.random() < 0.5 else self.dice.randint(1, n) for name, n in limits.items()})


# What is right


@pytest.mark.parametrize("scored", [False, True], ids=["sampled", "scored"])
def test_any_packing_gives_the_logits_of_the_definition(workbench: Workbench, scored: bool) -> None:
    """Chunks and single tokens, four adapters' worth of edits of every field, blocks in any order and used again."""
    play = Play(workbench, random.Random(11), scored)
    for _ in range(25):
        play.random_step()
    assert play.num_compared > 50


def test_a_whole_prompt_and_its_decodes(workbench: Workbench) -> None:
    play = Play(workbench, random.Random(5))
    sequences = [play.add(slot, 12) for slot in workbench.adapters]
    play.step({sequence.sequence_id: 7 for sequence in sequences})
    for _ in range(5):
        play.step({sequence.sequence_id: 1 for sequence in sequences})
    assert play.flying == []


def test_the_bare_base_is_transformers_own_model(workbench: Workbench) -> None:
    play = Play(workbench, random.Random(6))
    one, two = play.add(0, 9), play.add(0, 4)
    with torch.no_grad():
        own = workbench.dense(input_ids=torch.tensor([one.prompt_ids])).logits[0]
    torch.testing.assert_close(workbench.expected(one), own)
    play.step({one.sequence_id: 9, two.sequence_id: 4})


@pytest.mark.parametrize("field", ["mid_scale", "mid_shift", "in_scale", "up_scale", "out_scale", "out_shift"])
def test_each_field_at_one_member_of_a_group(tiny_llama: Path, field: str) -> None:
    """q has it, k and v do not: members of a fused product that need their own input or their own scales."""
    bench = Workbench(tiny_llama, [])
    sites = bench.base.sites.by_path
    for name in ("q_proj", "v_proj"):
        site = sites[f"model.layers.0.self_attn.{name}"]
        bench.admit(Lowered("test", 2, 1, {site.path: random_edit(site, 3, 2, [field])}))
        bench.admit(Lowered("test", 2, 1, {site.path: random_edit(site, 4, 2)}))
    play = Play(bench, random.Random(7), scored=True)
    sequences = [play.add(slot, 6) for slot in bench.adapters]
    play.step({sequence.sequence_id: 5 for sequence in sequences})
    play.step({sequence.sequence_id: 1 for sequence in sequences})


# Steps with nothing to give


def test_a_chunk_in_mid_prompt_gives_no_logits(llama: Workbench) -> None:
    play = Play(llama, random.Random(8))
    sequence = play.add(1, 9)
    logits = llama.runner.run(Batch((ScheduledSequence(sequence, 0, 5, False, False),)))
    assert (logits.samplers, tuple(logits.sampled.shape), logits.scored) == ((), (0, VOCAB_SIZE), {})
    sequence.num_computed_tokens = 5
    play.step({sequence.sequence_id: 4})


def test_a_chunk_that_is_scored_and_samples_gives_both(llama: Workbench) -> None:
    play = Play(llama, random.Random(9))
    scored, other = play.add(2, 6), play.add(1, 4)
    items = [ScheduledSequence(scored, 0, 6, True, True), ScheduledSequence(other, 0, 4, True, False)]
    play.compare(llama.runner.run(Batch(tuple(items))), items)
    assert play.num_compared == 8


# Isolation


def overflowing(bench: Workbench) -> Lowered:
    """Finite weights whose products are not: keys, values and logits of its sequences become NaN."""
    edits = {}
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        site = bench.base.sites.by_path[path]
        edits[path] = Edit(down=torch.full((2, site.d_in), 3e38), up=torch.full((2, site.d_out), 3e38))
    return Lowered("test", 2, 1, edits)


def test_an_adapter_that_overflows_harms_its_own_sequences_only(llama: Workbench) -> None:
    slot = llama.admit(overflowing(llama))
    play = Play(llama, random.Random(10))
    sick = Sequence("sick", [1, 2, 3, 4, 5, 6, 7], SamplingParams(max_tokens=1), slot=slot)
    sick.blocks = [play.free.pop(0), play.free.pop(0)]
    healthy = [play.add(slot, 8) for slot in (0, 1, 2, 3)]
    for start, size in ((0, 5), (5, 1), (6, 1)):
        items = [ScheduledSequence(sick, start, size, True, False)]
        items += [ScheduledSequence(s, start, size, True, False) for s in healthy]
        logits = llama.runner.run(Batch(tuple(items)))
        for item, row in zip(logits.samplers, logits.sampled, strict=True):
            if item.sequence is sick:
                assert row.isnan().any()
            else:
                play._assert_equal(item, row[None], 1)
    llama.release(slot)


def test_blocks_of_a_sequence_that_overflowed_are_clean_for_the_next(llama: Workbench) -> None:
    slot = llama.admit(overflowing(llama))
    play = Play(llama, random.Random(12))
    sick = Sequence("sick", list(range(NUM_BLOCKS * BLOCK_SIZE)), SamplingParams(max_tokens=1), slot=slot)
    sick.blocks = list(range(NUM_BLOCKS))
    llama.runner.run(Batch((ScheduledSequence(sick, 0, NUM_BLOCKS * BLOCK_SIZE, False, False),)))
    llama.release(slot)
    for _ in range(6):
        play.random_step(max_size=2)
    assert play.num_compared > 10


# Fused groups


def turning(bench: Workbench, members: Listing[str]) -> Lowered:
    """Low rank at all three members of a group, and inputs of their own at some of them."""
    edits = {}
    for seed, name in enumerate(("q_proj", "k_proj", "v_proj")):
        site = bench.base.sites.by_path[f"model.layers.0.self_attn.{name}"]
        blocks = torch.eye(4) + 0.1 * torch.randn(site.d_in // 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        ops = {"block_rotation": {"blocks": blocks}} if name in members else {}
        edits[site.path] = replace(random_edit(site, seed, 2), ops=ops)
    return Lowered("turning", 2, 1, edits)


@pytest.mark.parametrize(
    ("members", "num_rows"), [(["q_proj", "k_proj", "v_proj"], 1.0), (["q_proj"], 1.5), (["v_proj"], 1.25), ([], 1.0)]
)
def test_an_input_of_its_own_costs_a_member_of_a_fused_group_its_own_rows(
    members: list[str], num_rows: float, llama: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the others share, one product of the group."""
    site = llama.base.sites.by_path["model.layers.0.self_attn.q_proj"]
    assert isinstance(site, BaseSite)
    fused = site.fused
    assert fused is not None
    computed: list[int] = []
    product = F.linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() == fused.weight_of(0).untyped_storage().data_ptr():
            computed.append(len(weight))
        return product(x, weight, bias)

    monkeypatch.setattr("server.model.fused.F.linear", noted)
    slot = llama.admit(turning(llama, members))
    play = Play(llama, random.Random(15))
    play.step({play.add(slot, 6).sequence_id: 5})
    assert sum(computed) == num_rows * sum(fused.widths)
    llama.release(slot)


# Slots


def test_a_slot_used_again_never_serves_its_former_adapter(llama: Workbench) -> None:
    sites = llama.base.sites.by_path.values()
    for seed in range(10, 16):
        slot = llama.admit(random_adapter(sites, seed))
        assert slot == 4
        play = Play(llama, random.Random(seed))
        sequences = [play.add(slot, 5), play.add(1, 5)]
        play.step({sequence.sequence_id: 4 for sequence in sequences[: 1 + seed % 2]})
        llama.release(slot)


def test_edits_made_for_more_adapters_serve_fewer_and_others_equally(llama: Workbench) -> None:
    play = Play(llama, random.Random(13))
    one, two, three = (play.add(slot, 8) for slot in (1, 2, 3))
    play.step({one.sequence_id: 3, two.sequence_id: 3})
    both = llama.device.batch([1, 2])
    play.step({one.sequence_id: 1})
    play.step({one.sequence_id: 1, three.sequence_id: 4})
    assert llama.device.batch([1, 3]) is both
    play.step({two.sequence_id: 2})
    play.step({one.sequence_id: 1, two.sequence_id: 2, three.sequence_id: 1})


# Packing


def test_decodes_whose_blocks_follow_one_another_are_read_without_a_gather(
    llama: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[DecodeBatch] = []
    forward = llama.base.forward

    def watched(*args: object) -> torch.Tensor:
        context = args[3]
        seen.append(context.attention.decode)  # type: ignore[attr-defined]
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(llama.base, "forward", watched)
    sequences = []
    for number, block in enumerate((6, 3, 5, 4)):
        sequences.append(Sequence(str(number), [1, 2], SamplingParams(max_tokens=1)))
        sequences[-1].blocks = [block]
    items = tuple(ScheduledSequence(sequence, 0, 1, False, False) for sequence in sequences)
    llama.runner.run(Batch(items))
    assert seen[0].runs == ((0, 4, 3),)
    assert seen[0].is_single
