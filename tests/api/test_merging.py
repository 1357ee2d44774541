"""POST /v1/adapters/merge: what `graft merge` makes, while the server serves, and nothing left of what is given up."""

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.adapters.format.content import CONTENT_FILES
from server.adapters.merging import live as live_merging
from server.adapters.merging.live import MAX_MERGES
from server.cli import main
from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, eventually, serving
from tests.fidelity import dense_model

PATH = "/v1/adapters/merge"
PROMPT = [3, 14, 15, 92, 65, 35]
INPUTS = [{"name": "first", "weight": 0.7}, {"name": "second", "weight": -0.4}]


@pytest.fixture(autouse=True)
def _nothing_is_left(live: Live) -> Iterator[None]:
    yield
    live.http.delete("/v1/adapters/merged")
    eventually(lambda: not list((live.store / ".incoming").iterdir()))
    eventually(lambda: live.server.registry.stats().num_leases == 0)


@pytest.fixture
def gate(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Merges wait for it once their inputs are read."""
    opened, merge_inputs = threading.Event(), live_merging.merge_inputs

    def gated(*arguments: Any, **named: Any) -> Any:
        opened.wait()
        return merge_inputs(*arguments, **named)

    monkeypatch.setattr(live_merging, "merge_inputs", gated)
    yield opened
    opened.set()


def merge(live: Live, **fields: Any) -> dict[str, Any]:
    answer = live.post(PATH, **({"name": "merged", "adapters": INPUTS} | fields))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def under_way(live: Live) -> int:
    return len(live.server.merges._under_way)


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"strategy": "linear"},
    "cat": {"strategy": "cat"},
    "svd": {"strategy": "svd", "rank": 3},
    "ties": {"strategy": "ties", "density": 0.4, "majority_sign": "frequency"},
    "dare_ties": {"strategy": "dare_ties", "density": 0.6, "seed": 5},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_result_is_that_of_the_command_byte_for_byte(
    live: Live, recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    made = merge(live, **RECIPES[recipe])
    out, flags = tmp_path / "out", [f"--{name.replace('_', '-')}={value}" for name, value in RECIPES[recipe].items()]
    mixture = ["--adapter", "first=0.7", "--adapter", "second=-0.4"]
    base = ["--model", str(tiny_llama), "--quantize", "none", "--dtype", "float32", "--device", "cpu"]
    assert main(["merge", str(out), *mixture, *flags, *base, "--store", str(live.store)]) == 0
    stored = live.store / "merged" / made["version"]
    assert all((stored / name).read_bytes() == (out / name).read_bytes() for name in CONTENT_FILES)


ORACLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cat": ({"strategy": "cat"}, {"combination_type": "cat"}),
    "linear": ({"strategy": "linear"}, {"combination_type": "svd", "svd_rank": 8}),
    "svd": ({"strategy": "svd", "rank": 2}, {"combination_type": "svd", "svd_rank": 2}),
    "ties": (
        {"strategy": "ties", "density": 0.4, "rank": 32},
        {"combination_type": "ties_svd", "density": 0.4, "svd_rank": 32},
    ),
}


@pytest.mark.parametrize("case", ORACLE)
def test_what_answers_is_what_peft_makes_of_them(live: Live, case: str, tiny_llama: Path) -> None:
    own, theirs = ORACLE[case]
    merge(live, **own)
    folders = [
        live.store / name / live.http.get(f"/v1/adapters/{name}").json()["version"] for name in ("first", "second")
    ]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(dense_model(tiny_llama), folders[0], adapter_name="first")
        model.load_adapter(folders[1], adapter_name="second")
        model.double().base_model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "theirs", **theirs)
        model.set_adapter("theirs")
        expected = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    asked = {"adapter": "merged", "prompt": PROMPT, "max_tokens": 1, "logprobs": 5, "temperature": 0}
    answer = live.post("/v1/completions", **asked).json()["choices"][0]["logprobs"]
    got = torch.tensor(sorted(answer["top_logprobs"][0].values(), reverse=True), dtype=torch.float64)
    assert torch.allclose(got, expected.topk(5).values, atol=1e-4)


def test_the_answer_says_what_was_made_and_of_what(live: Live) -> None:
    versions = {name: live.http.get(f"/v1/adapters/{name}").json()["version"] for name in ("first", "second")}
    pinned = f"second@{versions['second'][:12]}"
    adapters = [{"name": "first", "weight": 0.7}, {"name": pinned, "weight": 2}]
    made = merge(live, adapters=adapters, strategy="svd", rank=3)
    assert (made["name"], made["method"], made["merge"]["rank"], made["merge"]["warnings"]) == ("merged", "lora", 3, [])
    assert 0 < made["merge"]["relative_error"] <= made["merge"]["worst_error"] < 1
    assert made["recipe"]["inputs"] == [
        {"name": "first", "version": versions["first"], "weight": 0.7, "method": "lora"},
        {"name": "second", "version": versions["second"], "weight": 2.0, "method": "lora"},
    ]
    assert live.http.get("/v1/adapters/merged").json()["recipe"] == made["recipe"]
    uses = [live.http.get(f"/v1/adapters/{name}").json()["num_running"] for name in ("first", "second")]
    assert uses == [0, 0]


def test_a_name_in_use_is_replaced_only_if_asked_for(live: Live) -> None:
    old = merge(live)
    assert live.post(PATH, name="merged", adapters=INPUTS).status_code == 200
    other = {"name": "merged", "adapters": INPUTS, "strategy": "svd", "rank": 2}
    assert live.post(PATH, **other).status_code == 409
    new = merge(live, **other, replace=True)
    assert new["versions"] == [old["version"], new["version"]]


def test_a_merged_adapter_can_be_merged_again(live: Live) -> None:
    merge(live)
    again = merge(live, adapters=[{"name": "merged"}, {"name": "first", "weight": 0.1}], replace=True)
    assert again["recipe"]["inputs"][0]["weight"] == 1


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"adapters": []}, 400, "adapters"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters[0].name"),
        ({"adapters": [{"name": "first", "weight": 0}]}, 400, "adapters"),
        ({"adapters": [{"name": "first"}, {"name": "first"}]}, 400, "adapters"),
        ({"adapters": [{"name": "first"}] * 65}, 400, "adapters"),
        ({"adapters": [{"name": "nobody"}]}, 404, "adapter"),
        ({"adapters": [{"name": "first@zz"}]}, 400, "adapter"),
        ({"strategy": "mean"}, 400, "strategy"),
        ({"strategy": "svd", "rank": 513}, 400, "rank"),
        ({"strategy": "linear", "density": 0.5}, 400, "density"),
        ({"strategy": "dare_ties", "seed": -1}, 400, "seed"),
        ({"strategy": "ties", "majority_sign": "loudest"}, 400, "majority_sign"),
        ({"name": "Not A Name"}, 400, "name"),
        ({"name": "tiny"}, 409, "name"),
        ({"name": "\ud800"}, 400, "name"),
        ({"extra": 1}, 400, "extra"),
        ({"rank": "4"}, 400, "rank"),
    ],
)
def test_what_makes_no_merge_is_refused_by_name(live: Live, fields: dict[str, Any], status: int, param: str) -> None:
    refused = live.post(PATH, **({"name": "merged", "adapters": INPUTS} | fields))
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text


def test_changes_that_cancel_out_are_refused(live: Live) -> None:
    merge(live, adapters=[{"name": "first"}])
    refused = live.post(
        PATH, name="nothing", adapters=[{"name": "first", "weight": 0.5}, {"name": "merged", "weight": -0.5}]
    )
    assert refused.status_code == 400
    assert "zero at every site" in refused.json()["error"]["message"]


def test_requests_are_answered_while_a_merge_goes_on(live: Live, gate: threading.Event) -> None:
    done: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: done.append(merge(live)))
    thread.start()
    eventually(lambda: under_way(live) == 1)
    assert live.post("/v1/completions", adapter="first", prompt="Hi", max_tokens=4).status_code == 200
    gate.set()
    thread.join()
    assert done[0]["name"] == "merged"


def test_an_input_that_is_deleted_meanwhile_is_merged_all_the_same(live: Live, gate: threading.Event) -> None:
    assert live.upload("gone", lora_files(77)).status_code == 201
    done: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: done.append(merge(live, adapters=[*INPUTS, {"name": "gone"}])))
    thread.start()
    eventually(lambda: under_way(live) == 1)
    assert live.http.delete("/v1/adapters/gone").status_code == 200
    gate.set()
    thread.join()
    assert [item["name"] for item in done[0]["recipe"]["inputs"]] == ["first", "second", "gone"]


def test_more_than_a_few_at_once_are_refused_and_who_leaves_gives_up(live: Live, gate: threading.Event) -> None:
    asked = [live.send(PATH, name="merged", adapters=INPUTS) for _ in range(MAX_MERGES)]
    eventually(lambda: under_way(live) == MAX_MERGES)
    refused = live.post(PATH, name="merged", adapters=INPUTS)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    for connection in asked:
        connection.close()
    eventually(lambda: under_way(live) <= 1)  # one that is being made already cannot look up before the gate opens
    gate.set()
    eventually(lambda: under_way(live) == 0)
    assert live.http.get("/v1/adapters/merged").status_code == 404


def test_a_server_that_ends_gives_its_merges_up(settings: Callable[..., Settings], gate: threading.Event) -> None:
    with serving(settings()) as own:
        assert own.upload("first", lora_files(1)).status_code == 201
        answers: list[int] = []
        body = {"name": "merged", "adapters": [{"name": "first"}]}
        threads = [
            threading.Thread(target=lambda: answers.append(own.post(PATH, **body).status_code)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: under_way(own) == 2)
        closing = threading.Thread(target=own.server.merges.close)
        closing.start()
        eventually(lambda: own.server.merges._is_closed)
        gate.set()
        for thread in (*threads, closing):
            thread.join()
        assert answers == [503, 503]
        assert own.post(PATH, **body).status_code == 503
        assert own.http.get("/v1/adapters/merged").status_code == 404


def test_a_full_store_refuses_uploads_and_merges(settings: Callable[..., Settings]) -> None:
    first, second = lora_files(1), lora_files(2)
    quota = 2 * first.num_bytes + 100
    with serving(settings(store_quota=quota)) as own:
        assert own.upload("first", first).status_code == 201
        assert own.upload("second", second).status_code == 201
        assert own.metric("graft_store_quota_bytes") == quota
        assert own.metric("graft_store_bytes") == first.num_bytes + second.num_bytes
        upload, merged = own.upload("third", lora_files(3)), own.post(PATH, name="merged", adapters=INPUTS)
        for refused in (upload, merged):
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "quota_exceeded"), refused.text
            assert refused.headers["x-should-retry"] == "false"
        assert list((own.store / ".incoming").iterdir()) == []
        assert own.http.delete("/v1/adapters/second").status_code == 200
        assert own.upload("third", lora_files(3)).status_code == 201
