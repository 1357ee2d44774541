"""Law 7: the loop never waits for disk. Loading an adapter does not stop a running batch."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters.method import Lowered
from server.engine.flight import GenerationRequest
from server.engine.sequence import SamplingParams
from tests.adapters.peft_adapters import make_adapter
from tests.serving import Ask, answer, serving


def test_a_running_batch_goes_on_while_an_adapter_is_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading is held up until the base has finished a whole request beside it; then it ends, too."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    make_adapter(dense, "lora", tmp_path / "adapters" / "cold", seed=0)
    is_read, may_read = threading.Event(), threading.Event()
    with serving(tiny_llama, tmp_path, adapters=str(tmp_path / "adapters")) as server:
        read = server.registry._load

        def read_slowly(folder: Path) -> Lowered:
            is_read.set()
            assert may_read.wait(120)
            return read(folder)

        monkeypatch.setattr(server.registry, "_load", read_slowly)

        async def run() -> None:
            cold = asyncio.create_task(answer(server, Ask("cold", (1, 2, 3), SamplingParams(4, ignore_eos=True))))
            assert await asyncio.to_thread(is_read.wait, 120)
            warm = await answer(server, Ask(None, (1, 2, 3), SamplingParams(30, ignore_eos=True)))
            assert len(warm.token_ids) == 30
            assert not cold.done()
            may_read.set()
            assert len((await cold).token_ids) == 4

        asyncio.run(run())


def test_an_abort_ends_a_request_whose_adapter_is_still_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    make_adapter(dense, "lora", tmp_path / "adapters" / "cold", seed=0)
    may_read = threading.Event()
    with serving(tiny_llama, tmp_path, adapters=str(tmp_path / "adapters")) as server:
        read = server.registry._load
        monkeypatch.setattr(server.registry, "_load", lambda folder: (may_read.wait(120), read(folder))[1])

        async def run() -> None:
            lease = server.registry.lease("cold")
            stream = server.engine.submit(GenerationRequest("waiting", (1, 2), SamplingParams(4), lease))
            stream.abort()
            (last,) = [delta async for delta in stream]
            assert last.finish_reason == "abort"
            assert server.registry.stats().num_leases == 0

        asyncio.run(run())
        may_read.set()
