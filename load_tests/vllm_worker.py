"""vLLM in a process of its own, driven by lines of JSON: run by the Python of vLLM's environment, not by ours.

Owns how vLLM is asked for the workload. It imports vLLM and nothing of this repository: the two want different
versions of PyTorch and transformers. First line in: the model and its options; an answer with vLLM's version. Then one
line for each run, and the seconds that it took.
"""

import importlib
import json
import os
import sys
import time
from typing import Any


def main() -> int:
    """Serves runs until standard input ends. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes on standard output, too
    options = json.loads(sys.stdin.readline())
    vllm: Any = importlib.import_module("vllm")
    llm: Any = vllm.LLM(**options)
    _answer(answers, {"vllm": vllm.__version__, "threads": os.environ.get("OMP_NUM_THREADS")})
    for line in sys.stdin:
        _answer(answers, {"seconds": _run(vllm, llm, json.loads(line))})
    return 0


def _run(vllm: Any, llm: Any, run: dict[str, Any]) -> float:
    """`run`: prompts (lists of token ids), an adapter's folder or null for each, and num_new_tokens."""
    request: Any = importlib.import_module("vllm.lora.request").LoRARequest
    num = run["num_new_tokens"]
    params = vllm.SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True)
    numbers = {folder: i for i, folder in enumerate(sorted({f for f in run["adapters"] if f}), start=1)}
    wanted = [request(f, numbers[f], f) if f else None for f in run["adapters"]]
    prompts = [{"prompt_token_ids": ids} for ids in run["prompts"]]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=wanted if numbers else None, use_tqdm=False)
    seconds = time.perf_counter() - started
    if any(len(output.outputs[0].token_ids) != num for output in outputs):
        raise RuntimeError("vLLM has ended a stream early")
    return seconds


def _answer(answers: Any, item: dict[str, Any]) -> None:
    print(json.dumps(item), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())
