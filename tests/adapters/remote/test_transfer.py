"""The way from a place into an upload: its pace, and whom a connection may reach."""

import ipaddress
from collections.abc import Iterator

import pytest

from server.adapters.remote import web
from server.adapters.remote.address import Address, AllowList
from server.adapters.remote.transfer import MIN_BYTES_PER_S, PATIENCE_S, Meter
from server.adapters.remote.web import WebPlace
from server.ground.errors import SourceFailed
from tests.adapters.remote.site import Page, Site
from tests.api.adapter_files import lora_files


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_source_that_only_drips_is_given_up() -> None:
    clock = Clock()
    meter = Meter(lambda: None, clock)
    clock.now_s += 10 * PATIENCE_S  # in the queue
    meter.begin(10**6)
    for _ in range(100):
        clock.now_s += PATIENCE_S / 4
        meter.count(int(MIN_BYTES_PER_S * PATIENCE_S / 4) + 1)
    clock.now_s += PATIENCE_S
    with pytest.raises(SourceFailed, match="bytes a second"):
        meter.count(1)


def test_the_rest_is_told_from_the_pace_so_far() -> None:
    clock = Clock()
    meter = Meter(lambda: None, clock)
    assert meter.remaining_s() is None
    meter.begin(400)
    clock.now_s += 5
    meter.count(100)
    assert meter.remaining_s() == 15


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


def opened(source: str, *prefixes: str) -> str | None:
    with WebPlace.open(Address.parse(source), AllowList(prefixes)) as place:
        return place.revision


def test_a_name_that_leads_to_where_clouds_keep_credentials_is_not_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("x", lora_files(1))
    by_name = f"http://localhost:{site.port}/x"
    assert opened(by_name, by_name) == "w1"
    monkeypatch.setattr(web, "_CLOUD_ADDRESSES", {ipaddress.ip_address("127.0.0.1")})
    site.asked.clear()
    with pytest.raises(SourceFailed, match="localhost leads to"):
        opened(by_name, by_name)
    assert site.asked == []
    assert opened(f"{site.url}/x", by_name, site.url) == "w1"  # the operator has named the address itself


def test_redirects_end(site: Site) -> None:
    site.put("loop", lora_files(1))
    site.pages["/loop/adapter_config.json"] = Page(status=302, headers={"Location": "/loop/adapter_config.json"})
    with pytest.raises(SourceFailed, match="302"):
        opened(f"{site.url}/loop", site.url)
