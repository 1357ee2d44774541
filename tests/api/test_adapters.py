"""The life of an adapter over HTTP: upload, ask, replace, look at, delete."""

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from server.ground.config import Settings
from tests.api.adapter_files import RANK, lora_files
from tests.api.conftest import Gate, Live, eventually, serving


@pytest.fixture
def name(live: Live) -> Iterator[str]:
    """A name that is free at the test's start and again at its end."""
    yield "third"
    live.http.delete("/v1/adapters/third")


def text(live: Live, **choice: str) -> str:
    answer = live.post("/v1/completions", prompt="Hello", max_tokens=20, temperature=0, ignore_eos=True, **choice)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_an_upload_is_described_and_answers_the_next_request(live: Live, name: str) -> None:
    files = lora_files(11)
    created = live.upload(name, files)
    assert created.status_code == 201
    shown = created.json()
    assert shown["name"] == name
    assert len(shown["version"]) == 64
    assert (shown["method"], shown["rank"], shown["sites"]) == ("lora", RANK, 4)
    assert shown["parameters"] == 2 * RANK * (64 + 64 + 64 + 32)
    assert shown["bytes"] == files.num_bytes
    assert shown["warnings"] == []
    assert text(live, adapter=name) != text(live)


def test_the_same_content_again_is_no_news(live: Live, name: str) -> None:
    first, again = live.upload(name, lora_files(12)), live.upload(name, lora_files(12))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["version"] == again.json()["version"]


def test_other_content_under_a_name_is_a_conflict(live: Live, name: str) -> None:
    version = live.upload(name, lora_files(13)).json()["version"]
    refused = live.upload(name, lora_files(14))
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"  # OpenAI's clients would send it again
    assert refused.json()["error"]["code"] == "conflict"
    assert live.http.get(f"/v1/adapters/{name}").json()["version"] == version


def test_replacing_makes_a_new_version_and_keeps_the_old_one_for_who_asks(live: Live, name: str) -> None:
    old = live.upload(name, lora_files(15)).json()["version"]
    before = text(live, adapter=name)
    replaced = live.upload(name, lora_files(16), replace="true")
    assert replaced.status_code == 201
    assert replaced.json()["versions"] == [old, replaced.json()["version"]]
    assert text(live, adapter=name) != before
    assert text(live, adapter=f"{name}@{old[:12]}") == before


def test_a_running_request_keeps_the_version_it_began_with(live: Live, name: str, gate: Gate) -> None:
    live.upload(name, lora_files(17))
    gate.allow(20)  # a step per token
    expected = text(live, adapter=name)
    gate.allow(1)
    with live.openai.completions.create(
        model=name,
        prompt="Hello",
        max_tokens=20,
        temperature=0,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        chunks = iter(stream)
        said = next(chunks).choices[0].text
        assert live.upload(name, lora_files(18), replace="true").status_code == 201
        gate.allow(19)
        said += "".join(chunk.choices[0].text for chunk in chunks)
    assert said == expected
    gate.allow(20)
    assert text(live, adapter=name) != expected


def test_deleting_takes_the_name_away(live: Live, name: str) -> None:
    live.upload(name, lora_files(19))
    text(live, adapter=name)
    deleted = live.http.delete(f"/v1/adapters/{name}")
    assert deleted.status_code == 200
    assert deleted.json() == {"name": name, "object": "adapter", "deleted": True}
    assert live.http.get(f"/v1/adapters/{name}").status_code == 404
    assert live.http.delete(f"/v1/adapters/{name}").status_code == 404
    assert live.post("/v1/completions", prompt="Hi", adapter=name).status_code == 404
    eventually(lambda: not (live.store / name).exists())


def test_the_list_has_every_adapter(live: Live, name: str) -> None:
    live.upload(name, lora_files(20))
    listed = {adapter["name"]: adapter for adapter in live.http.get("/v1/adapters").json()["data"]}
    assert {"first", "second", name} <= listed.keys()
    assert listed[name] | {"recipe": None, "chat_template": None} == live.http.get(f"/v1/adapters/{name}").json()


def test_an_upload_survives_a_restart(settings: Callable[..., Settings]) -> None:
    same = settings()
    with serving(same) as live:
        version = live.upload("kept", lora_files(21)).json()["version"]
        said = text(live, adapter="kept")
    with serving(same) as live:
        assert live.http.get("/v1/adapters/kept").json()["version"] == version
        assert text(live, adapter="kept") == said


# Refusals


@pytest.mark.parametrize("bad", ["", "Upper", "../up", "a/b", "a b", "-dash", "a" * 64, "naïve", "a@b", ".hidden"])
def test_names_that_could_be_misread_are_refused(live: Live, bad: str) -> None:
    refused = live.upload(bad, lora_files(1))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "name"


def test_a_name_of_the_base_is_taken(live: Live) -> None:
    assert live.upload("tiny", lora_files(1)).status_code == 409


def test_an_adapter_that_does_not_fit_the_base_is_refused_and_leaves_nothing(live: Live, name: str) -> None:
    files = lora_files(22)
    bad = [
        files.with_config(r=8),
        files.with_config(peft_type="NO_SUCH_TYPE"),
        type(files)(b"{not json", files.weights),
        type(files)(files.config, b"not safetensors"),
        type(files)(files.config, files.weights[:-100]),
        lora_files(22, scale=float("nan")),
        lora_files(22, hidden=32),
        lora_files(22, parent="cross_attn"),
    ]
    before = {path.name for path in live.store.iterdir()}
    for candidate in bad:
        refused = live.upload(name, candidate)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["message"]
    assert live.http.get(f"/v1/adapters/{name}").status_code == 404
    assert {path.name for path in live.store.iterdir()} == before
    assert list((live.store / ".incoming").iterdir()) == []


def test_openais_client_reads_the_refusal_of_a_broken_adapter(live: Live, name: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        live.openai.post(
            "/adapters", body={"name": name}, files={"config": b"{}", "weights": b""}, cast_to=httpx.Response
        )
    assert refused.value.status_code == 400
