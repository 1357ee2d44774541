"""`python -m load_tests.vllm_cpu`: our engine beside vLLM's CPU build, on one machine, in one run.

The model of `graft bench` (a random Llama of 25 million parameters, bfloat16) and its LoRA adapters of rank 8: all
streams with an adapter each, all on the base, one stream with and without. vLLM runs in an environment of its own
(`--vllm-python`), as two processes, with and without LoRA, each through `LLM.generate`; ours runs through the engine's
public surface. Owns the rounds, in which all take turns, and the report.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from server.assemble import assemble
from server.bench import Workload, machine, prompts_of, run_engine, save_adapters, save_model
from server.ground.config import load

_OURS, _VLLM = "graftserve", "vllm"
_CALM_S = 2.0  # vLLM's engine polls on a core of its own for a second after its last step
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


class VllmProcess:
    """vLLM with one set of options, in a child process. Raises RuntimeError where it dies; its log says why."""

    def __init__(self, python: str, options: Mapping[str, Any], log: IO[str]) -> None:
        worker = Path(__file__).with_name("vllm_worker.py")
        environment = os.environ | _ENVIRONMENT
        environment.pop("PYTHONPATH", None)  # ours; its packages are others, as are the modules beside the worker (-P)
        self._log = log
        self._process = subprocess.Popen(
            [python, "-P", "-u", str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=environment, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        try:
            self.version = str(self._ask(options)["vllm"])
        except RuntimeError:
            self.close()
            raise

    def seconds(self, workload: Workload, adapters: Sequence[str | None]) -> float:
        """How long all streams together take, from the call to the last token."""
        run = {
            "prompts": prompts_of(workload).tolist(), "adapters": list(adapters),
            "num_new_tokens": workload.num_new_tokens,
        }  # fmt: skip
        return float(self._ask(run)["seconds"])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, item: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(item) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"vLLM's process has ended with {self._process.wait()}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a line for each row, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    workload = Workload(num_new_tokens=arguments.tokens, num_streams=arguments.streams)
    log_file = Path(arguments.vllm_log)
    with log_file.open("w", encoding="utf-8") as log, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_model(folder / "model")
        save_adapters(folder, workload)
        runs, version = _engines(stack, folder, workload, arguments, log)
        rates: dict[tuple[str, str, str], list[float]] = {key: [] for key in runs}
        for number in range(arguments.rounds + 1):
            for key, run in runs.items():
                time.sleep(_CALM_S)  # the other engine lets go of the cores
                run()  # and this one is awake: vLLM is slower after a rest
                rate = run()
                if number:  # the first round warms up
                    rates[key].append(rate)
            print(f"round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    rows = [_row(key, rates) for key in rates]
    for row in rows:
        of_vllm = "" if row["of_vllm"] is None else f"  {row['of_vllm']:.2f} of vLLM"
        print(f"{row['engine']:10} {row['base']:5} {row['case']:32} {row['tokens_per_s']:8.1f} tok/s{of_vllm}")
    if arguments.out:
        report = {**machine("cpu"), "vllm": version, "workload": asdict(workload), "rows": rows}
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {arguments.out}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.vllm_cpu", description=main.__doc__)
    parser.add_argument("--vllm-python", required=True, metavar="FILE", help="the Python of vLLM's own environment")
    parser.add_argument("--quantize", nargs="+", default=["none", "nf4"], choices=["none", "nf4"], help="of our base")
    parser.add_argument("--streams", type=int, default=16, help="sequences at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each sequence generates")
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured, after one that warms up")
    parser.add_argument("--vllm-log", default="vllm.log", metavar="FILE", help="what vLLM says")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON")
    return parser.parse_args(argv)


def cases(num_streams: int) -> dict[str, list[str | None]]:
    """The adapter of each stream, by the row's label."""
    names: list[str | None] = [f"lora-{number}" for number in range(num_streams)]
    return {
        f"{num_streams} streams, base only": [None] * num_streams,
        f"{num_streams} streams, {num_streams} distinct LoRA r=8": names,
        "single stream, base only": [None],
        "single stream, LoRA r=8": names[:1],
    }


def _engines(
    stack: ExitStack, folder: Path, workload: Workload, arguments: argparse.Namespace, log: IO[str]
) -> tuple[dict[tuple[str, str, str], Callable[[], float]], str]:
    """What measures a rate in tokens/s, by (engine, base, case), and vLLM's version."""
    runs: dict[tuple[str, str, str], Callable[[], float]] = {}
    options = _vllm_options(folder, workload)
    plain = VllmProcess(arguments.vllm_python, options, log)
    stack.callback(plain.close)
    loras = {"enable_lora": True, "max_loras": workload.num_streams, "max_lora_rank": workload.rank}
    with_lora = VllmProcess(arguments.vllm_python, options | loras, log)
    stack.callback(with_lora.close)
    own = {
        base: assemble(load(_own_flags(folder, base, workload, number)))
        for number, base in enumerate(arguments.quantize)
    }
    for server in own.values():
        stack.callback(server.close)
    for label, names in cases(workload.num_streams).items():
        part = Workload(len(names), workload.num_prompt_tokens, workload.num_new_tokens, workload.rank)
        for base, server in own.items():
            runs[_OURS, base, label] = _rate(part, lambda s=server, n=names, w=part: run_engine(s, n, w))
        process = with_lora if any(names) else plain
        folders = [name and str(folder / "adapters" / name) for name in names]
        runs[_VLLM, "none", label] = _rate(part, lambda p=process, f=folders, w=part: p.seconds(w, f))
    return runs, plain.version


def _rate(workload: Workload, seconds: Callable[..., float]) -> Callable[[], float]:
    return lambda: workload.num_generated / seconds()


def _vllm_options(folder: Path, workload: Workload) -> dict[str, Any]:
    return {
        "model": str(folder / "model"), "dtype": "bfloat16", "max_model_len": 512, "seed": 0,
        "max_num_seqs": max(workload.num_streams, 16), "enable_prefix_caching": False,
    }  # fmt: skip


def _own_flags(folder: Path, base: str, workload: Workload, number: int) -> dict[str, str]:
    return {
        "model": str(folder / "model"), "quantize": base, "dtype": "bfloat16", "device": "cpu", "prefix_reuse": "off",
        "adapters": str(folder / "adapters"), "store": str(folder / f"store-{number}"),
        "max_sequences": str(max(workload.num_streams, 16)),
    }  # fmt: skip


def _row(key: tuple[str, str, str], rates: Mapping[tuple[str, str, str], Sequence[float]]) -> dict[str, Any]:
    engine, base, case = key
    other = rates[_VLLM, "none", case]
    ratios = [mine / its for mine, its in zip(rates[key], other, strict=True)]
    return {
        "engine": engine, "base": base, "case": case, "tokens_per_s": statistics.median(rates[key]),
        "of_vllm": None if engine == _VLLM else statistics.median(ratios), "rounds": list(rates[key]),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
