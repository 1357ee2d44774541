"""Steps that overlap choose what steps one after another choose, whatever a choice depends on."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.assemble import Server
from server.engine.sequence import FinishReason, SamplingParams
from tests.adapters.peft_adapters import make_adapter
from tests.serving import Answer, Ask, answer_all, serving
from tests.test_isolation import check_isolation, check_nothing_leaks

KINDS = ("lora", "dora", "vera", "ia3", "alora", "prompt_tuning", "prefix_tuning", "oft")
GREEDY = SamplingParams(12, temperature=0.0, ignore_eos=True)
RULES = {
    "drawn": replace(GREEDY, temperature=1.0, seed=3),
    "cut": replace(GREEDY, temperature=1.3, seed=4, top_p=0.8, top_k=30, min_p=0.01),
    "penalized": replace(GREEDY, repetition_penalty=1.5, frequency_penalty=1.0, presence_penalty=0.5),
    "long enough": replace(GREEDY, ignore_eos=False, min_tokens=5),
    "biased": replace(GREEDY, logit_bias=((65, 5.0), (66, -3.0))),
    "scored": replace(GREEDY, logprobs=3, prompt_logprobs=2),
    "only scored": replace(GREEDY, max_tokens=0, prompt_logprobs=1),
    "one token": replace(GREEDY, max_tokens=1),
}


@pytest.fixture(scope="module")
def servers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The same adapters, few seats and small chunks: one step at a time, and with overlap."""
    scratch = tmp_path_factory.mktemp("overlap")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for seed, kind in enumerate(KINDS):
        make_adapter(dense, kind, scratch / "adapters" / kind, seed)
    flags = {"adapters": str(scratch / "adapters"), "max_sequences": "6", "max_batch_tokens": "32"}
    with (
        serving(tiny_llama, scratch / "off", **flags, overlap="off") as plain,
        serving(tiny_llama, scratch / "on", **flags, overlap="on", kv_memory="192KiB") as overlapping,
    ):
        yield {"off": plain, "on": overlapping}


def asks(params: SamplingParams) -> list[Ask]:
    prompts = itertools.cycle([(7, 8, 9), (1,), tuple(range(40, 130)), tuple(range(20, 52))])
    return [Ask(name, prompt, params) for name, prompt in zip([None, *KINDS, None], prompts, strict=False)]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_chosen_does_not_depend_on_overlap(servers: dict[str, Server], rule: str) -> None:
    plain, overlapping = (answer_all(servers[name], asks(RULES[rule])) for name in ("off", "on"))
    equal = sum(_told(one) == _told(other) for one, other in zip(plain, overlapping, strict=True))
    # Batches differ in shape, so a near tie may fall on either side.
    assert equal >= len(plain) - 1
    check_nothing_leaks(servers["on"])


def _told(answer: Answer) -> tuple[tuple[int, ...], str, FinishReason, int, int]:
    assert answer.error is None
    scored = len(answer.logprobs), len(answer.prompt_logprobs)
    return answer.token_ids, answer.text, answer.finish_reason, *scored


def test_a_mixed_batch_answers_as_each_request_alone(servers: dict[str, Server]) -> None:
    """Long enough that sequences are preempted while their newest token is not known yet."""
    long = replace(GREEDY, max_tokens=60, logprobs=2)
    check_isolation(servers["on"], asks(long) + asks(long))
    assert servers["on"].engine.stats().num_preemptions > 0
    check_nothing_leaks(servers["on"])


def test_an_answer_ends_where_a_stop_string_or_a_token_ends_it(servers: dict[str, Server]) -> None:
    """The step that is under way then computes the sequence once in vain."""
    (free,) = answer_all(servers["off"], [Ask("lora", (7, 8, 9), GREEDY)])
    token = free.token_ids[5]
    cut = free.token_ids[: free.token_ids.index(token) + 1]
    by_token = replace(GREEDY, stop_token_ids=frozenset({token}), ignore_eos=True)
    for server in servers.values():
        (answer,) = answer_all(server, [Ask("lora", (7, 8, 9), by_token)])
        assert (answer.token_ids, answer.finish_reason) == (cut, FinishReason.STOP)
        check_nothing_leaks(server)
