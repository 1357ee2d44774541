"""Nobody waits by accident: adapters are placed, and steps launched, chosen and scored, on a device that is far away.

`tests/far_device.py` says what would wait for a GPU. What is read at the end is what a near device gives.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters.device.device import DeviceTier
from server.adapters.host import HostTier
from server.adapters.method import Edit, Lowered
from server.engine.choice import choose
from server.engine.chosen import Chosen
from server.engine.masks import StepMasks
from server.engine.runner import Runner
from server.engine.scores import StepScores
from server.engine.sequence import UNKNOWN_TOKEN, Batch, SamplingParams, ScheduledSequence, TokenLogprobs
from server.engine.sequence import Sequence as Running
from server.engine.token_rules import TokenRules, token_rules
from server.model.attention import IMPLEMENTATION
from server.model.base import Base
from server.model.site import Site, SiteKind
from tests.adapters.random_edits import random_adapter, with_random_ops
from tests.far_device import FAR, contents, far_device, send_away

NEAR = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, EOS = 8, 40, frozenset({257})


# What is placed


def with_other_ops(sites: Sequence[Site], seed: int) -> Lowered:
    """Rows, weights, norms, prefixes and bottlenecks of an adapter's own: what `with_random_ops` has not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    by_path = {site.path: site for site in sites}
    table = next(site for site in sites if site.kind is SiteKind.EMBEDDING)
    attention = next(site for site in sites if site.kind is SiteKind.ATTENTION)
    layer, width, rank = "model.layers.0", table.d_out, 2 + seed
    query, output = (by_path[f"{layer}.self_attn.{name}_proj"] for name in "qo")
    bottleneck = {
        "down": normal(rank, width), "down_bias": normal(rank), "up": normal(rank, width), "up_bias": normal(width),
        "act": torch.tensor([float(seed)]), "reads": torch.tensor([0.0, 1.0]),
        "after": torch.stack([1 + normal(width), normal(width)]), "is_last": torch.zeros(1),
    }  # fmt: skip
    rows = {"ids": torch.tensor([7.0, -1.0, 40.0 + seed]), "rows": normal(3, width)}
    ops: dict[str, dict[str, dict[str, torch.Tensor]]] = {
        table.path: {"token_rows": rows},
        "lm_head": {"token_rows": rows},
        attention.path: {"kv_rows": {"rows": normal(1, attention.d_in)}},
        f"{layer}.input_layernorm": {"norm_weight": {"weight": 1 + normal(width), "bias": normal(width)}},
        f"{layer}.post_attention_layernorm": {"keep_stream": {}},
        f"{layer}.mlp.down_proj": {"bottleneck": bottleneck},
        query.path: {"own_weight": {"weight": normal(query.d_out, query.d_in)}},
        output.path: {"circulant": {"kernel": normal(output.d_out // 8, output.d_in // 8, 8)}},
    }
    edits = {path: Edit(ops=own) for path, own in ops.items()}
    return Lowered("random", 0, 1, edits, num_virtual_tokens=1)


def lowered(name: str, sites: Sequence[Site]) -> Lowered:
    """By its name: rank rows, ops that turn, or all the other ops; and a number, which seeds it."""
    kind, seed = name[:-1], int(name[-1])
    if kind == "rows":  # of ranks so different that they are laid under one another, or alike
        return random_adapter(sites, seed, max_rank=2 + 10 * (seed % 2))
    nothing = Lowered("random", 0, 1, {})
    return with_random_ops(nothing, sites, seed) if kind == "turns" else with_other_ops(sites, seed)


class Bench:
    """A runner on one of the two devices, with adapters that are placed when they are wanted."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
        if device == FAR:
            send_away(model)
        self.base = Base(model, "base", torch.float32, device)
        self.tier = DeviceTier(self.base.sites, 8 << 20, torch.float32, device)
        self.runner = Runner(self.base, self.tier, NUM_BLOCKS, BLOCK_SIZE)
        self.host = HostTier(1 << 30, torch.float32, pin=device == FAR)

    def admit(self, name: str, tier: DeviceTier | None = None) -> int:
        adapter = self.host.put(name, lowered(name, tuple(self.base.sites.by_path.values())))
        return (tier or self.tier).admit(name, adapter)


@pytest.fixture(scope="module")
def near(tiny_llama: Path) -> Bench:
    return Bench(tiny_llama, NEAR)


@pytest.fixture(scope="module")
def far(tiny_llama: Path) -> Iterator[Bench]:
    with far_device() as device:
        with device.waiting():
            bench = Bench(tiny_llama, FAR)
            for site in bench.base.sites.sites:
                _ = site.weight_offset  # found once in the life of a server
        yield bench


# What is computed


@dataclass(frozen=True)
class Told:
    """What a step gives, by sequence id."""

    tokens: dict[str, int]
    scores: dict[str, TokenLogprobs]
    prompts: dict[str, tuple[int, tuple[TokenLogprobs, ...]]]


@dataclass
class Flying:
    """What a choice asks a flight for."""

    rules: TokenRules | None

    def uniform(self) -> float:
        return 0.6


class Play:
    """Sequences of some adapters, in steps that overlap."""

    def __init__(self, bench: Bench, names: Sequence[str | None], params: Sequence[SamplingParams]) -> None:
        self.bench, self._free = bench, iter(range(NUM_BLOCKS))
        self.running: list[Running] = []
        for number, (name, own) in enumerate(zip(names, params, strict=True)):
            sequence = Running(f"s{number}", [7, 8, *range(40, 50 + number)], own)
            if name is not None:
                slot = bench.admit(name)
                sequence.take(slot, bench.tier.reach(slot))
            sequence.blocks = [next(self._free) for _ in range(4)]
            self.running.append(sequence)
        self.flights: dict[str, Any] = {s.sequence_id: Flying(token_rules(s, EOS)) for s in self.running}
        self.told: list[Told] = []
        self._under_way: tuple[Batch, Chosen, StepScores] | None = None

    def step(self, max_sizes: Sequence[int]) -> None:
        """So many tokens of each sequence at most: launched, the step before read, and then chosen and scored."""
        items = []
        for sequence, max_size in zip(self.running, max_sizes, strict=True):
            start, size = sequence.num_computed_tokens, min(max_size, sequence.num_pending)
            is_scored = sequence.params.prompt_logprobs is not None and start < sequence.num_first_tokens
            items.append(ScheduledSequence(sequence, start, size, size == sequence.num_pending, is_scored))
        batch, before = Batch(tuple(items)), self._under_way
        logits = self.bench.runner.run(batch, None if before is None else before[1])
        self.read()
        chosen = choose(logits, self.flights, None)
        self._under_way = batch, chosen, StepScores(logits, chosen)
        for item in items:
            item.sequence.num_computed_tokens += item.num_tokens
            if item.samples:
                item.sequence.output_ids.append(UNKNOWN_TOKEN)

    def read(self) -> None:
        """What the step under way gives."""
        if self._under_way is None:
            return
        (batch, chosen, scores), self._under_way = self._under_way, None
        tokens = chosen.read()
        prompts = {name: own.read() for name, own in scores.prompts.items() if own is not None and own.is_finite()}
        self.told.append(Told(tokens, scores.read(tokens), prompts))
        for item in batch.sequences:
            if item.samples:
                item.sequence.output_ids[-1] = tokens[item.sequence.sequence_id]


GREEDY = SamplingParams(9, temperature=0.0, ignore_eos=True)
SCORED = SamplingParams(9, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2)


def check(near: Bench, far: Bench, names: Sequence[str | None], params: Sequence[SamplingParams]) -> None:
    """Every other prompt in one chunk, the rest in two, beside the decodes of the first; then decodes alone."""
    told = []
    for bench in (near, far):
        play = Play(bench, names, params)
        for max_sizes in ([99, 5] * len(names), *[[99] * len(names)] * 3):
            play.step(max_sizes[: len(names)])
        play.read()
        told.append(play.told)
    assert len(told[0]) == 4
    for expected, found in zip(*told, strict=True):
        check_told(expected, found)


def check_told(expected: Told, found: Told) -> None:
    assert found.tokens == expected.tokens
    assert found.scores.keys() == expected.scores.keys()
    assert {name: start for name, (start, _) in found.prompts.items()} == {
        name: start for name, (start, _) in expected.prompts.items()
    }
    for name, score in expected.scores.items():
        check_score(found.scores[name], score)
    for name, (_, scores) in expected.prompts.items():
        for one, score in zip(found.prompts[name][1], scores, strict=True):
            check_score(one, score)


def check_score(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert (found.token_id, [token for token, _ in found.top]) == (
        expected.token_id, [token for token, _ in expected.top],
    )  # fmt: skip
    numbers = [[own.logprob, *(p for _, p in own.top)] for own in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)


NAMES = {
    "base": [None, None],
    "rows alike": [None, "rows0", "rows2", "rows0"],
    "rows of many ranks": [None, "rows0", "rows1", "rows3"],
    "turns": [None, "turns0", "turns1", "turns0", "turns2"],
    "other ops": [None, "others0", "others1", "others0"],
    "all": [None, "rows0", "turns0", "others0", "rows1"],
}


@pytest.mark.parametrize("adapters", NAMES)
def test_a_step_waits_for_nothing(near: Bench, far: Bench, adapters: str) -> None:
    check(near, far, NAMES[adapters], [SCORED] * len(NAMES[adapters]))


RULES = {
    "greedy": GREEDY,
    "drawn": replace(GREEDY, temperature=1.0),
    "cut": replace(GREEDY, temperature=0.9, top_p=0.8, top_k=20, min_p=0.01),
    "penalized": replace(GREEDY, repetition_penalty=1.5, presence_penalty=0.5),
    "biased": replace(GREEDY, logit_bias=((65, 5.0),), allowed_token_ids=tuple(range(50, 90))),
    "long enough": replace(GREEDY, ignore_eos=False, min_tokens=5),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_choice_waits_for_nothing(near: Bench, far: Bench, rule: str) -> None:
    check(near, far, [None, None], [RULES[rule]] * 2)


def test_neighbours_that_ask_for_different_things_wait_for_nothing(near: Bench, far: Bench) -> None:
    params = [SCORED, RULES["drawn"], replace(SCORED, prompt_logprobs=None), RULES["cut"], replace(SCORED, logprobs=0)]
    check(near, far, [None] * len(params), params)


# With tables for kernels


def told_by_tables(bench: Bench) -> list[list[int]]:
    """The sheets of two adapters and the base's, and all that a step of theirs is told beside them."""
    tier = DeviceTier(bench.base.sites, 8 << 20, torch.float32, bench.base.device, has_tables=True)
    slots = [bench.admit(name, tier) for name in ("rows1", "rows3")]
    step, tables = tier.tables([0, *slots, slots[0]], [slots[1]]), tier._tables
    assert step is not None
    assert tables is not None
    runs = [runs for tokens in (step.tokens, step.kept) if tokens for runs in (tokens.by_down, tokens.by_up)]
    tensors = [tables._entries[slot].sheet for slot in slots]
    tensors += [step.group(group.index).members for group in bench.base.sites.groups]
    tensors += [step.tokens.slots, *(part for one in runs for part in (one.order, one.starts))]
    return [contents(tensor).flatten().tolist() for tensor in tensors]


def test_the_sheet_of_an_adapter_that_is_placed_waits_for_nothing(near: Bench, far: Bench) -> None:
    assert told_by_tables(far) == told_by_tables(near)


def test_masks_wait_for_nothing(near: Bench, far: Bench) -> None:
    found = []
    for bench in (near, far):
        play = Play(bench, [None, None], [GREEDY] * 2)
        items = tuple(ScheduledSequence(sequence, 0, sequence.num_pending, True, False) for sequence in play.running)
        filled: Future[torch.Tensor] = Future()
        filled.set_result(torch.tensor([[0, 0b1010] + [0] * 7], dtype=torch.int32))
        chosen = choose(bench.runner.run(Batch(items)), play.flights, StepMasks(["s1"], filled))
        found.append(chosen.read())
    assert found[0] == found[1]
    assert found[1]["s1"] in (33, 35)
