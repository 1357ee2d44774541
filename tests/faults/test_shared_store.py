"""A store that servers share and that stops answering, under load. It is a real service behind a gate that fails it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.ground.config import Settings
from tests.adapters.s3 import S3, s3_service, use
from tests.api.conftest import Live, serving
from tests.faults.conftest import left_over_in
from tests.faults.load import ADAPTERS, MODEL, Load, right_answers, settled
from tests.faults.test_inside import OF_OTHERS, VICTIM, code_of, files_of, unload
from tests.test_isolation import check_nothing_leaks

pytestmark = pytest.mark.slow


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with s3_service() as service:
        use(service, monkeypatch)
        yield service


@pytest.fixture
def live(service: S3, tmp_path: Path) -> Iterator[Live]:
    settings = Settings(
        model=str(MODEL),
        store=f"s3://{service.make_bucket('faults')}/adapters",
        store_cache=tmp_path / "cache",
        store_reserve=0,
        store_refresh=0.5,
        quantize="none",
        dtype="float32",
        device="cpu",
    )
    with serving(settings) as live:
        for name in ADAPTERS:
            assert live.upload(name, files_of(name)).status_code == 201
        yield live


def test_an_object_store_does_not_answer(live: Live, service: S3, tmp_path: Path) -> None:
    """What this machine has is served on; what it has not is told to be asked for again, and then is there."""
    with Load(lambda: live.url, right_answers(live.http)).running() as load:
        service.fail_next = 10**6
        shutil.rmtree(tmp_path / "cache" / "versions" / live.http.get(f"/v1/adapters/{VICTIM}").json()["version"])
        unload(live, VICTIM)
        load.await_right(OF_OTHERS)
        load.await_refused("store_unreachable")
        assert code_of(live.upload("late", files_of("pirate-lora"))) == (503, "store_unreachable")
        assert live.http.get("/health").status_code == 200
        service.fail_next = 0
        load.await_right()
    load.left_over = settled(lambda: left_over_in(live))
    load.check(must_refuse={"store_unreachable"})
    check_nothing_leaks(live.server)
