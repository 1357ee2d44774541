"""Which adapter a request means, said in `adapter`, in `model`, or in both."""

from typing import Any

import openai
import pytest

from server.adapters.store.folder_store import version_digest
from tests.api.conftest import Live


def ask(live: Live, **choice: str) -> Any:
    return live.post("/v1/completions", prompt="Hi", max_tokens=1, **choice)


@pytest.fixture
def version(live: Live) -> str:
    return str(live.http.get("/v1/adapters/first").json()["version"])


def test_both_may_name_the_same_adapter(live: Live, version: str) -> None:
    for model, adapter in (("first", "first"), ("first", f"first@{version[:8]}"), (f"first@{version}", "first")):
        assert ask(live, model=model, adapter=adapter).json()["adapter"]["version"] == version


def test_two_different_adapters_are_refused(live: Live, version: str) -> None:
    others = [("second", "first"), (f"first@{version[:8]}", "first@000000"), ("nobody", "first")]
    for model, adapter in others:
        refused = ask(live, model=model, adapter=adapter)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "adapter"


def test_an_unknown_model_is_told_what_exists(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        live.openai.completions.create(model="gpt-4", prompt="Hi")
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    assert all(name in refused.value.message for name in ("gpt-4", "tiny", "org/tiny", "first", "second"))


def test_an_unknown_adapter_is_not_found(live: Live) -> None:
    refused = ask(live, adapter="frist")
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("adapter_not_found", "adapter")
    assert "first" in error["message"]


@pytest.mark.parametrize("adapter", ["../etc/passwd", "FIRST", "", "first@", "first@zzzzzz", "first@12", "x" * 5000])
def test_what_cannot_be_an_adapter_is_refused_shortly(live: Live, adapter: str) -> None:
    refused = ask(live, adapter=adapter)
    assert refused.status_code in (400, 404)
    assert len(refused.text) < 1000


def test_a_version_that_the_name_does_not_have_is_not_found(live: Live) -> None:
    assert ask(live, adapter=f"first@{version_digest({})}").status_code == 404


def test_every_lease_ends_with_its_request(live: Live) -> None:
    live.post("/v1/completions", prompt=["Hi", "Ho"], n=3, max_tokens=2, adapter="first")
    live.post("/v1/completions", prompt="Hi", max_tokens=5000, adapter="first")  # refused at submission
    assert live.server.registry.stats().num_leases == 0
