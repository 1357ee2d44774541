"""Law 1: a mixed batch gives each request the tokens that it gets alone, for every method, in any mix.

Unquantized float32, greedy. Matrix products of different shapes are not equal to the last bit, so a comparison ends
where the alone-run's two best tokens are closer than 1e-4, and nearly all tokens must have been compared.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.assemble import Server
from server.engine.sequence import SamplingParams
from tests.adapters.peft_adapters import KINDS, LINEAR_KINDS, OWN_KINDS, make_adapter
from tests.models import ARCHITECTURES
from tests.serving import Answer, Ask, answer_all, serving

NEAR_TIE = 1e-4
NUM_REQUESTS = 32
ALL_KINDS = (*KINDS, *LINEAR_KINDS, *OWN_KINDS)


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Small chunks and few seats, so that prefills, decodes and waiting requests meet."""
    scratch = tmp_path_factory.mktemp("isolation")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for seed, kind in enumerate(ALL_KINDS):
        make_adapter(dense, kind, scratch / "adapters" / kind, seed)
    with serving(
        tiny_llama, scratch, adapters=str(scratch / "adapters"), max_sequences="20", max_batch_tokens="64"
    ) as server:
        yield server


def asks(rng: random.Random, kinds: Sequence[str] = ALL_KINDS, max_tokens: int = 40) -> list[Ask]:
    """Requests over the base and every adapter, in random order, with prompts of all lengths."""
    names = [None, *kinds]
    chosen = [names[i % len(names)] for i in range(NUM_REQUESTS)]
    rng.shuffle(chosen)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.choice((1, 2, 7, 30, 90, 150)))) for _ in chosen]
    return [
        Ask(name, prompt, SamplingParams(rng.randint(8, max_tokens), temperature=0.0, ignore_eos=True, logprobs=2))
        for name, prompt in zip(chosen, prompts, strict=True)
    ]


def compared(alone: Answer, mixed: Answer) -> int:
    """Tokens compared and found equal, up to the first near tie; fails where they differ before one."""
    for number, (score, expected, got) in enumerate(zip(alone.logprobs, alone.token_ids, mixed.token_ids, strict=True)):
        best, second = score.top[0][1], score.top[1][1]
        if best - second < NEAR_TIE:
            return number
        assert got == expected, f"token {number} of {len(alone.token_ids)}"
    return len(alone.token_ids)


def check_isolation(server: Server, requests: Sequence[Ask]) -> None:
    alone = [answer_all(server, [ask])[0] for ask in requests]
    mixed = answer_all(server, requests)
    num_compared = sum(compared(a, b) for a, b in zip(alone, mixed, strict=True))
    assert num_compared >= 0.99 * sum(len(a.token_ids) for a in alone)


def check_nothing_leaks(server: Server) -> None:
    """Law 6, once nothing is in flight."""
    stats, registry = server.engine.stats(), server.registry.stats()
    assert (stats.num_in_flight, stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0, 0)
    assert (registry.num_leases, registry.num_residencies) == (0, 0)
    assert server.registry.check_integrity() == ()
    assert server.adapters.used_bytes + server.adapters.free_bytes + server.adapters.waste_bytes == (
        server.adapters.capacity_bytes
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mixed_batch_answers_as_each_request_alone(server: Server, seed: int) -> None:
    turned = 16 * seed  # more kinds than requests: each is in one of the batches
    check_isolation(server, asks(random.Random(seed), ALL_KINDS[turned:] + ALL_KINDS[:turned]))
    check_nothing_leaks(server)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"llama"}))
def test_a_mixed_batch_of_any_architecture_answers_as_each_request_alone(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A kind of each method; prompts shorter and far longer than windows, in one or two blocks of the cache."""
    kinds = ("lora", "dora", "vera", "ia3", *(("road", "oft", "lokr") if architecture == "phi3" else ()))
    dense = AutoModelForCausalLM.from_pretrained(model_folder(architecture), dtype=torch.float32)
    for seed, kind in enumerate(kinds):
        make_adapter(dense, kind, tmp_path / "adapters" / kind, seed)
    flags = {"adapters": str(tmp_path / "adapters"), "max_sequences": "20", "max_batch_tokens": "64"}
    with serving(model_folder(architecture), tmp_path, **flags) as server:
        check_isolation(server, asks(random.Random(0), kinds, max_tokens=8))
        check_nothing_leaks(server)


def test_a_seed_gives_the_same_answer_in_any_batch(server: Server) -> None:
    rng = random.Random(3)
    requests = [
        Ask(ask.adapter, ask.prompt, SamplingParams(12, temperature=0.9, top_p=0.9, top_k=40, seed=7, ignore_eos=True))
        for ask in asks(rng)
    ]
    alone = [answer_all(server, [ask])[0].token_ids for ask in requests]
    mixed = [answer.token_ids for answer in answer_all(server, requests)]
    equal = sum(a == b for a, b in zip(alone, mixed, strict=True))
    # A draw that falls on the border of two tokens' shares may fall on either side.
    assert equal >= len(requests) - 1


def test_more_adapters_than_fit_take_turns_and_answer_alike(tiny_llama: Path, tmp_path: Path) -> None:
    """Room for about three of twelve adapters, a KV cache that preempts: slower, not different."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    kinds = list(KINDS)[:12]
    for seed, kind in enumerate(kinds):
        make_adapter(dense, kind, tmp_path / "adapters" / kind, seed)
    rng = random.Random(4)
    requests = [
        Ask(name, tuple(rng.randrange(256) for _ in range(rng.choice((5, 118)))), SamplingParams(
            24, temperature=0.0, ignore_eos=True, logprobs=2))
        for name in [None, *kinds] * 2
    ]  # fmt: skip
    flags = {"adapters": str(tmp_path / "adapters"), "max_sequences": "16", "max_batch_tokens": "96"}
    with serving(tiny_llama, tmp_path, **flags, adapter_memory="280KiB", kv_memory="512KiB") as server:
        check_isolation(server, requests)
        assert server.registry.stats().device_evictions_total > 0
        assert server.engine.stats().num_preemptions > 0
        check_nothing_leaks(server)
