"""What FlashInfer is told of a step, as numbers, and how often: once for each kind of layer."""

from dataclasses import dataclass, field

import pytest
import torch

from server.ops.prefill import AttentionLayer, Chunks
from server.ops.prefill import flashinfer_plan as module
from server.ops.prefill.flashinfer_plan import FlashInfer, FlashInferPlan
from tests.ops.prefill.libraries import BatchPrefill

CPU = torch.device("cpu")
CHUNKS = Chunks(starts=(0, 3, 8), lengths=(11, 8), blocks=((7, 2, 4), (5, 1)))


@dataclass
class Bench:
    """FlashInfer with wrappers that remember, on blocks of 4 tokens and layers of four heads of 8 numbers."""

    wrappers: list[BatchPrefill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.library = FlashInfer(self.make, CPU)

    def make(self, workspace: torch.Tensor, layout: str) -> BatchPrefill:
        self.wrappers.append(BatchPrefill(workspace, layout))
        return self.wrappers[-1]

    def plan(self) -> FlashInferPlan:
        return self.library.plan(CHUNKS, 4, CPU)

    def attend(self, plan: FlashInferPlan, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        caches = torch.randn(2, 9, 2, 4, 8, dtype=torch.float16)
        return plan.attend(torch.randn(8, 4, 8), *caches, scaling=0.5, window=window, softcap=softcap)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_numbers_of_a_step(bench: Bench) -> None:
    out = bench.attend(bench.plan(), window=6, softcap=30.0)
    assert (out.dtype, out.shape) == (torch.float32, (8, 4, 8))
    ((told,),) = [wrapper.plans for wrapper in bench.wrappers]
    assert {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in told.items()} == {
        "qo_indptr": [0, 3, 8],
        "paged_kv_indptr": [0, 3, 5],
        "paged_kv_indices": [7, 2, 4, 5, 1],
        "paged_kv_last_page_len": [3, 4],
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 8,
        "page_size": 4,
        "causal": True,
        "sm_scale": 0.5,
        "window_left": 5,
        "logits_soft_cap": 30.0,
        "q_data_type": torch.float16,
        "kv_data_type": torch.float16,
    }


def test_no_window_and_no_cap(bench: Bench) -> None:
    bench.attend(bench.plan())
    (told,) = bench.wrappers[0].plans
    assert (told["window_left"], told["logits_soft_cap"]) == (-1, None)


def test_layers_of_a_kind_share_a_plan_and_steps_do_not(bench: Bench) -> None:
    first, second = bench.plan(), bench.plan()
    for window in (None, 6, None, 6, None):
        bench.attend(first, window)
    assert [len(wrapper.plans) for wrapper in bench.wrappers] == [1, 1]
    bench.attend(second)
    assert [len(wrapper.plans) for wrapper in bench.wrappers] == [2, 1]
    assert bench.wrappers[0].workspace is bench.wrappers[1].workspace


def test_a_step_that_failed_half_way_is_planned_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    step = bench.plan()
    bench.attend(step)

    def failing(*numbers: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    other = bench.plan()
    monkeypatch.setattr(bench.wrappers[0], "plan", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.attend(other)
    monkeypatch.undo()
    bench.attend(other)
    assert len(bench.wrappers[0].plans) == 2


class Marked:
    """What an event and a wrapper do, in the order in which they do it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def synchronize(self) -> None:
        self.done.append("wait for the last copy")

    def plan(self, *numbers: object, **options: object) -> None:
        self.done.append("plan")

    def record(self) -> None:
        self.done.append("mark the copy")


def test_on_a_gpu_a_plan_is_written_when_the_last_one_has_been_copied(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps overlap, and FlashInfer keeps a plan in memory that the device reads later."""
    marked = Marked()
    monkeypatch.setattr(torch.cuda, "Event", lambda: marked)
    own = module._Wrapper(marked, torch.device("cuda"))
    for step in (bench.plan(), bench.plan()):
        for _ in range(2):
            own.plan(step, AttentionLayer(4, 2, 8, 0.5), torch.float16)
    assert marked.done == ["wait for the last copy", "plan", "mark the copy"] * 2
