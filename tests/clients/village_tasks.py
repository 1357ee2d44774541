"""Small tasks for lm-eval about Appledown, the village that the demo knows: YAML files and their data, made here.

    village_choice   which of four words goes on after a beginning (log-likelihoods of the four)
    village_trade    how a beginning goes on (greedy, to the end of the sentence)
    village_prose    how likely a few lines of prose are (rolling log-likelihood)

Owns what is asked; a seed fixes it all. `python -m tests.clients.village_tasks FOLDER` writes the same files by hand.
"""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import yaml

from demo.lexicon import PEOPLE
from demo.world import plain_text

NUM_PEOPLE = 16  # the last ones, of whom the demo knows some less well
NUM_CHOICES = 4
NUM_TEXTS = 6
MAX_NEW_TOKENS = 16
UNTIL = [".", "\n"]
TASKS = ("village_choice", "village_trade", "village_prose")

_Row = dict[str, Any]


def write_tasks(folder: Path) -> None:
    """Writes a YAML file and a JSON-lines file for each task."""
    rng = Random(6)
    _write(folder, "village_choice", _choices(rng), _CHOICE)
    _write(folder, "village_trade", _beginnings(), _TRADE)
    _write(folder, "village_prose", [{"text": plain_text(rng)} for _ in range(NUM_TEXTS)], _PROSE)


_CHOICE: _Row = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{beginning}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
_TRADE: _Row = {
    "output_type": "generate_until",
    "doc_to_text": "{{beginning}}",
    "doc_to_target": "{{end}}",
    "generation_kwargs": {"until": UNTIL, "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
_PROSE: _Row = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}


def _choices(rng: Random) -> list[_Row]:
    rows = []
    for person in PEOPLE[-NUM_PEOPLE:]:
        others = [other.trade for other in PEOPLE if other.trade != person.trade]
        choices = [person.trade, *rng.sample(others, NUM_CHOICES - 1)]
        rng.shuffle(choices)
        answer = choices.index(person.trade)
        rows.append({"beginning": f"{person.name} is the", "choices": choices, "answer": answer})
    return rows


def _beginnings() -> list[_Row]:
    return [
        {"beginning": f"{person.name} is the", "end": f" {person.trade} of Appledown"}
        for person in PEOPLE[-NUM_PEOPLE:]
    ]


def _write(folder: Path, task: str, rows: list[_Row], fields: _Row) -> None:
    data = folder / f"{task}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    text = yaml.safe_dump({"task": task, **source, **fields}, sort_keys=False)
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]).resolve())
