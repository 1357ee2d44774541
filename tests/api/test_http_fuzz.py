"""The fuzz of the HTTP face: no case gets a 500, hangs, learns of another owner's adapter, or leaves anything."""

import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, eventually, serving
from tests.api.http_fuzz import HIDDEN, KINDS, make, run
from tests.api.keys.tenants import Tenant, entry, write_keys
from tests.api.tar_fuzz import changed_tar
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


def check(live: Live, seed: int, num_cases: int) -> None:
    outcomes = list(run(live.address, (make(seed, number) for number in range(num_cases))))
    findings = [(each.case.number, each.case.sent[:300], each.finding) for each in outcomes if each.finding]
    assert findings == []
    assert sorted(each.case.number for each in outcomes) == [*range(num_cases)]
    sound(live)


def test_odd_requests_are_refused_in_order_and_leave_nothing(live: Live) -> None:
    check(live, 0, NUM_CASES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_many_odd_requests_are_refused_in_order_and_leave_nothing(live: Live, seed: int) -> None:
    check(live, seed, NUM_CASES_SLOW)


def test_tars_are_fuzzed_beyond_their_first_header() -> None:
    """Most of them are tars in which something is wrong, and some are good."""
    found = Counter(_depth(changed_tar(Random(f"deep {number}"))) for number in range(400))
    assert found["no tar"] < 150
    assert found["a link"] > 10
    assert found["other members"] > 30
    assert found["the two files"] > 60


def _depth(body: bytes) -> str:
    """What Python's own reader finds."""
    try:
        with tarfile.open(fileobj=io.BytesIO(body)) as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error):
        return "no tar"
    if any(member.issym() or member.islnk() for member in members):
        return "a link"
    names = {member.name.rpartition("/")[2] for member in members}
    return "the two files" if names == {CONFIG_FILE, WEIGHTS_FILE} else "other members"


def test_the_page_counts_every_case() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hostile-clients.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (.+) \|$", page, re.MULTILINE)
    assert {kind for kind, _, _ in rows} == set(KINDS)
    counts = {kind: int(num.replace(",", "")) for kind, num, _ in rows}
    for kind, _, answers in rows:
        told = [int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]*(?= )", answers)]
        assert sum(told) == counts[kind], kind
    assert f"{sum(counts.values()):,} of seed 2" in page
