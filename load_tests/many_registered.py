"""`python -m load_tests.many_registered`: what thousands of registered adapters cost that nobody asks for.

Fills a store with small LoRA adapters of the demo's base, all different, and measures what grows with their number: the
start, the lists, a scrape, a lookup, the refusal of an unknown name, and memory. Owns this measurement and its report.
Lookups and memory are measured in this process, HTTP on a server of its own.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from load_tests.many_adapters import CONFIG_FILE, WEIGHTS_FILE
from load_tests.own_server import NoServer, own_server
from load_tests.report import percentile
from load_tests.soak import BASE
from server.adapters.registry import Registry
from server.adapters.store.folder_store import Record, Store
from server.assemble import assemble
from server.bench import machine
from server.ground.config import load
from server.ground.errors import AdapterNotFound

SCHEMA = "graftserve-many-registered/1"
RANK = 4
_NUM_WARM = 100  # adapters that are on the host while lookups are measured: those of the others would begin loads
_MODULES = ("q_proj", "v_proj")


def fill(store: Store, count: int, *, own_rows: bool = False) -> None:
    """`count` adapters named many-00000 and so on, by the store's own code; each differs in one number.

    So the tiers, where equal rows lie once, take thousands of them in the room of a few. With `own_rows` each has rows
    that no other has, and takes what an adapter of somebody else takes.
    """
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    tensors = dict(_tensors(config))
    first = next(iter(tensors.values()))
    asked = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(_MODULES), "bias": "none"}
    num_sites, num_parameters = len(tensors) // 2, sum(tensor.numel() for tensor in tensors.values())
    for index in range(count):
        if own_rows:
            tensors = dict(_tensors(config, seed=index))
        else:
            first.view(-1)[0] = index
        record = Record(int(time.time()), "lora", RANK, num_parameters, num_sites)
        with store.incoming() as incoming:
            for name, data in ((CONFIG_FILE, json.dumps(asked).encode()), (WEIGHTS_FILE, save(tensors))):
                with incoming.open_file(name) as file:
                    file.write(data)
            store.put(incoming, f"many-{index:05d}", record, replace=False)


def _tensors(config: dict[str, Any], seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """A LoRA of RANK on q and v of every layer, float32, so that thousands of contents are different numbers."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    widths = {"q_proj": head * heads, "v_proj": head * config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config["num_hidden_layers"]):
        for module in _MODULES:
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            yield f"{key}.lora_A.weight", torch.randn(RANK, hidden, generator=generator)
            yield f"{key}.lora_B.weight", torch.randn(widths[module], RANK, generator=generator)


def timed(act: Callable[..., object], num_times: int, *arguments: object) -> dict[str, float | None]:
    """Milliseconds of act(*arguments): the median and the 99th percentile of several calls."""
    taken = []
    for _ in range(num_times):
        begun = time.perf_counter()
        act(*arguments)
        taken.append(1000 * (time.perf_counter() - begun))
    return {"p50_ms": statistics.median(taken), "p99_ms": percentile(taken, 99)}


def in_process(store: Path, num_lookups: int) -> dict[str, Any]:
    """The start of the registry, its memory, and lookups, on a whole server in this process."""
    flags = {"model": str(BASE), "device": "cpu", "quantize": "none", "kv_memory": "8MiB", "adapter_memory": "8MiB"}
    with tempfile.TemporaryDirectory() as empty:
        assemble(load(flags | {"store": empty})).close()  # what is imported and allocated once
    before = _resident_bytes()
    begun = time.perf_counter()
    opened = Store(store, create=False)
    open_s = time.perf_counter() - begun
    begun = time.perf_counter()
    names = [stored.name for stored in opened.scan()]
    scan_s = time.perf_counter() - begun
    server = assemble(load(flags | {"store": str(store)}))
    try:
        memory_bytes = _resident_bytes() - before
        return {
            "store_open_s": open_s,
            "store_scan_s": scan_s,
            "registry_bytes_per_adapter": max(0, memory_bytes) // len(names),
            **_lookups(server.registry, names, num_lookups),
        }
    finally:
        server.close()


def _lookups(registry: Registry, names: Sequence[str], num_lookups: int) -> dict[str, Any]:
    dice = random.Random(0)
    warm = dice.sample(names, min(_NUM_WARM, len(names)))
    exact = [f"{name}@{registry.verify(name).digest[:12]}" for name in warm]

    def unknown() -> None:
        try:
            registry.lease("mony-00001")
        except AdapterNotFound:
            return
        raise AssertionError("there is such an adapter")

    return {
        "lease_and_release": timed(lambda: registry.lease(dice.choice(warm)).release(), num_lookups),
        "lease_and_release_by_version": timed(lambda: registry.lease(dice.choice(exact)).release(), num_lookups),
        "unknown_name": timed(unknown, 50),
        "list": timed(registry.list, 20),
        "stats": timed(registry.stats, 20),
    }


def over_http(store: Path, scratch: Path, num_times: int) -> dict[str, Any]:
    """The start of a server, and what its lists and a scrape cost a client. Raises NoServer."""
    flags = {"device": "cpu", "kv-memory": "8MiB", "adapter-memory": "8MiB", "log-level": "error"}
    begun = time.perf_counter()
    (scratch / "store").symlink_to(store)
    with own_server(BASE, scratch, flags) as server:
        start_s = time.perf_counter() - begun
        paths = ("/v1/adapters", "/v1/adapters?limit=100", "/v1/models", "/metrics", "/health")
        measured: dict[str, Any] = {"server_start_s": start_s}
        for path in paths:
            measured[path] = timed(_get, num_times, server.url + path) | {"bytes": len(_get(server.url + path))}
        measured["unknown adapter"] = timed(_get, num_times, f"{server.url}/v1/adapters/mony-00001")
        return measured


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=300) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as refused:
        return bytes(refused.read())


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.many_registered", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--adapters", type=int, default=5000, metavar="N", help="in the store (default: 5,000)")
    parser.add_argument("--lookups", type=int, default=20_000, metavar="N", help="measured")
    parser.add_argument("--times", type=int, default=15, metavar="N", help="each list is asked for")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the store is made (default: a new one)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        store = Path(folder) / "filled"
        begun = time.perf_counter()
        fill(Store(store, create=True), arguments.adapters)
        report = {"schema": SCHEMA, "machine": machine("cpu"), "num_adapters": arguments.adapters}
        report["fill_s"] = time.perf_counter() - begun
        try:
            report["http"] = over_http(store, Path(folder), arguments.times)
        except NoServer as error:
            print(f"many registered: {error}", file=sys.stderr)
            return 2
        report["in_process"] = in_process(store, arguments.lookups)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
