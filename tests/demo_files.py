"""Where the demo of the checkout lies, for the tests that use it."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = ROOT / "demo" / "base"
STORE = ROOT / "adapters_store"
ADAPTERS = ("pirate-lora", "shout-rslora", "poet-dora", "news-vera", "robot-ia3")
INSTALLED = tuple(sorted(path.parent.name for path in STORE.glob("*/current.json")))  # these and more
