"""Rebuilds the whole demo: tokenizer and base, the adapters, the check that their voices differ, the store.

Owns the order of the steps. Run `python -m demo.build` from the root of the repository; `demo/README.md` says how long
it takes.
"""

import argparse
import time

from rich.console import Console

from demo import check_styles, install, train_adapters, train_base


def main() -> None:
    options = argparse.ArgumentParser(description="Rebuild the demo base, its adapters and check them.")
    options.add_argument("--threads", type=int, default=2)
    threads = ["--threads", str(options.parse_args().threads)]
    console, started = Console(), time.perf_counter()
    steps = {
        "base": train_base.main,
        "adapters": train_adapters.main,
        "check": check_styles.main,
        "install": lambda _: install.main(),
    }
    for title, step in steps.items():
        console.rule(title)
        step(threads)
        console.print(
            f"{title} done, {(time.perf_counter() - started) / 60:.1f} minutes since the start", highlight=False
        )


if __name__ == "__main__":
    main()
