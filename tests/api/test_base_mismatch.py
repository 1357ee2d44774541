"""Adapters of another base over HTTP: warned of in the upload's answer, the list and the answers, or refused."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.assemble import assemble
from server.ground.config import Settings
from server.ground.errors import StartupRefused
from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.conftest import Live, serving

OTHER = "b" * 64


@pytest.fixture(scope="module")
def picky(settings: Callable[..., Settings]) -> Iterator[Live]:
    """A server with --strict-base on a store that has `own`, and `foreign` of another base."""
    same = settings()
    with serving(same) as live:
        assert live.upload("own", lora_files(41)).json()["warnings"] == []
        assert live.upload("foreign", of_another(42)).status_code == 201
    with serving(same.model_copy(update={"strict_base": True})) as live:
        yield live


@pytest.fixture
def name(live: Live) -> Iterator[str]:
    """A name that is free at the test's start and again at its end."""
    yield "fourth"
    live.http.delete("/v1/adapters/fourth")


def of_another(seed: int) -> AdapterFiles:
    return lora_files(seed).with_config(base_model_name_or_path="org/Other-7B")


def fingerprint(live: Live) -> str:
    return str(live.http.get("/v1/models/tiny").json()["fingerprint"])


def post(live: Live, name: str, files: AdapterFiles, base_fingerprint: str) -> tuple[int, dict[str, object]]:
    form = {"name": name, "base_fingerprint": base_fingerprint}
    answer = live.http.post("/v1/adapters", data=form, files=files.parts())
    return answer.status_code, answer.json()


def test_a_warning_stands_in_the_uploads_answer_the_list_and_the_answers(live: Live, name: str) -> None:
    created = live.upload(name, of_another(31))
    assert created.status_code == 201
    shown = created.json()
    (warning,) = shown["warnings"]
    assert "trained on org/Other-7B" in warning
    assert fingerprint(live) in warning
    assert (shown["base_model"], shown["base_fingerprint"]) == ("org/Other-7B", fingerprint(live))
    assert shown["refused"] is False
    listed = {adapter["name"]: adapter for adapter in live.http.get("/v1/adapters").json()["data"]}
    assert listed[name]["warnings"] == [warning]
    assert live.http.get(f"/v1/adapters/{name}").json()["warnings"] == [warning]
    answered = live.post("/v1/completions", prompt="Hi", adapter=name, max_tokens=1).json()["adapter"]
    assert answered == {"name": name, "version": shown["version"], "warning": "base_mismatch"}
    own = live.post("/v1/completions", prompt="Hi", adapter="first", max_tokens=1).json()["adapter"]
    assert "warning" not in own


@pytest.mark.parametrize("base", ["tiny", "org/Tiny", "/root/models/tiny-bnb-4bit"])
def test_the_served_names_are_names_of_the_base(live: Live, name: str, base: str) -> None:
    files = lora_files(32).with_config(base_model_name_or_path=base)
    assert live.upload(name, files).json()["warnings"] == []


def test_the_fingerprint_in_the_form_decides_and_does_not_change_the_version(live: Live, name: str) -> None:
    files = of_another(33)
    status, shown = post(live, name, files, fingerprint(live))
    assert (status, shown["warnings"]) == (201, [])
    status, again = post(live, name, files, OTHER)
    assert (status, again["version"]) == (200, shown["version"])
    (warning,) = again["warnings"]  # type: ignore[misc]
    assert OTHER in warning


@pytest.mark.parametrize("text", ["abc", "B" * 64, "b" * 65, f"packed:{'b' * 64}"])
def test_what_is_no_fingerprint_is_refused(live: Live, name: str, text: str) -> None:
    status, answer = post(live, name, lora_files(34), text)
    assert status == 400
    assert answer["error"]["param"] == "base_fingerprint"  # type: ignore[index]
    assert live.http.get(f"/v1/adapters/{name}").status_code == 404


def test_an_empty_fingerprint_is_none(live: Live, name: str) -> None:
    assert post(live, name, lora_files(35), "")[0] == 201


def test_a_store_of_a_base_of_other_shapes_starts_and_its_adapters_are_refused_when_asked_for(
    settings: Callable[..., Settings], model_folder: Callable[[str], Path]
) -> None:
    same = settings()
    with serving(same) as live:
        assert live.upload("legal", lora_files(36)).status_code == 201
    with serving(same.model_copy(update={"model": str(model_folder("gpt2"))})) as live:
        shown = live.http.get("/v1/adapters/legal").json()
        assert "stored for" in shown["warnings"][0]
        assert "fingerprint" in shown["warnings"][0]
        refused = live.post("/v1/completions", prompt="Hi", max_tokens=1, adapter="legal")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_adapter")
        assert "the base has no module" in refused.json()["error"]["message"]


# Strict


def test_a_strict_server_refuses_the_upload_with_both_bases_and_the_remedy(picky: Live) -> None:
    refused = picky.upload("new", of_another(43))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "base_mismatch"
    for word in ("org/Other-7B", fingerprint(picky), "--served-model-name", "--strict-base"):
        assert word in error["message"]
    assert picky.http.get("/v1/adapters/new").status_code == 404


def test_a_strict_server_lists_what_it_has_and_refuses_requests_for_it(picky: Live) -> None:
    listed = {adapter["name"]: adapter["refused"] for adapter in picky.http.get("/v1/adapters").json()["data"]}
    assert listed == {"own": False, "foreign": True}
    for choice in ({"adapter": "foreign"}, {"model": "foreign"}):
        refused = picky.post("/v1/completions", prompt="Hi", max_tokens=1, **choice)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "base_mismatch")
    assert picky.post("/v1/completions", prompt="Hi", max_tokens=1, adapter="own").status_code == 200


def test_a_strict_server_does_not_start_with_a_named_adapter_of_another_base(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    files = of_another(44)
    (tmp_path / "adapter_config.json").write_bytes(files.config)
    (tmp_path / "adapter_model.safetensors").write_bytes(files.weights)
    named = {"adapter": f"legal={tmp_path}"}
    assemble(settings(**named)).close()
    with pytest.raises(StartupRefused, match=r"--adapter legal=.*org/Other-7B.*--strict-base"):
        assemble(settings(**named, strict_base=True))
