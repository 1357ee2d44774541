"""docs/openapi.json: the document of a server that serves a tiny base. `python -m tests.api.openapi_file` writes it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from server.assemble import assemble
from server.ground.config import Settings
from tests.models import save_model

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"


def text(document: dict[str, Any]) -> str:
    """As it is committed: one line per value, so that a change is seen as what it is."""
    return json.dumps(document, indent=0, ensure_ascii=False) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base, store = Path(scratch, "base"), Path(scratch, "store")
        base.mkdir()
        save_model("llama", base)
        server = assemble(Settings(model=str(base), store=store, quantize="none", dtype="float32", device="cpu"))
        try:
            FILE.write_text(text(server.app.openapi()), encoding="utf-8")
        finally:
            server.close()


if __name__ == "__main__":
    main()
