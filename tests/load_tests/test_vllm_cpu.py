"""How vLLM's process is asked, with a stand-in of its package: vLLM itself wants an environment of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.vllm_cpu import VllmProcess, cases
from server.bench import Workload

STAND_IN = """
import json
from dataclasses import dataclass

__version__ = "1.2.3+cpu"

@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    ignore_eos: bool

@dataclass
class Output:
    token_ids: list
    outputs: list

class LLM:
    def __init__(self, model, seen):
        print("a banner on standard output")
        self.seen = seen

    def generate(self, prompts, params, lora_request, use_tqdm):
        names = [r and [r.name, r.number] for r in lora_request] if lora_request else None
        with open(self.seen, "w") as file:
            json.dump({"lengths": [len(p["prompt_token_ids"]) for p in prompts], "adapters": names}, file)
        length = params.max_tokens - (len(prompts) == 3)
        return [Output([], [Output([0] * length, [])]) for _ in prompts]
"""
REQUEST = """
from dataclasses import dataclass

@dataclass
class LoRARequest:
    name: str
    number: int
    folder: str
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[VllmProcess]:
    (tmp_path / "vllm" / "lora").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "lora" / "__init__.py").touch()
    (tmp_path / "vllm" / "lora" / "request.py").write_text(REQUEST)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with (tmp_path / "log").open("w") as log:
        process = VllmProcess(str(python), {"model": "m", "seen": str(tmp_path / "seen")}, log)
        yield process
        process.close()


def test_each_stream_gets_its_prompt_and_its_adapter(process: VllmProcess, tmp_path: Path) -> None:
    assert process.version == "1.2.3+cpu"
    workload = Workload(num_streams=2, num_prompt_tokens=5, num_new_tokens=3)
    assert process.seconds(workload, ["b", "a"]) >= 0
    assert (tmp_path / "seen").read_text() == '{"lengths": [5, 5], "adapters": [["b", 2], ["a", 1]]}'
    process.seconds(workload, [None, None])
    assert (tmp_path / "seen").read_text() == '{"lengths": [5, 5], "adapters": null}'


def test_a_stream_that_ends_early_is_no_figure(process: VllmProcess, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="process has ended with 1; see .*log"):
        process.seconds(Workload(num_streams=3, num_prompt_tokens=5, num_new_tokens=3), [None] * 3)
    assert "vLLM has ended a stream early" in (tmp_path / "log").read_text()


def test_a_single_stream_and_many_are_compared_with_and_without_adapters() -> None:
    assert [(len(names), len(set(names) - {None})) for names in cases(4).values()] == [(4, 0), (4, 4), (1, 0), (1, 1)]
