"""Mixes through the running engine: what PEFT's merged weights answer, beside any neighbour, with nothing mixed up."""

import asyncio
import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from server.assemble import Server
from server.engine.flight import GenerationRequest
from server.engine.sequence import SamplingParams
from server.ground.errors import BadRequest
from server.model.quantize import Quantization
from tests.adapters.peft_adapters import make_adapter
from tests.adapters.peft_mixes import merged_logits, peft_warnings_off
from tests.fidelity import NUM_NEW_TOKENS, dense_model, dequantized_twin
from tests.models import VOCAB_SIZE
from tests.serving import Answer, logprob_rows, serving
from tests.test_isolation import check_nothing_leaks, compared

Mix = tuple[tuple[str, float], ...]

KINDS: Mapping[str, str] = {  # name -> kind
    "lora": "lora", "wide": "lora-wide", "ranks": "lora-patterns", "shifted": "lora-bias-of-b", "rslora": "rslora",
    "ends": "lora-embedding-and-head", "dora": "dora", "dora-ends": "dora-embedding-and-head", "vera": "vera",
    "vera-twin": "vera", "ia3": "ia3", "ia3-attention": "ia3-attention", "ia3-feedforward": "ia3-feedforward",
}  # fmt: skip
MIXES: Sequence[Mix] = (
    (),
    (("lora", 1.0),),
    (("lora", 0.6),),
    (("dora", 0.6),),
    (("dora", -0.5),),
    (("vera", 1.5),),
    (("ia3", 0.6),),
    (("lora", 0.7), ("wide", 0.3)),
    (("lora", 0.7), ("wide", 0.4)),
    (("wide", -1.0), ("ranks", 0.5), ("rslora", 1.0)),
    (("shifted", 0.5), ("ends", 0.5)),
    (("dora", 0.5), ("dora-ends", 0.7)),
    (("dora", 0.8), ("lora", 0.4), ("ranks", 0.2)),
    (("vera", 0.5), ("vera-twin", 0.9)),
    (("vera", 1.0), ("lora", 0.3)),
    (("vera", 0.5), ("dora", 0.5)),
    (("ia3", 0.5), ("lora", 0.7), ("wide", 0.3)),
    (("ia3-attention", 0.5), ("vera", 0.7)),
    (("ia3-attention", 0.5), ("dora", 0.7)),
    (("ia3", 0.5), ("ia3-feedforward", 0.5)),
    (("lora", 0.2), ("wide", 0.2), ("ranks", 0.2), ("shifted", 0.2), ("rslora", 0.2), ("ends", 0.2), ("dora", 0.2),
     ("vera", 0.2)),
)  # fmt: skip
QUANTIZED: Sequence[Mix] = tuple(
    mix for mix in MIXES if mix and len(mix) < 3 and {"dora", "vera", "ia3"} & dict(mix).keys()
)
EXACT = SamplingParams(
    NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE
)
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Case:
    server: Server
    dense: PreTrainedModel
    folders: Mapping[str, Path]

    def answer_all(
        self, mixes: Sequence[Mix], prompts: Sequence[tuple[int, ...]], params: SamplingParams = EXACT
    ) -> list[Answer]:
        async def one(mix: Mix, prompt: tuple[int, ...]) -> Answer:
            lease = self.server.registry.lease_mix(mix)
            request = GenerationRequest(f"mix-{next(_numbers)}", prompt, params, lease)
            return Answer.of([delta async for delta in self.server.engine.submit(request)])

        async def together() -> list[Answer]:
            return await asyncio.gather(*map(one, mixes, prompts))

        return asyncio.run(together())

    def error(self, mix: Mix, prompt: tuple[int, ...], got: Answer) -> float:
        """Of the answer to PEFT's: see `relative_error`."""
        assert got.error is None
        ids = torch.tensor([[*prompt, *got.token_ids]])
        parts = {self.folders[name]: weight for name, weight in mix}
        return relative_error(merged_logits(self.dense, parts, ids), got)


def relative_error(logits: torch.Tensor, got: Answer) -> float:
    """Largest difference of log-probabilities over their scale, all positions of prompt and output."""
    expected = torch.log_softmax(logits[0, :-1].double(), dim=-1)
    actual = logprob_rows([*got.prompt_logprobs[1:], *got.logprobs], VOCAB_SIZE).double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_case(server: Server, dense: PreTrainedModel, scratch: Path) -> Case:
    return Case(server, dense, {name: scratch / "adapters" / name for name in KINDS})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixes")


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> PreTrainedModel:
    return dense_model(tiny_llama)


@pytest.fixture(scope="module")
def adapters(dense: PreTrainedModel, scratch: Path) -> Path:
    for seed, (name, kind) in enumerate(KINDS.items()):
        make_adapter(dense, kind, scratch / "adapters" / name, seed, strength=0.5)
    return scratch / "adapters"


@pytest.fixture(scope="module")
def case(tiny_llama: Path, dense: PreTrainedModel, adapters: Path, scratch: Path) -> Iterator[Case]:
    with serving(tiny_llama, scratch, adapters=str(adapters), max_sequences="24", max_batch_tokens="64") as server:
        yield make_case(server, dense, scratch)


def prompts_for(mixes: Sequence[Mix], seed: int) -> list[tuple[int, ...]]:
    dice = random.Random(seed)
    return [tuple(dice.randrange(256) for _ in range(dice.choice((2, 9, 30, 70)))) for _ in mixes]


def test_every_mix_in_one_batch_equals_pefts_merged_weights(case: Case) -> None:
    prompts = prompts_for(MIXES, 1)
    answers = case.answer_all(MIXES, prompts)
    errors = {mix: case.error(mix, *found) for mix, *found in zip(MIXES, prompts, answers, strict=True)}
    assert {mix: error for mix, error in errors.items() if not error < 2e-5} == {}
    check_nothing_leaks(case.server)


def test_a_lora_mix_equals_pefts_own_concatenation(case: Case) -> None:
    mix: Mix = (("lora", 0.7), ("wide", 0.3))
    prompt = tuple(range(40, 60))
    [got] = case.answer_all([mix], [prompt])
    with peft_warnings_off(), torch.no_grad():
        adapted = PeftModel.from_pretrained(copy.deepcopy(case.dense), case.folders["lora"], "lora")
        adapted.load_adapter(case.folders["wide"], "wide")
        adapted.add_weighted_adapter(["lora", "wide"], [0.7, 0.3], "both", combination_type="cat")
        adapted.set_adapter("both")
        logits = adapted(input_ids=torch.tensor([[*prompt, *got.token_ids]])).logits
    assert relative_error(logits, got) < 2e-5


def test_nf4_in_float32_is_as_exact(tiny_llama: Path, adapters: Path, scratch: Path) -> None:
    """DoRA's lengths are those of the dequantized weights, computed anew for the weight."""
    twin = dequantized_twin(tiny_llama, Quantization.NF4, torch.float32)
    with serving(tiny_llama, scratch, adapters=str(adapters), quantize="nf4") as server:
        case = make_case(server, twin, scratch)
        prompts = prompts_for(QUANTIZED, 2)
        answers = case.answer_all(QUANTIZED, prompts)
        errors = {mix: case.error(mix, *found) for mix, *found in zip(QUANTIZED, prompts, answers, strict=True)}
    assert {mix: error for mix, error in errors.items() if not error < 2e-5} == {}


def test_a_mixed_batch_of_mixes_and_their_parts_answers_as_each_alone(case: Case) -> None:
    dice = random.Random(3)
    mixes = [*MIXES, *(((name, 1.0),) for name in KINDS)]
    dice.shuffle(mixes)
    prompts = prompts_for(mixes, 4)
    greedy = SamplingParams(8, temperature=0.0, ignore_eos=True, logprobs=2)
    alone = [case.answer_all([mix], [prompt], greedy)[0] for mix, prompt in zip(mixes, prompts, strict=True)]
    together = case.answer_all(mixes, prompts, greedy)
    num_compared = sum(compared(a, b) for a, b in zip(alone, together, strict=True))
    assert num_compared >= 0.99 * 8 * len(mixes)
    check_nothing_leaks(case.server)


@pytest.mark.slow
def test_mixes_take_turns_where_few_fit(case: Case, tiny_llama: Path, adapters: Path, tmp_path: Path) -> None:
    """Room for a few adapters and a cache that preempts: slower, not different."""
    mixes = [*MIXES, *MIXES]
    prompts = prompts_for(mixes, 5)
    greedy = SamplingParams(8, temperature=0.0, ignore_eos=True, logprobs=2)
    alone = case.answer_all(mixes, prompts, greedy)
    flags = {"adapters": str(adapters), "adapter_memory": "512KiB", "kv_memory": "512KiB"}
    with serving(tiny_llama, tmp_path, **flags) as server:
        crowded = Case(server, case.dense, case.folders).answer_all(mixes, prompts, greedy)
        assert server.registry.stats().device_evictions_total > 0
        check_nothing_leaks(server)
    num_compared = sum(compared(a, b) for a, b in zip(alone, crowded, strict=True))
    assert num_compared >= 0.99 * 8 * len(mixes)


def test_a_mix_of_residents_takes_no_rows(case: Case) -> None:
    parts: Sequence[Mix] = [(("lora", 1.0),), (("wide", 1.0),), (("ranks", 1.0),)]
    prompt = (1, 2, 3)
    case.answer_all(parts, [prompt] * 3)
    before = case.server.adapters.used_bytes
    slots = case.server.adapters.num_slots
    case.answer_all([(("lora", 0.11), ("wide", 0.22), ("ranks", 0.33))], [prompt])
    assert case.server.adapters.num_slots == slots + 1
    assert case.server.adapters.used_bytes == before


def test_equal_mixes_share_the_cache_and_others_do_not(case: Case) -> None:
    """Law 4: what is computed under a mix is found again under that mix alone."""
    prompt = tuple(random.Random(6).randrange(256) for _ in range(200))

    def num_hits(mix: Mix) -> int:
        before = case.server.engine.stats().num_hit_tokens
        case.answer_all([mix], [prompt], SamplingParams(1, temperature=0.0))
        return case.server.engine.stats().num_hit_tokens - before

    first: Mix = (("lora", 0.25), ("rslora", 0.5))
    assert num_hits(first) == 0
    assert num_hits(first[::-1]) == num_hits(first) == 128
    others: Sequence[Mix] = [(("lora", 0.25),), (("lora", 0.25), ("rslora", 0.51)), (("lora", 1.0),), ()]
    assert [num_hits(other) for other in others] == [0, 0, 0, 0]


@pytest.mark.parametrize("others", [("dora",), ("lora", "dora")])
def test_what_has_no_sum_is_refused_by_adapters_and_site(case: Case, others: Sequence[str]) -> None:
    mix = (("ia3", 0.5), *((name, 0.5) for name in others))
    [got] = case.answer_all([mix], [(1, 2, 3)])
    assert isinstance(got.error, BadRequest)
    assert "ia3" in got.error.message
    assert "scales the input of model.layers." in got.error.message
    check_nothing_leaks(case.server)
