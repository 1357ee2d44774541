"""What the server's load says of other tenants' use: it is told to keys for that alone."""

from server.api.load_report import HEADER
from tests.api.keys.conftest import Tenants


def test_only_keys_for_metrics_are_told_the_load(tenants: Tenants) -> None:
    asks = {f"{HEADER}-format": "JSON"}
    assert HEADER not in tenants.live.http.get("/health", headers=asks).headers
    assert HEADER not in tenants["acme"].ask("GET", "/health", headers=asks).headers
    for name in ("only-metrics", "only-admin"):
        assert HEADER in tenants[name].ask("GET", "/health", headers=asks).headers
