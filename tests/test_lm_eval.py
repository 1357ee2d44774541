"""lm-evaluation-harness asks the server, and gets what PEFT computes: log-likelihoods, accuracies and greedy texts.

lm-eval runs in an environment of its own (`clients/`), over small tasks about the demo's village. The oracle is PEFT in
this process, with each adapter alone on the dense base.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.clients.environments import HERE, environment
from tests.clients.servers import demo_served
from tests.clients.village_tasks import MAX_NEW_TOKENS, TASKS, UNTIL, write_tasks
from tests.demo_files import BASE, STORE
from tests.fidelity import dense_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]  # a slow network may install for long

# A LoRA, a DoRA and an IA3 beside the base; prompts as ids and as texts, and the other ways once each.
MODELS = ("base", "pirate-lora", "poet-dora", "robot-ia3")
WITHOUT_BEGIN = ("ids-without-begin", "remote-tokenizer")
RUNS = (
    *(f"{model}:{way}" for model in MODELS for way in ("ids", "texts")),
    *("base:batches", "base:ids-without-begin", "poet-dora:texts-with-bos", "pirate-lora:remote-tokenizer"),
)
TOLERANCE = 1e-4  # nats, of one log-likelihood

Found = dict[str, dict[str, Any]]  # by run, by task: lm-eval's results and samples


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("lm-eval")
    write_tasks(folder)
    out = folder / "found.json"
    made = environment("lm-eval")
    with demo_served(folder) as server:
        program = (str(HERE / "checks" / "lm_eval_runs.py"), server.url, str(BASE), str(folder), str(out))
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = made.run("python", "-W", "ignore", *program, *RUNS, home=folder, **offline)
    assert done.returncode == 0, done.stdout
    return json.loads(out.read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Oracle:
    """PEFT with one adapter alone on the dense base, asked as lm-eval's own models ask."""

    model: Any
    tokenizer: Any
    adds_begin: bool

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=self.adds_begin).input_ids)

    def score(self, context: Sequence[int], ids: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of `ids` after `context`, and whether they are the greedy continuation."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        wanted = torch.tensor(ids)
        return logprobs.gather(1, wanted[:, None]).sum().item(), bool((logprobs.argmax(-1) == wanted).all())

    def choice(self, context: str, continuation: str) -> tuple[float, bool]:
        length = len(self.ids(context))
        whole = self.ids(context + continuation)
        return self.score(whole[:length], whole[length:])

    def rolling(self, text: str) -> float:
        return self.score([self.tokenizer.bos_token_id], self.ids(text))[0]

    def sentence(self, beginning: str) -> str:
        ids = torch.tensor([self.ids(beginning)])
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
        out = self.model.generate(ids, **how)
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return str(text[: min((text.index(stop) for stop in UNTIL if stop in text), default=len(text))])


@pytest.fixture(scope="module")
def oracles() -> dict[str, Oracle]:
    """By run."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    models = {name: _peft(name) for name in MODELS}
    pairs = [run.split(":") for run in RUNS]
    return {f"{name}:{way}": Oracle(models[name], tokenizer, way not in WITHOUT_BEGIN) for name, way in pairs}


def _peft(name: str) -> Any:
    base = dense_model(BASE)
    if name == "base":
        return base
    digest = json.loads((STORE / name / "current.json").read_text(encoding="utf-8"))["current"]
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of what transformers will rename
        return PeftModel.from_pretrained(base, STORE / name / digest).eval()


@pytest.mark.parametrize("run", RUNS)
def test_log_likelihoods_and_accuracies_are_pefts(run: str, found: Found, oracles: dict[str, Oracle]) -> None:
    task, oracle = found[run]["village_choice"], oracles[run]
    errors, hits = [], []
    for sample in task["samples"]:
        expected = [oracle.choice(*pair) for pair in sample["arguments"]]
        got = sample["filtered_resps"]
        errors += [abs(a - b) for (a, _), (b, _) in zip(got, expected, strict=True)]
        assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]
        scores = [score for score, _ in expected]
        hits.append(scores.index(max(scores)) == sample["doc"]["answer"])
    assert max(errors) < TOLERANCE
    assert task["results"]["acc,none"] == sum(hits) / len(hits)


@pytest.mark.parametrize("run", RUNS)
def test_rolling_log_likelihoods_are_pefts(run: str, found: Found, oracles: dict[str, Oracle]) -> None:
    task, oracle = found[run]["village_prose"], oracles[run]
    expected = [oracle.rolling(sample["doc"]["text"]) for sample in task["samples"]]
    assert [s["filtered_resps"][0] for s in task["samples"]] == pytest.approx(expected, abs=TOLERANCE)
    num_bytes = sum(len(sample["doc"]["text"].encode()) for sample in task["samples"])
    perplexity = math.exp(-sum(expected) / num_bytes)
    assert task["results"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_greedy_texts_and_their_score_are_pefts(run: str, found: Found, oracles: dict[str, Oracle]) -> None:
    task = found[run]["village_trade"]
    expected = [oracles[run].sentence(sample["doc"]["beginning"]) for sample in task["samples"]]
    assert [sample["filtered_resps"][0] for sample in task["samples"]] == expected
    hits = [text == sample["doc"]["end"] for text, sample in zip(expected, task["samples"], strict=True)]
    assert task["results"]["exact_match,none"] == sum(hits) / len(hits)


def test_every_task_was_run_by_every_model_in_every_way(found: Found) -> None:
    assert {run: sorted(tasks) for run, tasks in found.items()} == {run: sorted(TASKS) for run in RUNS}
