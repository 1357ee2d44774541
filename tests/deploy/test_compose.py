"""The image and the compose file on a real Docker engine: built, brought up, asked, scraped, replaced.

Skipped without an engine, and where the images they stand on can be had neither here nor from a registry;
`stand_ins.sh` makes some of Debian's packages.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.api.conftest import eventually
from tests.deploy.prometheus import Prometheus

pytestmark = pytest.mark.slow

COMPOSE = ["docker", "compose", "--project-name", "graft-test", "--file"]
KEY = "a-key-of-the-test"
ROOT = Path(__file__).parents[2]
PIRATE = ROOT / "adapters_store" / "pirate-lora"
_MAX_BUILD_S = 1800
_MAX_START_S = 300


def docker(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False, timeout=timeout_s)


def why_not() -> str | None:
    """What is missing for these tests; None if all is there."""
    if shutil.which("docker") is None or docker("docker", "info", "--format", "{{.ServerVersion}}").returncode:
        return "no Docker engine answers"
    if docker("docker", "compose", "version").returncode:
        return "docker has no compose"
    services = yaml.safe_load((ROOT / "deploy" / "compose.yml").read_text(encoding="utf-8"))["services"]
    for image in (os.environ.get("PYTHON_IMAGE", "python:3.12-slim"), services["prometheus"]["image"]):
        if not can_be_had(image):
            return f"{image} is neither here nor to be had"
    return None


def can_be_had(image: str) -> bool:
    is_here = docker("docker", "image", "inspect", image).returncode == 0
    return is_here or docker("docker", "pull", "--quiet", image, timeout_s=_MAX_BUILD_S).returncode == 0


class Containers:
    """The server and its Prometheus as compose.yml has them, on ports that are free."""

    def __init__(self, folder: Path) -> None:
        inside = {"graft": 8000, "prometheus": 9090, "grafana": 3000}
        free = {"services": {name: {"ports": [f"127.0.0.1::{port}"]} for name, port in inside.items()}}
        lines = yaml.safe_dump(free).replace("ports:", "ports: !override")
        (folder / "ports.yml").write_text(lines, encoding="utf-8")
        self._files = [ROOT / "deploy" / "compose.yml", "--file", folder / "ports.yml"]

    def compose(self, *arguments: str, timeout_s: float = 60) -> str:
        done = docker(*COMPOSE, *self._files, *arguments, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def up(self) -> None:
        """Returns when the server's own health check has passed."""
        self.compose("up", "--detach", "--wait", "--no-build", "graft", "prometheus", timeout_s=_MAX_START_S)

    def http(self, service: str = "graft", port: str = "8000", **options: object) -> httpx.Client:
        address = self.compose("port", service, port)
        return httpx.Client(base_url=f"http://{address}", timeout=60, **options)  # type: ignore[arg-type]

    def of_one_with_the_key(self) -> httpx.Client:
        return self.http(headers={"Authorization": f"Bearer {KEY}"})

    def inspect(self, what: str) -> str:
        """A field of the server's container, as a template of Docker's."""
        done = docker("docker", "inspect", "--format", what, self.compose("ps", "--all", "--quiet", "graft"))
        return done.stdout.strip()


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("GRAFT_API_KEY", KEY)
        containers = Containers(tmp_path_factory.mktemp("compose"))
        containers.compose("build", "graft", timeout_s=_MAX_BUILD_S)
        try:
            containers.up()
            yield containers
        finally:
            containers.compose("down", "--volumes", timeout_s=_MAX_START_S)


def ask(http: httpx.Client, **fields: object) -> httpx.Response:
    return http.post(
        "/v1/completions", json={"prompt": "Tell me about the baker.", "max_tokens": 24, "temperature": 0} | fields
    )


def test_the_container_runs_the_demo_as_nobody_special_and_asks_for_the_key(containers: Containers) -> None:
    assert containers.inspect("{{.Config.User}} {{.State.Health.Status}}") == "graft healthy"
    with containers.http() as http:
        assert http.get("/ready").status_code == 200
        assert ask(http).status_code == 401
    with containers.of_one_with_the_key() as http:
        texts = {ask(http, adapter=name).json()["choices"][0]["text"] for name in (None, "pirate-lora", "poet-dora")}
    assert len(texts) == 3


def test_prometheus_scrapes_it_with_the_key_and_evaluates_the_rules(containers: Containers) -> None:
    with containers.http("prometheus", "9090") as http, containers.of_one_with_the_key() as server:
        prometheus = Prometheus(http)
        prometheus.await_true(lambda: prometheus.values("up") == [1.0])

        def has_seen_tokens() -> bool:
            ask(server).raise_for_status()  # again and again: what came before the first scrape is no rise
            return bool(prometheus.values("graft:time_to_first_token_seconds:p95_5m"))

        prometheus.await_true(has_seen_tokens)
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    assert {rule["health"] for rule in rules} == {"ok"}


def test_prometheus_key_reads_the_metrics_and_does_nothing_else(containers: Containers) -> None:
    key = containers.compose("exec", "prometheus", "cat", "/run/metrics-key/key").strip()
    assert key.startswith("graft_")
    with containers.http(headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.get("/metrics").status_code == 200
        assert ask(http).status_code == 403
        assert http.delete("/v1/adapters/pirate-lora").status_code == 403
        assert http.post("/v1/adapters", data={"name": "stolen"}).status_code == 403
    told = containers.compose("exec", "prometheus", "env") + containers.compose(
        "exec", "graft", "cat", "/keys/keys.yaml"
    )
    assert KEY not in told
    assert key not in told, "the server has its hash alone"


def test_grafana_has_the_dashboard(containers: Containers) -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yml").read_text(encoding="utf-8"))["services"]
    image = services["grafana"]["image"]
    if not can_be_had(image):
        pytest.skip(f"{image} is neither here nor to be had")
    containers.compose("up", "--detach", "--no-build", "grafana", timeout_s=_MAX_START_S)
    with containers.http("grafana", "3000", auth=("admin", "admin")) as http:
        eventually(lambda: found_dashboards(http) == ["graftserve"], within_s=_MAX_START_S)


def found_dashboards(http: httpx.Client) -> list[str]:
    """Their ids; none while Grafana starts."""
    try:
        answer = http.get("/api/search", params={"type": "dash-db"})
    except httpx.TransportError:
        return []
    return [one["uid"] for one in answer.json()] if answer.status_code == 200 else []


def test_what_was_uploaded_and_compiled_outlives_the_container(containers: Containers) -> None:
    version = json.loads((PIRATE / "current.json").read_text(encoding="utf-8"))["current"]
    files = {
        "config": (PIRATE / version / "adapter_config.json").read_bytes(),
        "weights": (PIRATE / version / "adapter_model.safetensors").read_bytes(),
    }
    with containers.of_one_with_the_key() as http:
        assert http.post("/v1/adapters", data={"name": "mine"}, files=files).status_code == 201
        before = ask(http, adapter="mine").json()
    containers.compose("rm", "--stop", "--force", "graft", timeout_s=_MAX_START_S)
    containers.up()
    assert "compiling the kernels" not in containers.compose("logs", "graft")
    with containers.of_one_with_the_key() as http:
        after = ask(http, adapter="mine").json()
    assert (after["adapter"], after["choices"]) == (before["adapter"], before["choices"])


def test_a_container_that_is_stopped_ends_by_itself(containers: Containers) -> None:
    containers.compose("stop", "graft", timeout_s=_MAX_START_S)
    assert containers.inspect("{{.State.ExitCode}} {{.State.OOMKilled}}") == "0 false"
