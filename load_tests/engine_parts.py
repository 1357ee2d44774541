"""What `whole_engine` measures of one assembled server, part by part.

Owns the mixes of adapters, the parts and their rows. A part yields functions, each of which measures and gives a row,
so that its caller may stop between them. Knows nothing about how the base and the adapters came to be.
"""

import asyncio
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from load_tests.engine_steps import SeenStep, Streams, decodes, watched
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.lowering import lower
from server.assemble import Server
from server.engine.engine import StepReport

Row = dict[str, Any]
Part = Callable[["Setting"], Iterator[Callable[[], Row]]]

_METHODS = ("lora", "dora", "vera", "ia3")
_NUM_COPIES = 7
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_NUM_SWAPS = 5
_NUM_PROFILED = 8
_NUM_TOLD = 12  # of a profile's kernels or operators

# In this order; the kernels of ours by their names, others by what their libraries call them.
_CLASSES = (
    ("adapters", r"_shrink|_expand|_low_rank|_embed$|_scale$"),
    ("attention", r"_attend|_join|_store_kv|flash|fmha|attention"),
    ("adapters or attention", r"bmm"),
    ("sampling", r"argmax|ArgMax|amax|topk|softmax|sort"),
    ("base", r"gemm|gemv|4bit|quant|cutlass|nvjet|splitK|int8|mm$|linear|mkldnn"),
)


def mixes(batch: int) -> dict[str, list[str | None]]:
    """The adapter of each sequence, by what the mix is called; one sequence alone has no use for all of them."""
    loras = [f"lora-{i:03d}" for i in range(batch)]
    found: dict[str, list[str | None]] = {"none": [None] * batch, "1 LoRA": [*loras[:1] * batch]}
    if batch > 1:
        weights = [1 / (i + 1) for i in range(batch)]
        found["distinct LoRA"] = [*loras]
        found["Zipf LoRA"] = [*random.Random(0).choices(loras, weights, k=batch)]
        found["LoRA, DoRA, VeRA, IA3"] = [f"{_METHODS[i % 4]}-{i // 4:03d}" for i in range(batch)]
    return found


def names_of(batches: Sequence[int], num_loras: int) -> list[str]:
    """All adapters that the mixes of these batches name, and at least so many LoRAs."""
    wanted = {name for batch in batches for names in mixes(batch).values() for name in names if name is not None}
    return sorted(wanted | {f"lora-{i:03d}" for i in range(num_loras)})


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / _copy_s(target, source)


def _copy_s(target: torch.Tensor, source: torch.Tensor) -> float:
    """The median of some; the first warms up."""
    times = []
    for _ in range(_NUM_COPIES + 1):
        begun_s = time.perf_counter()
        target.copy_(source)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        times.append(time.perf_counter() - begun_s)
    return statistics.median(times[1:])


@dataclass(slots=True)
class Setting:
    """A server, and the sizes of what it is to do. `bandwidth`: of a copy on its device, bytes per second."""

    server: Server
    cold: Path  # a LoRA that the server does not know
    bandwidth: float
    batches: tuple[int, ...]
    num_prompt_tokens: int
    num_steps: int
    prefills: tuple[int, ...]
    _own_bytes: dict[str, int] = field(default_factory=dict)  # of each adapter's rows, shared ones at their first
    _none_ms: dict[int, float] = field(default_factory=dict)  # a decode step without adapters, by batch

    @property
    def device(self) -> torch.device:
        return self.server.base.device

    @property
    def largest(self) -> int:
        return max(self.batches)

    def load_adapters(self, names: Sequence[str]) -> Iterator[Row]:
        """Puts all of them on the device, one after another."""
        begun_s, first_bytes = time.perf_counter(), self.server.adapters.used_bytes
        for name in names:
            before = self.server.adapters.used_bytes
            self.server.registry.load(name)
            self._own_bytes[name] = self.server.adapters.used_bytes - before
        taken = self.server.adapters.used_bytes - first_bytes
        yield {"part": "load adapters", "count": len(names), "seconds": time.perf_counter() - begun_s, "bytes": taken}

    def must_move_bytes(self, adapters: Sequence[str | None], num_cached: float) -> int:
        """What a decode step must read: the weights, each distinct adapter's rows, `num_cached` tokens of each."""
        base = self.server.base
        weights = base.weight_bytes
        if not base.config.get_text_config().tie_word_embeddings:
            embedding: Any = base.model.get_input_embeddings()  # type: ignore[operator]
            weights -= embedding.weight.nbytes  # a row for each token, no more
        rows = sum(self._own_bytes[name] for name in {*adapters} - {None} if name is not None)
        elements = sum(2 * heads * width for heads, width in base.kv_shapes)
        return int(weights + rows + len(adapters) * num_cached * elements * base.kv_dtype.itemsize)

    def decode_ms(self, adapters: Sequence[str | None]) -> float:
        """The median of a decode step. A few steps before warm up: what is compiled and recorded is there then."""
        Streams(adapters, self.num_prompt_tokens, 4).run(self.server)
        steps = Streams(adapters, self.num_prompt_tokens, self.num_steps + 2).run(self.server)
        return median_ms(decodes(steps, len(adapters)))

    def base_only_ms(self, batch: int) -> float:
        if batch not in self._none_ms:
            self._none_ms[batch] = self.decode_ms([None] * batch)
        return self._none_ms[batch]


def median_ms(steps: Sequence[SeenStep]) -> float:
    return 1000 * statistics.median(step.report.duration_s for step in steps)


def _decodes(setting: Setting) -> Iterator[Callable[[], Row]]:
    for batch in setting.batches:
        for label, adapters in mixes(batch).items():
            yield partial(_decode, setting, label, adapters)


def _decode(setting: Setting, label: str, adapters: Sequence[str | None]) -> Row:
    batch = len(adapters)
    none_ms = setting.base_only_ms(batch)
    ms = none_ms if label == "none" else setting.decode_ms(adapters)
    moved = setting.must_move_bytes(adapters, setting.num_prompt_tokens + setting.num_steps / 2)
    return {
        "batch": batch,
        "adapters": label,
        "num_distinct": len({*adapters} - {None}),
        "ms_per_step": ms,
        "tokens_per_s": 1000 * batch / ms,
        "must_move_mb": moved / 1e6,
        "share_of_copy": moved / setting.bandwidth / (ms / 1000),
        "of_base_only": none_ms / ms,
    }


def _prefills(setting: Setting) -> Iterator[Callable[[], Row]]:
    for length in setting.prefills:
        for label in ("none", "1 LoRA"):
            yield partial(_prefill, setting, length, label)


def _prefill(setting: Setting, length: int, label: str) -> Row:
    streams = Streams(mixes(1)[label], length, 1)
    steps = [step for seed in range(4) for step in streams.run(setting.server, seed)]
    ms = median_ms([step for step in steps if step.report.num_tokens == length][1:])
    return {"batch": 1, "adapters": label, "prompt": length, "ms_per_step": ms, "tokens_per_s": 1000 * length / ms}


def _mixed(setting: Setting) -> Iterator[Callable[[], Row]]:
    for label in ("none", "distinct LoRA"):
        yield partial(_mixed_row, setting, min(setting.largest, 32), label)


def _mixed_row(setting: Setting, batch: int, label: str) -> Row:
    """Decodes beside which prompts come, one after another: the steps with a part of a prompt, and those without."""
    adapters, length = mixes(batch)[label], min(setting.prefills)
    streams = Streams(adapters, setting.num_prompt_tokens, 4 * setting.num_steps)

    async def both() -> None:
        reading = asyncio.create_task(streams.read(setting.server))
        await asyncio.sleep(0)
        for seed in range(3):
            await Streams(adapters[:1], length, 1).read(setting.server, seed + 1)
        await reading

    with watched(setting.server.engine) as steps:
        asyncio.run(both())
    full = [step for step in steps if step.report.num_sequences > batch]
    ms = median_ms(full)
    return {
        "batch": batch,
        "adapters": label,
        "prompt": length,
        "ms_per_step": ms,
        "tokens_per_s": statistics.median(step.report.num_tokens / step.report.duration_s for step in full),
        "decode_ms": median_ms(decodes(steps, batch)),
    }


def _split(setting: Setting) -> Iterator[Callable[[], Row]]:
    for batch in sorted({min(setting.batches), min(setting.largest, 32), setting.largest}):
        for label in [label for label in mixes(batch) if label in ("none", "1 LoRA", "distinct LoRA")]:
            yield partial(_split_row, setting, label, mixes(batch)[label])


def _split_row(setting: Setting, label: str, adapters: Sequence[str | None]) -> Row:
    """Where the device's time goes in a decode step, in milliseconds by class; on a CPU that of operators."""
    batch = len(adapters)
    is_gpu = setting.device.type == "cuda"
    profiled = _Profiled(batch, is_gpu)
    streams = Streams(adapters, setting.num_prompt_tokens, setting.num_steps + _NUM_PROFILED + 4)
    with watched(setting.server.engine, profiled.after_step):
        asyncio.run(streams.read(setting.server))
    times = profiled.ms_per_step()
    classes = dict.fromkeys([name for name, _ in _CLASSES] + ["rest"], 0.0)
    for name, ms in times.items():
        classes[class_of(name)] += ms
    longest = sorted(times.items(), key=lambda item: -item[1])[:_NUM_TOLD]
    return {
        "batch": batch,
        "adapters": label,
        "of": "the device's time" if is_gpu else "operators on the engine's thread",
        "split_ms": {name: ms for name, ms in classes.items() if ms},
        "longest_ms": {name[:60]: ms for name, ms in longest},
    }


def class_of(name: str) -> str:
    """What a kernel or an operator is taken to do, by its name."""
    return next((found for found, pattern in _CLASSES if re.search(pattern, name)), "rest")


class _Profiled:
    """A profile of some decode steps of `batch` sequences; it begins and ends on the engine's own thread."""

    def __init__(self, batch: int, is_gpu: bool) -> None:
        self._batch, self._is_gpu = batch, is_gpu
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        self._profile: Any = profile(activities=activities)
        self._num_seen = 0

    def after_step(self, report: StepReport) -> None:
        if report.num_sequences != self._batch or report.num_tokens != self._batch:
            return
        self._num_seen += 1
        if self._num_seen == 2:
            self._profile.start()
        if self._num_seen == 2 + _NUM_PROFILED:
            if self._is_gpu:
                torch.cuda.synchronize()
            self._profile.stop()

    def ms_per_step(self) -> Mapping[str, float]:
        """By the name of the kernel, or of the operator."""
        events = self._profile.key_averages()
        if self._is_gpu:
            of_device = [event for event in events if event.device_type.name == "CUDA"]
            return {event.key: event.self_device_time_total / 1000 / _NUM_PROFILED for event in of_device}
        return {event.key: event.self_cpu_time_total / 1000 / _NUM_PROFILED for event in events}


def _swaps(setting: Setting) -> Iterator[Callable[[], Row]]:
    for batch in (1, min(setting.largest, 32)):
        yield partial(_swap_row, setting, batch)


def _swap_row(setting: Setting, batch: int) -> Row:
    """A LoRA that comes from the host to the device while others decode: its speed, and what their steps feel."""
    server, is_gpu = setting.server, setting.device.type == "cuda"
    host = HostTier(8 << 30, server.base.dtype, pin=is_gpu)
    cold = host.put("cold", lower(Checkpoint.open(setting.cold), server.base.sites.by_path))
    num_bytes = server.adapters.resident_bytes(cold)
    copies: list[tuple[float, float]] = []
    stays: list[tuple[float, float]] = []  # with the steps that meet the new slot first
    num_seen, is_over, stepped = 0, False, threading.Condition()

    def after_step(_: StepReport) -> None:
        nonlocal num_seen
        with stepped:
            num_seen += 1
            stepped.notify_all()

    def steps_later(num_steps: int) -> None:
        with stepped:
            until = num_seen + num_steps
            stepped.wait_for(lambda: num_seen >= until or is_over)

    def swap() -> None:
        steps_later(setting.num_steps)  # all of them decode; and there is something to compare with
        for number in range(_NUM_SWAPS):
            name = f"cold-{number}"
            server.adapters.reserve(name, cold)
            begun_s = time.perf_counter()
            server.adapters.copy(name)
            copies.append((begun_s, time.perf_counter()))
            server.adapters.place(name)
            steps_later(2)
            stays.append((begun_s, time.perf_counter()))
            server.adapters.release(name)

    names = mixes(batch)["distinct LoRA" if batch > 1 else "1 LoRA"]
    streams = Streams(names, setting.num_prompt_tokens, 8 * setting.num_steps)
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        with watched(server.engine, after_step) as steps:
            asyncio.run(streams.read(server))
    finally:
        with stepped:  # whatever became of the streams, the thread must end
            is_over = True
            stepped.notify_all()
        thread.join()
    took_s = statistics.median(end_s - begun_s for begun_s, end_s in copies)
    pinned_s = _pinned_copy_s(num_bytes, setting.device)
    return {
        "batch": batch,
        "adapters": f"LoRA of {num_bytes / 1e6:.1f} MB",
        "bytes": num_bytes,
        "gb_per_s": num_bytes / took_s / 1e9,
        "of_pinned_copy": pinned_s / took_s,
        **_delays(steps, stays, batch),
    }


def _delays(steps: Sequence[SeenStep], spans: Sequence[tuple[float, float]], batch: int) -> Row:
    """How many decode steps beside a copy took over twice the median of the others, and the longest of them."""
    seen = [step for step in steps if step.is_decode and step.report.num_sequences == batch]
    beside: list[float] = []
    others: list[float] = []
    for before, step in pairwise(seen):
        touches = any(begun_s < step.at_s and end_s > before.at_s for begun_s, end_s in spans)
        (beside if touches else others).append(step.report.duration_s)
    usual_s = statistics.median(others)
    return {
        "num_steps_beside": len(beside),
        "num_delayed": sum(duration_s > 2 * usual_s for duration_s in beside),
        "longest_in_steps": max(beside) / usual_s if beside else None,
    }


def _pinned_copy_s(num_bytes: int, device: torch.device) -> float:
    """From page-locked memory to the device; on a CPU a plain copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    return _copy_s(torch.empty(num_bytes, dtype=torch.uint8, device=device), source)


PARTS: Mapping[str, Part] = {
    "decode": _decodes, "prefill": _prefills, "mixed": _mixed, "split": _split, "swap": _swaps,
}  # fmt: skip
