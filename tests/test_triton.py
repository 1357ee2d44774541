"""The laws with --ops triton: the engine's own fidelity and isolation with the kernels switched on.

Without a GPU they run in Triton's interpreter, on tiny models and few tokens.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.fidelity
from server.adapters.device.device import DeviceTier
from server.adapters.host import HostTier
from server.adapters.method import Lowered
from server.engine import sequence as engine
from server.engine.runner import Runner
from server.engine.sequence import SamplingParams
from server.ground.config import load
from server.ground.errors import StartupRefused
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops import load_four_bit_products, load_kernels, native
from tests.adapters.peft_adapters import make_adapter
from tests.adapters.random_edits import random_adapter, with_random_ops
from tests.fidelity import dense_model, dequantized_twin, serve_kinds
from tests.serving import Ask, serving
from tests.test_isolation import check_isolation, check_nothing_leaks

pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor

from server.ops import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = {"ops": "triton", "device": DEVICE, "adapter_memory": "2MiB", "kv_memory": "2MiB"}
# One of each method, both ends of the base, and a rank of each site's own.
KINDS = ("lora-embedding-and-head", "lora-patterns", "dora", "vera", "ia3")
# Ops beside the kernels, parts at some positions, virtual tokens.
SEQUENCE_KINDS = ("loreft", "alora", "prompt_tuning", "prefix_tuning", "dora-saved-norms", "lora-token-rows")


@pytest.fixture(scope="module", autouse=True)
def _little_work() -> Iterator[None]:
    """The interpreter computes one part after the other, also those that are empty, and for one thread at a time."""
    lock, run = threading.Lock(), GridExecutor.__call__

    def alone(self: GridExecutor, *arguments: Any, **named: Any) -> Any:
        with lock:
            return run(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", alone)
        patch.setattr(kernels, "_WANTED_PROGRAMS", 2)
        patch.setattr(tests.fidelity, "NUM_NEW_TOKENS", 2)
        yield


def check_fidelity(folder: Path, scratch: Path, kinds: tuple[str, ...]) -> None:
    with serve_kinds(folder, dense_model(folder), kinds, scratch, **FLAGS) as case:
        errors = {name: case.relative_error(name, *found) for name, found in case.answers().items()}
        check_nothing_leaks(case.server)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of computing without a pause; other processes may have the cores
@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [("llama", KINDS), ("gemma2", (KINDS[0], "dora")), ("gpt2", ("lora", "vera")), ("llama", SEQUENCE_KINDS)],
)
def test_every_method_in_one_batch_equals_peft_alone(
    architecture: str, kinds: tuple[str, ...], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Fused and single sites, transposed weights, windows, caps, scaled embeddings, tied heads."""
    check_fidelity(model_folder(architecture), tmp_path, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["auto", "triton"])
def test_adapters_on_4_bit_weights_that_triton_multiplies_equal_peft_on_what_they_stand_for(
    ops: str, wide_llama: Path, tmp_path: Path
) -> None:
    twin = dequantized_twin(wide_llama, Quantization.NF4, torch.float32)
    flags = {**FLAGS, "ops": ops, "quantize": "nf4", "four_bit_products": "triton"}
    kinds = ("lora", "dora", "vera", "ia3")  # dora reads the weights, ia3 scales what they read
    with serve_kinds(wide_llama, twin, kinds, tmp_path, **flags) as case:
        linears = [site for site in case.server.base.sites.products.values() if ".layers." in site.path]
        assert {type(site.fused).__name__ for site in linears} == {"FusedPacked"}
        errors = {name: case.relative_error(name, *found) for name, found in case.answers().items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_mixed_batch_answers_as_each_request_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """Room on the device for some of the adapters only, so that slots are given away and taken again."""
    dense = dense_model(tiny_llama)
    kinds = ("lora-patterns", "vera", "ia3", "dora")
    for seed, kind in enumerate(kinds):
        make_adapter(dense, kind, tmp_path / "adapters" / kind, seed)
    dice = random.Random(0)
    params = SamplingParams(3, temperature=0.0, ignore_eos=True, logprobs=2)
    requests = [
        Ask(name, tuple(dice.randrange(256) for _ in range(dice.choice((1, 7, 30)))), params) for name in (None, *kinds)
    ]
    flags = {"adapters": str(tmp_path / "adapters"), "max_sequences": "4", "max_batch_tokens": "48"}
    with serving(tiny_llama, tmp_path, **{**FLAGS, "adapter_memory": "100KiB"}, **flags) as server:
        check_isolation(server, requests)
        assert server.registry.stats().device_evictions_total > 0
        check_nothing_leaks(server)


def steps(base: Base, runner: Runner, slots: Sequence[int]) -> torch.Tensor:
    """The logits of a step with prompts of all slots, beside the base's, and of one with a token more for each."""
    dice, prompts = random.Random(1), []
    for number, slot in enumerate([0, *slots]):
        ids = [dice.randrange(base.vocab_size) for _ in range(1 + 3 * number)]
        prompts.append(
            engine.Sequence(str(number), ids, SamplingParams(4), slot=slot, blocks=[2 * number, 2 * number + 1])
        )
    first = [engine.ScheduledSequence(p, 0, len(p.prompt_ids), True, True) for p in prompts]
    out = [sampled(runner, first)]
    for prompt in prompts:
        prompt.output_ids.append(7)
    second = [engine.ScheduledSequence(p, len(p.prompt_ids), 1, True, False) for p in prompts]
    return torch.cat([*out, sampled(runner, second)])


def sampled(runner: Runner, items: Sequence[engine.ScheduledSequence]) -> torch.Tensor:
    """In the order of the items: how a runner packs them is its own business."""
    step = runner.run(engine.Batch(tuple(items)))
    return step.sampled[[step.samplers.index(item) for item in items]]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_edits_of_every_field_at_every_site_are_the_references(
    architecture: str, model_folder: Callable[[str], Path]
) -> None:
    """Sites of fused groups where one member scales its input, vectors without rows, embedding and head."""
    options = BaseOptions(str(model_folder(architecture)), Quantization.NONE, torch.float32, torch.device(DEVICE))
    base = Base.load(options)
    check_steps(base, [random_adapter(base.sites.by_path.values(), seed) for seed in range(3)])


def test_ops_come_before_and_after_what_kernels_do_as_they_do_in_the_reference(tiny_llama: Path) -> None:
    """Beside an adapter that has none."""
    base = Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32, torch.device(DEVICE)))
    sites = base.sites.by_path.values()
    adapters = [random_adapter(sites, seed, share=0.2) for seed in range(3)]
    check_steps(base, [adapters[0], *(with_random_ops(adapters[seed], sites, seed) for seed in (1, 2))])


def check_steps(base: Base, lowered: Sequence[Lowered]) -> None:
    """With kernels, a step's logits are those of the reference; with native ones too, where the device is theirs."""
    host = HostTier(1 << 30, torch.float32)
    adapters = [host.put(str(number), adapter) for number, adapter in enumerate(lowered)]
    found = []
    for module in (None, kernels, *([native] if base.device.type == "cpu" else [])):
        tier = DeviceTier(base.sites, 4 << 20, torch.float32, base.device, has_tables=module is not None)
        slots = [tier.admit(str(number), adapter) for number, adapter in enumerate(adapters)]
        found.append(steps(base, Runner(base, tier, 16, 8, module), slots))
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-4, atol=1e-4)


def test_what_computes_is_a_setting_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load({}).ops == "auto"
    monkeypatch.setenv("GRAFT_OPS", "triton")
    assert load({}).ops == "triton"
    assert load_kernels("reference", torch.device("cpu"), torch.float32) is None


def test_kernels_on_a_cpu_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(StartupRefused, match="--ops triton: its kernels need a GPU.*use --ops reference"):
        load_kernels("triton", torch.device("cpu"), torch.float32)


def test_products_of_4_bits_on_a_cpu_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert load_four_bit_products("auto", torch.device("cpu")) is None
    with pytest.raises(
        StartupRefused, match="--four-bit-products triton: its kernels need a GPU.*use --four-bit-produc"
    ):
        load_four_bit_products("triton", torch.device("cpu"))
