"""Adapters that take turns on the device, in a whole server: the same tokens as alone, and nobody left out."""

import asyncio
from pathlib import Path

import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.assemble import Server
from server.engine.sequence import FinishReason, SamplingParams
from tests.adapters.folders import incoming_from
from tests.api.adapter_files import lora_files
from tests.serving import Answer, Ask, answer, answer_all, serving
from tests.test_isolation import check_nothing_leaks, compared

NAMES = ("first", "second", "third")
ROOM_FOR_ONE = "10KB"  # an adapter's rows take 7 KB


def upload(server: Server, scratch: Path, name: str, seed: int) -> None:
    files, folder = lora_files(seed), scratch / f"made-{name}"
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes(files.config)
    (folder / WEIGHTS_FILE).write_bytes(files.weights)
    with incoming_from(server.store, folder) as incoming:
        server.registry.register(incoming, name, replace=False)


def long(name: str | None, first: int, num_tokens: int = 80) -> Ask:
    prompt = tuple((first + 7 * n) % 250 for n in range(20))
    return Ask(name, prompt, SamplingParams(num_tokens, temperature=0.0, ignore_eos=True, logprobs=2))


@pytest.mark.parametrize("prefix_reuse", ["on", "off"])
def test_long_answers_of_more_adapters_than_fit_take_turns_and_keep_their_tokens(
    tiny_llama: Path, tmp_path: Path, prefix_reuse: str
) -> None:
    flags = {"adapter_memory": ROOM_FOR_ONE, "max_adapter_wait": "0.01", "block_size": "16"}
    with serving(tiny_llama, tmp_path, **flags, prefix_reuse=prefix_reuse) as server:
        for seed, name in enumerate(NAMES):
            upload(server, tmp_path, name, seed)
        asks = [long(name, 10 * number) for number, name in enumerate((*NAMES, *NAMES, None))]
        alone = [answer_all(server, [ask])[0] for ask in asks]
        assert server.engine.stats().num_rotations == 0, "who is alone gives way to nobody"
        together = answer_all(server, asks)
        stats = server.engine.stats()
        check_nothing_leaks(server)
    assert {told.finish_reason for told in together} == {FinishReason.LENGTH}
    assert stats.num_rotations >= 2
    num_compared = sum(compared(one, other) for one, other in zip(alone, together, strict=True))
    assert num_compared >= 0.99 * sum(len(told.token_ids) for told in alone)


def test_a_popular_adapter_without_a_pause_leaves_no_other_out(tiny_llama: Path, tmp_path: Path) -> None:
    """As many requests of one adapter as it takes, each stream's next one at once, until the other is answered."""
    flags = {"adapter_memory": ROOM_FOR_ONE, "max_adapter_wait": "0.01"}
    with serving(tiny_llama, tmp_path, **flags) as server:
        for seed, name in enumerate(NAMES[:2]):
            upload(server, tmp_path, name, seed)

        async def together() -> tuple[Answer, list[Answer]]:
            is_answered = asyncio.Event()
            popular: list[Answer] = []

            async def stream(number: int) -> None:
                while not is_answered.is_set():
                    popular.append(await answer(server, long("first", number, 20)))

            streams = [asyncio.create_task(stream(number)) for number in range(4)]
            while len(popular) < 4:
                await asyncio.sleep(0.001)
            other = await answer(server, long("second", 3, 10))
            is_answered.set()
            await asyncio.gather(*streams)
            return other, popular

        other, popular = asyncio.run(together())
        check_nothing_leaks(server)
    assert {told.finish_reason for told in (other, *popular)} == {FinishReason.LENGTH}
