"""`python -m load_tests.dashboard_picture`: the dashboard's panels of a live run, as one picture.

A server on the demo is asked for a mix of all its adapters, a Prometheus scrapes it, and each panel's queries are drawn
as Grafana would. Owns this run and the drawing. Needs Prometheus (Debian's package), and matplotlib.
"""

import argparse
import asyncio
import io
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from load_tests.closed_loop import ClosedLoop
from load_tests.own_server import NoServer, own_server
from load_tests.soak import BASE

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
_WINDOW = "30s"
_VARIABLES = {"$__rate_interval": _WINDOW, "$instance": ".*", "$adapter": ".*"}
_INTERVAL_S = 2
_PER_LINE = 5
_MAX_LEGEND = 4
_DOTS_PER_INCH = 72
_NUM_COLOURS = 16  # of the file: a third of the bytes


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


async def work(url: str, adapters: Sequence[str], duration_s: float) -> None:
    """Requests of all adapters, popular ones more often, in waves; now and then one that is refused."""
    dice = random.Random(0)
    weights = [1 / rank for rank in range(1, len(adapters) + 1)]
    begun = time.perf_counter()
    wave = 0
    while time.perf_counter() - begun < duration_s:
        wave += 1
        loop = ClosedLoop(url, num_streams=4 + 8 * (wave % 3), num_prompt_tokens=24, max_tokens=16)
        names = dice.choices(adapters, weights, k=16)
        await loop.run([*names, "no-such-adapter"], f"wave {wave}")


def series(prometheus: str, expr: str, begun_s: float, ended_s: float) -> list[tuple[Mapping[str, str], Any]]:
    """Labels, and pairs of Unix time and value, of each series that an expression had in this time."""
    for variable, value in _VARIABLES.items():
        expr = expr.replace(variable, value)
    asked = urllib.parse.urlencode({"query": expr, "start": begun_s, "end": ended_s, "step": _INTERVAL_S})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{asked}", timeout=60) as answer:
        found = json.loads(answer.read())["data"]["result"]
    return [(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]


def draw(prometheus: str, begun_s: float, ended_s: float, path: Path) -> None:
    """Every panel of the dashboard, in its order."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if "targets" in panel]
    num_lines = -(-len(panels) // _PER_LINE)
    figure = Figure(figsize=(2.8 * _PER_LINE, 1.7 * num_lines), layout="constrained")
    cells = list(figure.subplots(num_lines, _PER_LINE).flat)
    for axes, panel in zip(cells, panels, strict=False):
        _draw_panel(axes, panel, prometheus, begun_s, ended_s)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=_DOTS_PER_INCH)
        Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_panel(axes: Axes, panel: Mapping[str, Any], prometheus: str, begun_s: float, ended_s: float) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_title(f"{panel['title']}{'' if unit == 'short' else f', {unit}'}", fontsize=8)
    axes.tick_params(labelsize=6)
    num_drawn = 0
    for target in panel["targets"]:
        for labels, values in series(prometheus, target["expr"], begun_s, ended_s):
            name = _legend(target["legendFormat"], labels)
            shown = name if num_drawn < _MAX_LEGEND else None
            axes.plot([at - begun_s for at, _ in values], [value for _, value in values], label=shown, linewidth=1)
            num_drawn += 1
    axes.set_ylim(bottom=0)
    if num_drawn:
        axes.legend(fontsize=6, handlelength=1, borderpad=0.2, labelspacing=0.2, loc="upper left", framealpha=0.6)


def _legend(form: str, labels: Mapping[str, str]) -> str:
    for label in re.findall(r"\{\{(\w+)\}\}", form):
        form = form.replace(f"{{{{{label}}}}}", labels.get(label, ""))
    return form


def measure(folder: Path, duration_s: float, path: Path) -> None:
    shutil.copytree(ROOT / "adapters_store", folder / "store")
    flags = {"device": "cpu", "kv-memory": "64MiB", "adapter-memory": "2MiB", "max-sequences": 8, "log-level": "error"}
    with own_server(BASE, folder, flags) as server, scraped(server.url.removeprefix("http://"), folder) as prometheus:
        adapters = [one["name"] for one in server.call("GET", "/v1/adapters")["data"]]
        begun_s = time.time()
        asyncio.run(work(server.url, adapters, duration_s))
        time.sleep(2 * _INTERVAL_S)
        draw(prometheus, begun_s, time.time(), path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.dashboard_picture", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=120, help="of work (default: 120)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboard.png", metavar="FILE.png")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), arguments.seconds, arguments.out)
    except NoServer as error:
        print(f"dashboard picture: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
