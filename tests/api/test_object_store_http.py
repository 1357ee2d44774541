"""Servers over HTTP that share an S3: what one is told, the others answer with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.ground.config import Settings
from server.ground.errors import StartupRefused
from tests.adapters.s3 import S3, s3_service, use
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, eventually, serving


@pytest.fixture(scope="module")
def service() -> Iterator[S3]:
    with s3_service() as service:
        yield service


@pytest.fixture
def make(
    service: S3, settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """The settings of one server of several, with a cache of its own."""
    use(service, monkeypatch)
    bucket = service.make_bucket(tmp_path.name.replace("_", "-")[:60])

    def make(name: str, **changes: object) -> Settings:
        store = {"store": f"s3://{bucket}/adapters", "store_cache": tmp_path / name, "store_refresh": 0.5}
        return settings(**(store | changes))

    return make


def text(live: Live, adapter: str) -> str:
    answer = live.post("/v1/completions", adapter=adapter, prompt="once", max_tokens=8, temperature=0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def status(live: Live, adapter: str) -> int:
    return live.post("/v1/completions", adapter=adapter, prompt="once", max_tokens=1).status_code


def test_an_adapter_uploaded_to_one_server_answers_on_another(make: Callable[..., Settings]) -> None:
    with serving(make("a")) as first, serving(make("b", store_refresh=3600.0)) as second:
        assert first.upload("legal", lora_files(1)).status_code == 201
        # The second server does not look by itself: the request makes it.
        eventually(lambda: status(second, "legal") == 200)
        assert text(second, "legal") == text(first, "legal")
        stream = second.openai.completions.create(model="legal", prompt="once", max_tokens=2, stream=True)
        assert len(list(stream)) > 0
        assert second.http.get("/v1/adapters/legal").json()["tiers"][0] == "store"
        assert second.upload("legal", lora_files(2)).status_code == 409
        assert second.upload("legal", lora_files(2), replace="true").status_code == 201
        eventually(lambda: len(first.http.get("/v1/adapters/legal/versions").json()["data"]) == 2)
        assert text(first, "legal") == text(second, "legal")
        assert first.http.delete("/v1/adapters/legal").status_code == 200
        assert second.http.delete("/v1/adapters/legal").status_code == 404
        assert status(second, "legal") == 404


def test_an_unknown_adapter_is_a_503_while_the_store_does_not_answer(
    make: Callable[..., Settings], service: S3
) -> None:
    with serving(make("a", store_refresh=3600.0)) as live:
        assert live.upload("legal", lora_files(1)).status_code == 201
        service.denies = True
        try:
            eventually(lambda: status(live, "nobody") == 503)
            answer = live.post("/v1/completions", adapter="nobody", prompt="once", max_tokens=1)
            assert answer.json()["error"]["code"] == "store_unreachable"
            assert answer.headers["retry-after"] == "5"
            assert text(live, "legal")
            assert live.upload("other", lora_files(2)).status_code == 503
        finally:
            service.denies = False
        eventually(lambda: status(live, "nobody") == 404)


def test_what_cannot_be_done_with_an_object_store_is_refused_at_the_start(make: Callable[..., Settings]) -> None:
    with pytest.raises(StartupRefused, match="--store-quota is for a folder"), serving(make("a", store_quota=1 << 20)):
        pass
    with (
        pytest.raises(StartupRefused, match="has no such bucket"),
        serving(make("a", store="s3://there-is-none/x")),
    ):
        pass
