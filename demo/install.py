"""Puts the trained adapters into the store that the server opens by default.

Owns nothing but the copy: each adapter is validated against the demo base as an upload would be. Run it with
`python -m demo.install [NAME ...]` from the root of the repository; `demo.build` does so after training.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from server.adapters.adapter_info import AdapterInfo
from server.assemble import Server, assemble
from server.ground.config import load
from server.ground.errors import AdapterRejected

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "demo" / "adapters"
STORE = ROOT / "adapters_store"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def install(server: Server, folder: Path) -> AdapterInfo:
    """The folder's adapter under the folder's name, and no former version of it. Raises AdapterRejected."""
    with server.store.incoming() as incoming:
        for name in FILES:
            with incoming.open_file(name) as file:
                file.write((folder / name).read_bytes())
        return server.registry.register(incoming, folder.name, replace=True).info


def main(names: Iterable[str] = ()) -> None:
    """Installs the adapters of `names`, or all that were trained. Exits with 1 if the server refuses one."""
    STORE.mkdir(exist_ok=True)
    folders = [TRAINED / name for name in names] or sorted(path for path in TRAINED.iterdir() if path.is_dir())
    server = assemble(load({"model": str(ROOT / "demo" / "base"), "store": str(STORE), "quantize": "none"}))
    console, num_refused = Console(), 0
    try:
        for folder in folders:
            if folder.name in server.store.names():
                server.registry.delete(folder.name)  # the store would keep the former version
            try:
                info = install(server, folder)
            except AdapterRejected as error:
                num_refused += 1
                console.print(f"[red]{folder.name}: {error}[/red]", highlight=False)
                continue
            console.print(f"{info.name}: {info.method}, {info.content_bytes:,} bytes, {info.num_sites} sites")
    finally:
        server.close()
    if num_refused:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
