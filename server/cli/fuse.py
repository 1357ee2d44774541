"""`graft fuse`: an adapter fused into its base, as a checkpoint that can be served alone.

Owns the command's flags and what it prints. Knows nothing about tensors: the fusing is `adapters.fuse`'s, which is
imported when the command runs, because it brings torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.adapters.store.folder_store import folder_digest
from server.cli.adapters import _subject
from server.cli.command import Command, say, settings_of
from server.cli.flags import add_some_settings
from server.cli.progress import ProgressBar

if TYPE_CHECKING:
    from server.adapters.merging.fuse import Fused, Rounding
    from server.model.pretrained import BaseOptions

_SETTINGS = ("store", "store_cache", "store_cache_bytes", "dtype", "config")
_ENOUGH_KEPT = 0.9
_MUCH_NOISE = 1.0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="local folder or hub id of the base")
    parser.add_argument("adapter", metavar="ADAPTER", help="a name in the store, name@version, or a folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must be new")
    parser.add_argument(
        "--from", dest="values", choices=["none", "nf4", "int8"], default="none",
        help="fuse into the values that the base has once it is quantized so; a checkpoint that is quantized already "
        "is dequantized in any case (default: none, the checkpoint's own values)",
    )  # fmt: skip
    add_some_settings(parser, _SETTINGS)


def _fuse(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    given = vars(arguments)
    settings = settings_of(_SETTINGS, arguments)
    # Imported here: it brings torch, and the libraries that were told to be quiet.
    from server.adapters.merging.fuse import fuse

    folder, version = _subject(given["adapter"], settings)
    recipe = {
        "base": given["base"],
        "values": given["values"],
        "adapter": version.name if version is not None else folder.resolve().name,
        "version": folder_digest(folder).digest,
    }
    out = Path(given["out"]).expanduser()
    options = _options(given["base"], given["values"], settings.dtype)
    fused = fuse(options, folder, out, recipe=recipe, progress=ProgressBar("fusing"))
    _report(fused, out)
    return 0


def _options(model: str, values: str, dtype: str) -> "BaseOptions":
    """Everything on the CPU, where a model that is to be saved has to be anyway."""
    import torch

    from server.model.dense import stored_dtype
    from server.model.pretrained import BaseOptions
    from server.model.quantize import Quantization

    known: Any = getattr(torch, dtype, None)
    return BaseOptions(model, Quantization(values), known or stored_dtype(model), torch.device("cpu"))


def _report(fused: "Fused", out: Path) -> None:
    name = str(fused.dtype).removeprefix("torch.")
    sys.stdout.write(
        f"{out}: {fused.method} fused at {fused.num_sites} sites, {name}\n"
        f"on random tokens, against base and adapter: relative error {fused.relative_error:.1e}, "
        f"KL {fused.divergence:.1e} nats\n"
        f"{_figures(name, fused.saved)}\n"
    )
    if fused.nf4 is not None:
        sys.stdout.write(f"{_figures('NF4', fused.nf4)}\n")
    for warning in fused.warnings:
        say(f"warning: {warning}")
    if fused.is_untied:
        say("the embedding and the head shared one table; the adapter changes it, so the checkpoint has two")
    if fused.saved.whole.kept < _ENOUGH_KEPT or fused.saved.whole.noise > _MUCH_NOISE:
        say(f"warning: {name} rounds the adapter off: use --dtype float32")
    if fused.nf4 is not None:
        _warn_of_nf4(fused.nf4.whole.kept, fused.nf4.whole.noise)


def _warn_of_nf4(kept: float, noise: float) -> None:
    remedy = "serve it with --quantize none or int8, or serve the adapter beside its base"
    if kept < _ENOUGH_KEPT:
        say(f"warning: quantizing the checkpoint to NF4 again would round {1 - kept:.0%} of the adapter away: {remedy}")
    elif noise > _MUCH_NOISE:
        say(
            f"warning: quantizing the checkpoint to NF4 again moves its weights by {noise:.2g} times the adapter's own "
            f"change: if the answers drift, {remedy}"
        )


def _figures(name: str, rounding: "Rounding") -> str:
    worst = f" (worst: {rounding.worst.kept:.1%} at {rounding.worst_site})" if rounding.worst_site else ""
    whole = rounding.whole
    return f"stored as {name}: {whole.kept:.1%} of the change kept{worst}, noise {whole.noise:.2g} times its size"


FUSE = Command("fuse an adapter into its base: a checkpoint of its own", _add_flags, _fuse)
