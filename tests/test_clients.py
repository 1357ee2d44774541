"""Clients that others have written, each in an environment of its own, against a server on the demo.

What they do lies in `clients/checks/`, as programs that know nothing of this repository. The first run installs them
and needs the package registries.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import HERE, environment, version_of
from tests.clients.servers import demo_served
from tests.demo_files import ROOT

CHECKS = HERE / "checks"
KEY = "sesame-open"
# Environment, package, what it runs.
CLIENTS = (
    ("openai-1", "openai", "openai_checks.py"),
    ("openai-2", "openai", "openai_checks.py"),
    ("openai-3", "openai", "openai_checks.py"),
    ("openai-npm", "openai", "openai_checks.cjs"),
    ("langchain", "langchain-openai", "langchain_checks.py"),
    ("litellm", "litellm", "litellm_checks.py"),
)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a server as it starts by itself, and of a small one that has a key."""
    with (
        demo_served(tmp_path_factory.mktemp("open")) as server,
        demo_served(tmp_path_factory.mktemp("small"), max_sequences=1, max_queued=64, api_key=KEY) as small,
    ):
        yield {"GRAFT_TEST_URL": server.url, "GRAFT_TEST_SMALL_URL": small.url}


@pytest.mark.slow
@pytest.mark.timeout(6000)  # a slow network may install for long
@pytest.mark.parametrize(("name", "package", "checks"), CLIENTS, ids=[name for name, _, _ in CLIENTS])
def test_a_client_gets_what_it_relies_on(
    name: str, package: str, checks: str, urls: dict[str, str], tmp_path: Path
) -> None:
    made = environment(name)
    program = ("node", "--test") if checks.endswith(".cjs") else ("python", "-m", "pytest")
    # litellm would fetch a list of prices.
    settings = {"NODE_PATH": str(made.folder / "node_modules"), "LITELLM_LOCAL_MODEL_COST_MAP": "True", **urls}
    done = made.run(*program, str(CHECKS / checks), home=tmp_path, **settings)
    assert done.returncode == 0, done.stdout


def test_the_page_lists_the_versions_that_are_exercised() -> None:
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_-]+)`[^|]*\| ([0-9.]+) \|", page, re.MULTILINE))
    assert listed == {(package, version_of(name, package)) for name, package, _ in CLIENTS} | {
        ("lm-eval", version_of("lm-eval", "lm-eval"))
    }
