"""`graft bench`: the engine's decode throughput on this machine, beside transformers and PEFT in the same run.

Owns the workload (a random Llama of about 25 million parameters, 16 streams) and the report. It drives the engine
through its public surface, as the HTTP floor does; HTTP itself is not in the figures.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from server import __version__
from server.assemble import Server, assemble
from server.engine.flight import GenerationRequest
from server.engine.sequence import SamplingParams
from server.ground.config import load
from server.ground.errors import StartupRefused

VOCAB_SIZE = 4096
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_METHODS = ("lora", "dora", "vera", "ia3")
_ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every row of the table runs: `num_streams` sequences at once, greedy, no early end."""

    num_streams: int = 16
    num_prompt_tokens: int = 32
    num_new_tokens: int = 64
    rank: int = 8

    @property
    def num_generated(self) -> int:
        return self.num_streams * self.num_new_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report: tokens generated per second by --clock, prompt included; median of the rounds.

    The ratios are medians, too, of the ratios within each round: a machine that is slow for a minute is so for all.
    """

    engine: str
    base: str
    adapters: str
    tokens_per_s: float
    of_base_only: float  # of our own rate without adapters
    of_peft: float | None  # of PEFT's mixed batch; None without peers
    rounds: tuple[float, ...]


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; prints a table, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    console = Console()
    workload = Workload(num_new_tokens=arguments.tokens, num_streams=arguments.streams)
    if arguments.clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for one another take processor time as well
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(folder / "model")
        save_adapters(folder, workload)
        for base in arguments.quantize:
            rows += _measure(folder, base, arguments, workload, console)
    console.print(_table(rows))
    if arguments.out:
        told = {"clock": arguments.clock, "workload": asdict(workload), "rows": [asdict(row) for row in rows]}
        report = {**machine(arguments.device), **told}
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {arguments.out}")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="graft bench", description=main.__doc__)
    parser.add_argument("--quantize", nargs="+", default=["none", "nf4"], choices=["none", "nf4", "int8"])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--streams", type=int, default=16, help="sequences at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each sequence generates")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row, interleaved")
    parser.add_argument(
        "--clock", default="wall", choices=list(_CLOCKS),
        help="cpu: processor time of one thread for arithmetic, for a machine that others share",
    )  # fmt: skip
    parser.add_argument("--no-peers", action="store_true", help="leave transformers and PEFT out")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON")
    return parser.parse_args(list(argv))


def _measure(folder: Path, base: str, arguments: argparse.Namespace, workload: Workload, console: Console) -> list[Row]:
    """All rows of one base format, their rounds interleaved so that a slow minute of the machine hits all alike."""
    server = assemble(
        load(
            {
                "model": str(folder / "model"),
                "quantize": base,
                "dtype": "bfloat16",
                "device": arguments.device,
                "adapters": str(folder / "adapters"),
                "store": str(folder / "store"),
                "max_sequences": str(max(workload.num_streams, 16)),
            }
        )
    )
    clock = _CLOCKS[arguments.clock]
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for label, names in _mixes(workload.num_streams).items():
        runs["graftserve", label] = lambda names=names: run_engine(server, names, workload, clock)  # type: ignore[misc]
    if not arguments.no_peers:
        runs |= _peers(folder, base, server, workload, clock)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    try:
        for number in range(arguments.rounds + 1):
            for key, run in runs.items():
                rate = workload.num_generated / run()
                if number:  # the first round warms up
                    times[key].append(rate)
            console.print(f"{base}: round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}")
    finally:
        server.close()
    own = times["graftserve", "none"]
    peft = next((rates for (engine, _), rates in times.items() if engine.startswith("PEFT")), None)
    return [
        Row(
            engine=engine,
            base=base,
            adapters=label,
            tokens_per_s=statistics.median(rates),
            of_base_only=_ratio(rates, own),
            of_peft=None if peft is None else _ratio(rates, peft),
            rounds=tuple(rates),
        )
        for (engine, label), rates in times.items()
    ]


def _ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


def _mixes(num_streams: int) -> dict[str, list[str | None]]:
    """The adapter of each stream, by the row's label."""
    lora: list[str | None] = [f"lora-{i}" for i in range(num_streams)]
    mixed: list[str | None] = [f"{_METHODS[i % len(_METHODS)]}-{i}" for i in range(num_streams)]
    return {
        "none": [None] * num_streams,
        "1 LoRA r=8": lora[:1] * num_streams,
        f"{num_streams} distinct LoRA r=8": lora,
        f"{num_streams} mixed LoRA, DoRA, VeRA, IA3": mixed,
    }


def prompts_of(workload: Workload) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (workload.num_streams, workload.num_prompt_tokens)
    return torch.randint(8, VOCAB_SIZE, shape, generator=generator)


def run_engine(
    server: Server, names: Sequence[str | None], workload: Workload, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds from the first submission to the last token of all streams."""

    async def stream(number: int, name: str | None, prompt: list[int]) -> None:
        lease = None if name is None else server.registry.lease(name)
        params = SamplingParams(max_tokens=workload.num_new_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"{number}-{time.monotonic_ns()}", tuple(prompt), params, lease)
        async for delta in server.engine.submit(request):
            if delta.error is not None:
                raise delta.error

    async def all_streams() -> None:
        prompts = prompts_of(workload).tolist()
        await asyncio.gather(*(stream(i, name, prompts[i]) for i, name in enumerate(names)))

    started = clock()
    asyncio.run(all_streams())
    return clock() - started


def _peers(
    folder: Path, base: str, server: Server, workload: Workload, clock: Callable[[], float]
) -> dict[tuple[str, str], Callable[[], float]]:
    """transformers' generate without adapters and PEFT's mixed batch, on a model of their own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from server.model.quantize import Quantization, quantization_config

    device = server.base.device

    def fresh() -> Any:
        config = quantization_config(Quantization(base), torch.bfloat16)
        extra = {} if config is None else {"quantization_config": config}
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.bfloat16, device_map={"": str(device)}, **extra
        )
        return model.eval()

    plain = fresh()
    names = [f"lora-{i}" for i in range(workload.num_streams)]
    mixed: Any = PeftModel.from_pretrained(fresh(), str(folder / "adapters" / names[0]), adapter_name=names[0])
    for name in names[1:]:
        mixed.load_adapter(str(folder / "adapters" / name), adapter_name=name)
    mixed.eval()
    prompts = prompts_of(workload).to(device)

    def generate(model: Any, extra: Mapping[str, Any]) -> float:
        started = clock()
        with torch.inference_mode():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=workload.num_new_tokens,
                min_new_tokens=workload.num_new_tokens,
                do_sample=False,
                **extra,
            )
        return clock() - started

    return {
        ("transformers generate", "none"): lambda: generate(plain, {}),
        ("PEFT adapter_names", f"{workload.num_streams} distinct LoRA r=8"): lambda: generate(
            mixed, {"adapter_names": names}
        ),
    }


def save_model(folder: Path) -> None:
    """A random Llama: hidden 512, 8 layers, FFN 1408, about 25 million parameters, and a tokenizer for its ids."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w2"))
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, bos_token="w0", eos_token="w1").save_pretrained(folder)


def save_adapters(folder: Path, workload: Workload) -> None:
    """PEFT adapters with random weights on all linears, one LoRA per stream and one of each method in turn."""
    try:
        from peft import IA3Config, LoraConfig, PeftConfig, VeraConfig, get_peft_model
    except ImportError as error:
        raise StartupRefused("graft bench needs peft: pip install 'graftserve[bench]'") from error
    from transformers import LlamaForCausalLM

    rank = workload.rank
    recipes: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_ALL_LINEARS),
        "dora": lambda: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_ALL_LINEARS, use_dora=True),
        "vera": lambda: VeraConfig(r=64, target_modules=["q_proj", "v_proj"]),
        "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    base: Any = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    names = {name for mix in _mixes(workload.num_streams).values() for name in mix if name is not None}
    for seed, name in enumerate(sorted(names)):
        torch.manual_seed(seed)
        model = get_peft_model(base, recipes[name.split("-")[0]]())
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter) * ("magnitude" not in key)
        model.save_pretrained(str(folder / "adapters" / name))
        base = model.unload()


def machine(device: str) -> dict[str, Any]:
    """What a measured figure needs beside it: versions, date, commit and the device."""
    import transformers

    is_cuda = device != "cpu" and torch.cuda.is_available()
    return {
        "graftserve": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    """The processor as Linux names it, with the number of cores that this process may use."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Tokens per second, all streams together")
    for title in ("base", "engine", "adapters"):
        table.add_column(title)
    for title in ("tokens/s", "of base only", "of PEFT"):
        table.add_column(title, justify="right")
    for row in rows:
        of_peft = "" if row.of_peft is None else f"{row.of_peft:.1f}"
        rate, share = f"{row.tokens_per_s:.0f}", f"{row.of_base_only:.2f}"
        table.add_row(row.base, row.engine, row.adapters, rate, share, of_peft)
    return table
