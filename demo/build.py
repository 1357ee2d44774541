"""Rebuilds the demo: tokenizer and base, its first five adapters or all of them, the check of their voices, the store.

Owns the order of the steps. Run `python -m demo.build` from the root of the repository; `demo/README.md` says how long
it takes.
"""

import argparse
import time

from rich.console import Console

from demo import check_styles, install, train_adapters, train_base

FIRST = ("pirate-lora", "shout-rslora", "poet-dora", "news-vera", "robot-ia3")  # whose voices the base has heard


def main() -> None:
    options = argparse.ArgumentParser(description="Rebuild the demo base, its adapters and check them.")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--all", action="store_true", help="every adapter, not the first five alone")
    chosen = options.parse_args()
    threads, names = ["--threads", str(chosen.threads)], [] if chosen.all else list(FIRST)
    console, started = Console(), time.perf_counter()
    steps = {
        "base": lambda: train_base.main(threads),
        "adapters": lambda: train_adapters.main([*names, *threads]),
        "check": lambda: check_styles.main([*([check_styles.BARE] if names else []), *names, *threads]),
        "install": lambda: install.main(names),
    }
    for title, step in steps.items():
        console.rule(title)
        step()
        console.print(
            f"{title} done, {(time.perf_counter() - started) / 60:.1f} minutes since the start", highlight=False
        )


if __name__ == "__main__":
    main()
