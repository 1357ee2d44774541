"""Adapters whose effect depends on where a token stands: soft prompts, prefixes, activated LoRA, LoReFT.

Greedy generation against PEFT's own `generate` (and the formulas of LoReFT), prompts in chunks of an odd size, prefixes
reused: what is shared is what was computed under the same edits, and nothing else.
"""

import asyncio
import copy
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.assemble import Server
from server.engine.flight import GenerationRequest
from server.engine.sequence import Delta, FinishReason, SamplingParams
from server.ground.errors import BadRequest, ContextTooLong
from server.model.quantize import Quantization
from tests.adapters.peft_adapters import INVOCATION, SEQUENCE_KINDS, make_adapter
from tests.adapters.reft import KINDS as REFT_KINDS
from tests.adapters.reft import make_reft, reft_logits
from tests.fidelity import dense_model, dequantized_twin
from tests.serving import Answer, Ask, answer_all, serving
from tests.test_isolation import NEAR_TIE, asks, check_isolation, check_nothing_leaks

NUM_NEW = 12
GREEDY = SamplingParams(NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=2)
ALL = (*SEQUENCE_KINDS, *REFT_KINDS)
BLOCK_SIZE = 8
CHUNK = 13


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def folders(dense: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(ALL):
        if kind in REFT_KINDS:
            make_reft(dense, kind, folder / kind, seed)
        else:
            make_adapter(dense, kind, folder / kind, seed)
    make_adapter(dense, "lora", folder / "lora", 99)
    return folder


@pytest.fixture(scope="module")
def server(tiny_llama: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {"adapters": str(folders), "block_size": str(BLOCK_SIZE), "max_batch_tokens": str(CHUNK)}
    with serving(tiny_llama, tmp_path_factory.mktemp("scratch"), max_sequences=str(CHUNK), **flags) as server:
        yield server


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """A prompt that no other test has, with the invocation in it."""
    dice = random.Random(request.node.name)
    words = [dice.randrange(256) for _ in range(60)]
    return (*words[:40], *INVOCATION, *words[40:])


def generated(dense: PreTrainedModel, folder: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """Logits (new tokens, vocabulary) of the reference's own greedy answer."""
    if folder.name in REFT_KINDS:
        return _generated_by_formula(dense, folder, prompt)
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(copy.deepcopy(dense), folder).eval()
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.cat(out.logits)


def _generated_by_formula(dense: PreTrainedModel, folder: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    ids, rows = list(prompt), []
    for _ in range(NUM_NEW):
        rows.append(reft_logits(dense, folder, torch.tensor([ids]), len(prompt))[0, -1])
        ids.append(int(rows[-1].argmax()))
    return torch.stack(rows)


def check_generation(got: Answer, expected: torch.Tensor) -> None:
    """The same tokens, each with the same probability, up to the first near tie."""
    assert got.error is None
    best = expected.log_softmax(-1).topk(2)
    for number, (scores, ids) in enumerate(zip(best.values, best.indices, strict=True)):
        assert got.logprobs[number].top[0][1] == pytest.approx(scores[0].item(), abs=1e-4)
        if scores[0] - scores[1] < NEAR_TIE:
            assert number > 0
            return
        assert got.token_ids[number] == ids[0]


@pytest.mark.parametrize("kind", ALL)
def test_greedy_generation_is_the_references_own(
    server: Server, dense: PreTrainedModel, folders: Path, kind: str, prompt: tuple[int, ...]
) -> None:
    """Twice: the second answer finds the prompt's blocks in the cache."""
    expected = generated(dense, folders / kind, prompt)
    for _ in range(2):
        before = server.engine.stats().num_hit_tokens
        check_generation(answer_all(server, [Ask(kind, prompt, GREEDY)])[0], expected)
    assert server.engine.stats().num_hit_tokens - before >= len(prompt) - BLOCK_SIZE


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_greedy_generation_on_fused_projections_and_on_nf4(
    model_folder: Callable[[str], Path], tmp_path: Path, quantize: str
) -> None:
    """Phi-3, all of them in flight at once. NF4 in float32 multiplies with the dense twin's very values."""
    folder = model_folder("phi3")
    dense = dense_model(folder) if quantize == "none" else dequantized_twin(folder, Quantization.NF4, torch.float32)
    kinds = ("prompt_tuning", "prefix_tuning", "alora", "loreft", "loreft-relu")
    for seed, kind in enumerate(kinds):
        (make_reft if kind in REFT_KINDS else make_adapter)(dense, kind, tmp_path / "adapters" / kind, seed)
    dice = random.Random(quantize)
    prompts = [(*[dice.randrange(256) for _ in range(20 + 7 * n)], *INVOCATION, 9, 4) for n in range(len(kinds))]
    flags = {"adapters": str(tmp_path / "adapters"), "block_size": str(BLOCK_SIZE), "max_batch_tokens": str(CHUNK)}
    with serving(folder, tmp_path, max_sequences=str(CHUNK), quantize=quantize, **flags) as server:
        asked = [Ask(*pair, GREEDY) for pair in zip(kinds, prompts, strict=True)]
        for _ in range(2):
            for ask, got in zip(asked, answer_all(server, asked), strict=True):
                check_generation(got, generated(dense, tmp_path / "adapters" / str(ask.adapter), ask.prompt))
        check_nothing_leaks(server)


@pytest.mark.parametrize("seed", [0, 1])
def test_all_together_they_answer_as_each_alone(server: Server, seed: int) -> None:
    dice = random.Random(seed)
    requests = asks(dice, (*ALL, "lora"), max_tokens=16)
    invoked = [Ask(a.adapter, (*a.prompt, *INVOCATION, *a.prompt[:9]), a.params) for a in requests]
    check_isolation(server, invoked)
    check_nothing_leaks(server)


# What is shared


def hits(server: Server, name: str | None, prompt: tuple[int, ...]) -> int:
    before = server.engine.stats().num_hit_tokens
    assert answer_all(server, [Ask(name, prompt, GREEDY)])[0].error is None
    return server.engine.stats().num_hit_tokens - before


def test_before_its_invocation_an_activated_lora_shares_the_bases_blocks(
    server: Server, prompt: tuple[int, ...]
) -> None:
    assert hits(server, None, prompt) == 0
    assert hits(server, "alora", prompt) == 40 // BLOCK_SIZE * BLOCK_SIZE


def test_the_base_finds_what_an_activated_lora_computed_before_its_invocation(
    server: Server, prompt: tuple[int, ...]
) -> None:
    assert hits(server, "alora", prompt) == 0
    assert hits(server, None, prompt) == 40 // BLOCK_SIZE * BLOCK_SIZE
    assert hits(server, "alora-query-only", prompt) == 40 // BLOCK_SIZE * BLOCK_SIZE


def test_without_an_invocation_an_activated_lora_is_the_base(server: Server, prompt: tuple[int, ...]) -> None:
    plain = prompt[:40]
    of_base, of_adapter = answer_all(server, [Ask(None, plain, GREEDY), Ask("alora", plain, GREEDY)])
    assert of_adapter.token_ids == of_base.token_ids


@pytest.mark.parametrize("kind", ["loreft", "lora"])
def test_what_is_edited_from_the_start_shares_nothing_with_the_base(
    server: Server, kind: str, prompt: tuple[int, ...]
) -> None:
    assert hits(server, None, prompt) == 0
    assert hits(server, kind, prompt) == 0


def test_an_intervention_at_the_end_shares_the_bases_blocks_before_it(server: Server, prompt: tuple[int, ...]) -> None:
    assert hits(server, None, prompt) == 0
    assert hits(server, "loreft-last", prompt) == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_virtual_tokens_are_computed_once_for_all_prompts(
    server: Server, dense: PreTrainedModel, folders: Path, prompt: tuple[int, ...]
) -> None:
    """21 virtual tokens fill two blocks of 8, which are shared; the others are copied."""
    other = tuple(reversed(prompt))
    hits(server, "prefix_tuning", prompt)
    assert hits(server, "prefix_tuning", other) == 21
    [got] = answer_all(server, [Ask("prefix_tuning", other[:9], GREEDY)])
    check_generation(got, generated(dense, folders / "prefix_tuning", other[:9]))


# What users are told


def test_virtual_tokens_are_not_counted_as_the_prompts(server: Server, prompt: tuple[int, ...]) -> None:
    params = SamplingParams(2, temperature=0.0, logprobs=1, prompt_logprobs=1)
    of_base, of_adapter = answer_all(server, [Ask(None, prompt, params), Ask("prompt_tuning", prompt, params)])
    for got in (of_base, of_adapter):
        assert [score.token_id for score in got.prompt_logprobs] == list(prompt)
        assert got.prompt_logprobs[0].logprob is None
    assert of_base.prompt_logprobs[1:] != of_adapter.prompt_logprobs[1:]


def test_a_prompt_that_virtual_tokens_leave_no_room_is_refused(server: Server) -> None:
    full = tuple(range(100)) * 20
    fits = full[: server.base.max_context - 1]
    answer_all(server, [Ask("prefix_tuning", full[:9], SamplingParams(1, temperature=0.0))])  # now it is loaded
    with pytest.raises(ContextTooLong, match="the adapter puts 21 virtual ones before it"):
        answer_all(server, [Ask("prefix_tuning", fits, SamplingParams(1, temperature=0.0))])
    check_nothing_leaks(server)


def test_an_answer_ends_where_the_context_does(server: Server) -> None:
    """The request fits without the virtual tokens."""
    prompt = tuple(range(100)) * 20
    prompt = prompt[: server.base.max_context - 30]
    got = answer_all(server, [Ask("prefix_tuning", prompt, SamplingParams(30, temperature=0.0, ignore_eos=True))])[0]
    assert (got.error, got.finish_reason, len(got.token_ids)) == (None, FinishReason.LENGTH, 30 - 21)
    check_nothing_leaks(server)


@pytest.mark.parametrize("kind", ["prompt_tuning", "alora", "loreft"])
def test_they_are_not_mixed_with_others(server: Server, kind: str) -> None:
    lease = server.registry.lease_mix([(kind, 0.5), ("lora", 0.5)])
    request = GenerationRequest(f"mix-of-{kind}", (1, 2, 3), GREEDY, lease)

    async def last() -> Delta:
        return [delta async for delta in server.engine.submit(request)][-1]

    error = asyncio.run(last()).error
    assert isinstance(error, BadRequest)
    assert "cannot be mixed with others" in error.message
