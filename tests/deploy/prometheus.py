"""Prometheus and promtool: where they are on this machine, and a Prometheus that scrapes a server of a test.

Owns how they are found and run. `make test` brings Debian's package into .clients/prometheus where it can; what needs
them is skipped elsewhere. Knows nothing about what is asked.
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
_FOLDER = ROOT / ".clients" / "prometheus" / "usr" / "bin"
INTERVAL_S = 2  # of scrapes; also what one may take, on a machine that is busy with other tests
_PATIENCE_S = 120.0


def program(name: str) -> str | None:
    """The path of "prometheus" or "promtool"; None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=str(_FOLDER))


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    found = program("promtool")
    assert found is not None
    return subprocess.run(
        [found, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=_PATIENCE_S
    )


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    http: httpx.Client

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(f"/api/v1/{path}", params=parameters)
        body = answer.json()
        assert body["status"] == "success", (parameters, body)
        return body["data"]

    def values(self, expr: str) -> list[float]:
        """Of the series that an expression has now, without those that are no number."""
        result = self.ask("query", query=expr)["result"]
        return [value for sample in result if (value := float(sample["value"][1])) == value]

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def await_true(self, is_true: Callable[[], bool]) -> None:
        """As `eventually`, without asking so often that scrapes have to wait."""
        deadline = time.monotonic() + _PATIENCE_S
        while not is_true():
            assert time.monotonic() < deadline, f"it did not happen; {self.ask('targets')['activeTargets']}"
            time.sleep(INTERVAL_S / 4)


@contextmanager
def scraping(address: str, key: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the configuration of deploy/, on another target and every INTERVAL_S."""
    found = program("prometheus")
    assert found is not None
    port = _free_port()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{INTERVAL_S}s", "evaluation_interval": f"{INTERVAL_S}s"}
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    (folder / "key").write_text(key, encoding="utf-8")
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [address]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
    command = [found, *(f"--{name}={value}" for name, value in flags.items()), f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S) as http:
                _await_ready(http, process, folder / "log")
                yield Prometheus(http)
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(http: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"Prometheus did not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
