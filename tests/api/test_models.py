"""GET /v1/models: where clients and routers find the base and its adapters."""

import openai
import pytest

from tests.api.conftest import Live


def test_the_base_comes_under_each_of_its_names_and_adapters_have_it_for_a_parent(live: Live) -> None:
    models = {model.id: model.model_dump() for model in live.openai.models.list()}
    assert list(models)[:2] == ["tiny", "org/tiny"]
    assert {"first", "second"} <= models.keys()
    assert models["tiny"]["parent"] is None
    assert models["first"]["parent"] == "tiny"
    assert all(model["object"] == "model" and model["created"] > 0 for model in models.values())
    assert models["tiny"]["max_model_len"] == 256


@pytest.mark.parametrize("name", ["tiny", "org/tiny", "first"])
def test_each_can_be_retrieved(live: Live, name: str) -> None:
    model = live.openai.models.retrieve(name)
    assert model.id == name
    assert model in list(live.openai.models.list())


def test_an_adapter_can_be_retrieved_by_version(live: Live) -> None:
    version = live.http.get("/v1/adapters/first").json()["version"]
    for spec in (f"first@{version}", f"first@{version[:8]}"):
        assert live.http.get(f"/v1/models/{spec}").json()["adapter"] == {"name": "first", "version": version}


def test_an_unknown_model_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        live.openai.models.retrieve("org/unknown")
    assert refused.value.code == "model_not_found"
