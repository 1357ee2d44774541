"""Where the demo of the checkout lies, for the tests that use it."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = ROOT / "demo" / "base"
STORE = ROOT / "adapters_store"
ADAPTERS = ("pirate-lora", "shout-rslora", "poet-dora", "news-vera", "robot-ia3")
INSTALLED = tuple(sorted(path.parent.name for path in STORE.glob("*/current.json")))  # these and more


def store_of_five(folder: Path) -> Path:
    """A new store at `folder` with ADAPTERS alone."""
    for name in ADAPTERS:
        shutil.copytree(STORE / name, folder / name)
    return folder
