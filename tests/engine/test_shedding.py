"""A step that runs out of memory: it is taken back, smaller ones follow, and no answer changes.

What plays the forward pass and the device is `test_scheduler`'s; the steps fail where these tests say so.
"""

from dataclasses import replace
from typing import Any

import pytest

from server.engine.sequence import FinishReason, Sequence
from server.model.exhaustion import is_out_of_memory
from tests.engine.test_scheduler import Server, alone, assert_nothing_is_held


def crowded(num_sequences: int, **limits: Any) -> tuple[Server, list[Sequence]]:
    """Sequences that all decode."""
    server = Server(**{"num_blocks": 400, "max_sequences": 8, "max_batch_tokens": 64, **limits})
    sequences = [server.add(server.sequence(max_tokens=120)) for _ in range(num_sequences)]
    server.step()
    return server, sequences


def test_the_next_step_has_half_as_many_and_those_that_came_first() -> None:
    server, sequences = crowded(8)
    assert server.scheduler.shed(server.scheduler.schedule()) is None
    assert (server.scheduler.num_running, server.scheduler.num_waiting) == (4, 4)
    assert [item.sequence for item in server.scheduler.schedule().sequences] == sequences[:4]
    server.scheduler.check_integrity()


def test_the_lowest_priority_goes_first() -> None:
    server = Server(num_blocks=400, max_sequences=4, max_batch_tokens=64)
    ordered = [server.sequence(max_tokens=9) for _ in range(4)]
    for sequence, priority in zip(ordered, (5, 0, 5, 0), strict=True):
        sequence.params = replace(sequence.params, priority=priority)
        server.add(sequence)
    server.step()
    server.scheduler.shed(server.scheduler.schedule())
    running = {item.sequence.sequence_id for item in server.scheduler.schedule().sequences}
    assert running == {ordered[1].sequence_id, ordered[3].sequence_id}


def test_again_and_again_it_comes_down_to_one_token_and_then_names_the_sequence() -> None:
    server = Server(num_blocks=400, max_sequences=4, max_batch_tokens=64)
    long = server.add(server.sequence(40, max_tokens=2))
    sizes, hopeless = [], None
    while hopeless is None:
        batch = server.scheduler.schedule()
        sizes.append(batch.num_tokens)
        hopeless = server.scheduler.shed(batch)
        server.scheduler.check_integrity()
    assert sizes == [40, 20, 10, 5, 2, 1]
    assert hopeless is long
    assert server.scheduler.discard(long)
    assert_nothing_is_held(server)


def test_steps_grow_again_when_many_have_gone_well() -> None:
    server, sequences = crowded(8)
    server.scheduler.shed(server.scheduler.schedule())
    sizes = []
    while server.scheduler.num_running + server.scheduler.num_waiting:
        sizes.append(len(server.step().sequences))
    assert max(sizes[:50]) == 4, "the ceiling holds"
    assert 8 in sizes[50:], "and is raised"
    assert [reason for _, reason in server.endings] == [FinishReason.LENGTH] * 8
    assert [sequence.output_ids for sequence in sequences] == [alone(sequence) for sequence in sequences]
    assert server.scheduler.num_shed == 1
    assert_nothing_is_held(server)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_the_words_for_no_memory_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("an illegal memory access was encountered"), ValueError("out of memory")]
)
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)
