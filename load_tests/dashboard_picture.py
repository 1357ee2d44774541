"""`python -m load_tests.dashboard_picture`: the dashboard's panels of a live run, as one picture.

A server on the demo is asked for a mix of all its adapters while others are uploaded, merged, dropped and fail, a
Prometheus scrapes it, and each panel is drawn. Owns this run. Needs Prometheus (Debian's package), and matplotlib.
"""

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from load_tests.dashboard_panels import ROOT, draw
from load_tests.dashboard_work import work
from load_tests.own_server import NoServer, own_server
from load_tests.soak import BASE

_INTERVAL_S = 2
# So little memory that blocks run out and adapters leave, and a queue that does not hold every wave.
_FLAGS = {
    "device": "cpu",
    "kv-memory": "1MiB",
    "block-size": 16,
    "adapter-memory": "1MiB",
    "host-memory": "3MiB",
    "max-sequences": 16,
    "max-queued": 6,
    "max-context": 256,
    "log-level": "error",
}


@contextmanager
def scraped(address: str, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes `address` until the block ends. Raises NoServer."""
    program = shutil.which("prometheus", path=f"{ROOT}/.clients/prometheus/usr/bin") or shutil.which("prometheus")
    if program is None:
        raise NoServer("prometheus is not installed: it is in Debian's package of that name")
    job = {"job_name": "graft", "static_configs": [{"targets": [address]}]}
    config = {"global": {"scrape_interval": f"{_INTERVAL_S}s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # YAML reads JSON
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={listen}",
    ]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen([program, *flags], stderr=log) as process:
        try:
            yield f"http://{listen}"
        finally:
            process.terminate()


def measure(folder: Path, duration_s: float, path: Path) -> list[str]:
    """The titles of the panels that show nothing. Raises NoServer."""
    shutil.copytree(ROOT / "adapters_store", folder / "store")
    with own_server(BASE, folder, _FLAGS) as server, scraped(server.url.removeprefix("http://"), folder) as prometheus:
        adapters = [one["name"] for one in server.call("GET", "/v1/adapters")["data"]]
        begun_s = time.time()
        asyncio.run(work(server.url, adapters, ROOT / "adapters_store", duration_s))
        time.sleep(2 * _INTERVAL_S)
        return draw(prometheus, (begun_s, time.time()), _INTERVAL_S, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.dashboard_picture", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=120, help="of work (default: 120)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboard.png", metavar="FILE.png")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            empty = measure(Path(folder), arguments.seconds, arguments.out)
    except NoServer as error:
        print(f"dashboard picture: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}; without a value: {', '.join(empty) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
