"""`graft drop`: the layers of an adapter that matter on given prompts, as a smaller adapter.

Owns the command's flags and what it prints. Knows nothing about tensors: the work is `server.drop`'s, which is imported
when the command runs, because it brings torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.adapters.store.folder_store import folder_digest
from server.cli.adapters import _subject, shown_size
from server.cli.bars import Bars, check_plot, draw_bars
from server.cli.command import Command, quiet_registry, say, settings_of
from server.cli.flag_values import count, share
from server.cli.flags import add_some_settings
from server.cli.table import columns
from server.drift.prompts import read_prompts

if TYPE_CHECKING:
    from server.drop.drop import Drift, Dropped

_SETTINGS = (
    "store", "store_cache", "store_cache_bytes", "config", "model", "quantize", "dtype", "device", "adapter_memory",
    "host_memory",
)  # fmt: skip


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a name in the store, name@version, or a folder")
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE",
        help='what to measure on: one prompt per line, or JSONL with {"prompt": ...} or {"messages": [...]}',
    )  # fmt: skip
    kept = parser.add_mutually_exclusive_group(required=True)
    kept.add_argument("--keep", type=share, metavar="SHARE", help="keep this share of the layers, rounded up")
    kept.add_argument(
        "--energy", type=share, metavar="SHARE",
        help="keep the fewest layers that have together this share of what the adapter adds",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write, which must be new")
    parser.add_argument("--base", dest="model", metavar="BASE", help="the same as --model")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what each layer adds, as .png, .svg or .pdf")
    parser.add_argument(
        "--max-tokens-per-prompt", type=count, metavar="N", help="read the first N tokens of each prompt"
    )
    add_some_settings(parser, _SETTINGS)


def _drop(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    given = vars(arguments)
    settings = settings_of(_SETTINGS, arguments)
    out, plot = given["out"].expanduser(), given.get("plot")
    if plot is not None:
        check_plot(plot)
    prompts = read_prompts(given["prompts"])
    folder, version = _subject(given["adapter"], settings)
    # Imported here: they bring torch.
    from server.drop.drop import DropRequest, drop
    from server.drop.importance import kept_energy, kept_share

    told: dict[str, object] = {
        "adapter": version.name if version is not None else folder.resolve().name,
        "version": folder_digest(folder).digest,
        "prompts_sha256": prompts.sha256,
        **{name: given[name] for name in ("keep", "energy") if name in given},
    }
    num_kept = kept_share(given["keep"]) if "keep" in given else kept_energy(given["energy"])
    request = DropRequest(settings, folder, prompts, num_kept, given.get("max_tokens_per_prompt"), told)
    with quiet_registry():
        dropped = drop(request, out, say)
    _report(dropped, out)
    if plot is not None:
        draw_bars(_bars(dropped, str(told["adapter"])), plot)
        say(f"drawn in {plot}")
    return 0


def _report(dropped: "Dropped", out: Path) -> None:
    rows = [
        (layer.path, str(len(layer.sites)), f"{layer.output:.4g}", f"{layer.share:.1%}", "yes" if layer.is_kept else "")
        for layer in dropped.layers
    ]
    sys.stdout.write(columns(("LAYER", "SITES", "ADDED", "SHARE", "KEPT"), rows, right=(1, 2, 3)))
    num_kept = sum(layer.is_kept for layer in dropped.layers)
    of_all = sum(layer.share for layer in dropped.layers if layer.is_kept)
    before, after = dropped.weights_bytes
    sys.stdout.write(
        f"{out}: {dropped.method}, {num_kept} of {len(dropped.layers)} layers with {of_all:.1%} of what it adds\n"
        f"weights: {shown_size(before)} before, {shown_size(after)} after ({after / before:.0%}); parameters: "
        f"{dropped.num_parameters[0]:,} before, {dropped.num_parameters[1]:,} after\n"
        f"{_drift('the smaller adapter', dropped.smaller)}\n{_drift('no adapter', dropped.none)}\n"
    )
    for warning in dropped.warnings:
        say(f"warning: {warning}")
    if dropped.outside:
        say(f"kept, because they lie in no layer: {', '.join(dropped.outside)}")
    if num_kept == len(dropped.layers):
        say("no layer was dropped: a smaller --keep or --energy drops some")
    if dropped.num_truncated:
        say(f"{dropped.num_truncated} prompts were cut at --max-tokens-per-prompt")


def _drift(name: str, drift: "Drift") -> str:
    figures = drift.figures
    kl = "no finite KL" if figures.mean_kl is None else f"mean KL {figures.mean_kl:.3g} nats per token"
    worst = "" if figures.max_kl is None else f" (at most {figures.max_kl:.3g})"
    return (
        f"drift of {name} from the whole one: {kl}{worst}, largest logit difference {drift.max_logit_difference:.3g}, "
        f"same greedy token at {figures.agreement:.1%} of {figures.num_tokens} positions"
    )


def _bars(dropped: "Dropped", name: str) -> Bars:
    return Bars(
        title=f"{name}: what each layer adds",
        axis="mean squared norm of what the adapter adds to its sites' outputs",
        labels=[layer.path for layer in dropped.layers],
        values=[layer.output for layer in dropped.layers],
        is_strong=[layer.is_kept for layer in dropped.layers],
    )


DROP = Command("keep an adapter's most important layers: a smaller adapter", _add_flags, _drop)
