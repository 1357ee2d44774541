"""A server with a file of keys: two owners, an operator, and keys of single scopes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, serving
from tests.api.keys.tenants import Tenant, entry, write_keys


@dataclass(frozen=True)
class Tenants:
    live: Live
    file: Path

    def __getitem__(self, name: str) -> Tenant:
        return Tenant(self.live, name)


@pytest.fixture(scope="session")
def tenants(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """`acme` and `acme-ci` are one owner's, `beta` another's; all three may use names of every kind.

    The operator's adapters are `public-one` and `hidden-one`; `globe` may use names that begin with public or globe.
    """
    source = tmp_path_factory.mktemp("source")
    write_source(source / "acme" / "secret")
    file = write_keys(
        tmp_path_factory.mktemp("keys") / "keys.yaml",
        entry("acme", adapters=["*"]),
        entry(
            "acme-ci", ["adapters"], owner="acme", adapters=["acme-*", "public-*"], sources=[f"file://{source}/acme"]
        ),
        entry("acme-else", ["adapters"], owner="acme", adapters=["else-*"]),
        entry("beta", adapters=["*"]),
        entry("globe", adapters=["public-*", "globe-*"]),
        entry("bare"),
        entry("spent", ["infer", "adapters", "admin"], limits={"tokens_per_day": 1}),
        entry("operator", ["infer", "adapters", "metrics", "admin"]),
        *(entry(f"only-{scope}", [scope], adapters=["*"]) for scope in ("infer", "adapters", "metrics", "admin")),
    )
    with serving(settings(api_keys=file, allow_source=(f"file://{source}",), adapter_paths=(source,))) as live:
        tenants = Tenants(live, file)
        for seed, name in enumerate(("public-one", "hidden-one"), 100):
            assert tenants["operator"].upload(name, lora_files(seed)).status_code == 201
        yield tenants


def write_source(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in lora_files(200).parts().values():
        (folder / name).write_bytes(content)
