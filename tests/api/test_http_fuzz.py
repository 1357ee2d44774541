"""The fuzz of the HTTP face: no case gets a 500, hangs, learns of another owner's adapter, or leaves anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, eventually, serving
from tests.api.http_fuzz import HIDDEN, make, run
from tests.api.keys.tenants import Tenant, entry, write_keys
from tests.models import save_model

NUM_CASES = 250
NUM_CASES_SLOW = 5000


@contextmanager
def served(scratch: Path) -> Iterator[Live]:
    """A server with a key `fuzz`, adapters that it may use, and one that it must not hear of."""
    base = scratch / "base"
    base.mkdir()
    save_model("llama", base)
    keys = write_keys(scratch / "keys.yaml", entry("fuzz", adapters=["*"]), entry("acme", adapters=["*"]))
    settings = Settings(
        model=str(base), store=scratch / "store", quantize="none", dtype="float32", device="cpu", api_keys=keys
    )
    with serving(settings) as live:
        assert Tenant(live, "acme").upload(HIDDEN, lora_files(9)).status_code == 201
        for name in ("mine", "public"):
            assert Tenant(live, "fuzz").upload(name, lora_files(1)).status_code == 201
        yield live


def sound(live: Live) -> None:
    """Whether the server is as it was before, and answers."""
    server, fuzz = live.server, Tenant(live, "fuzz")
    eventually(lambda: server.engine.stats().num_in_flight == 0)
    eventually(lambda: server.registry.stats().num_leases == 0)
    eventually(lambda: not list((live.store / ".incoming").glob("*")))
    assert server.registry.check_integrity() == ()
    assert HIDDEN not in fuzz.adapters()
    assert HIDDEN in Tenant(live, "acme").adapters()
    assert fuzz.complete(prompt="Hi", max_tokens=2).status_code == 200


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with served(tmp_path_factory.mktemp("fuzz")) as live:
        yield live


def test_odd_requests_are_refused_in_order_and_leave_nothing(live: Live) -> None:
    for number in range(NUM_CASES):
        run(live.address, make(0, number))
    sound(live)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_many_odd_requests_are_refused_in_order_and_leave_nothing(live: Live, seed: int) -> None:
    for number in range(NUM_CASES_SLOW):
        run(live.address, make(seed, number))
    sound(live)
