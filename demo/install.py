"""Puts the trained adapters into the store that the server opens by default.

Owns nothing but the copy: each adapter is validated against the demo base as an upload would be. Run it with
`python -m demo.install` from the root of the repository; `demo.build` does so after training.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from server.assemble import assemble
from server.ground.config import load

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "demo" / "adapters"
STORE = ROOT / "adapters_store"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def main(_: Sequence[str] = ()) -> None:
    STORE.mkdir(exist_ok=True)
    server = assemble(load({"model": str(ROOT / "demo" / "base"), "store": str(STORE), "quantize": "none"}))
    console = Console()
    try:
        for folder in sorted(path for path in TRAINED.iterdir() if path.is_dir()):
            if folder.name in server.store.names():
                server.registry.delete(folder.name)  # the store would keep the former version
            with server.store.incoming() as incoming:
                for name in FILES:
                    with incoming.open_file(name) as file:
                        file.write((folder / name).read_bytes())
                info = server.registry.register(incoming, folder.name, replace=True).info
            console.print(f"{info.name}: {info.method}, {info.content_bytes:,} bytes, {info.num_sites} sites")
    finally:
        server.close()


if __name__ == "__main__":
    main()
