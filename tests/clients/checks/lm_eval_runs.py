"""Runs lm-eval's `local-completions` for several models, in several ways of sending prompts, in one process.

    lm_eval_runs.py URL TOKENIZER TASKS_FOLDER OUT_FILE RUN...

RUN is `<model>:<way>`. Writes a JSON file: by run, by task, the results and the samples as lm-eval logs them. It has no
check of its own: what the numbers should be is computed where PEFT is.
"""

import json
import sys
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

# lm-eval finds out by itself that the server can tokenize, and then lets a tokenizer add what it adds by default: for
# the demo's, the token that begins a text. With `huggingface` it is not added.
WAYS: dict[str, dict[str, Any]] = {
    "ids": {},
    "texts": {"tokenized_requests": False},
    "batches": {"num_concurrent": 1, "batch_size": 5},
    "ids-without-begin": {"tokenizer_backend": "huggingface"},
    "texts-with-bos": {"tokenizer_backend": "huggingface", "tokenized_requests": False, "add_bos_token": True},
    "remote-tokenizer": {"tokenizer": None, "tokenizer_backend": "remote"},
}


def evaluated(url: str, tokenizer: str, model: str, way: str, manager: TaskManager) -> dict[str, Any]:
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": tokenizer,
        "max_length": 1024,
        "num_concurrent": 4,
        "max_retries": 1,
        **WAYS[way],
    }
    batch_size = arguments.pop("batch_size", 1)
    tasks = sorted(manager.all_tasks)
    found: Any = simple_evaluate(
        "local-completions", arguments, [t for t in tasks if t.startswith("village_")],
        batch_size=batch_size, task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip
    return {task: {"results": found["results"][task], "samples": found["samples"][task]} for task in found["samples"]}


def main(url: str, tokenizer: str, folder: str, out: str, *runs: str) -> None:
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = {run: evaluated(url, tokenizer, *run.split(":"), manager=manager) for run in runs}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
