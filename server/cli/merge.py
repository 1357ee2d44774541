"""`graft merge`: several adapters made into one, in a folder or under a name of the store.

Owns the command's flags and what it prints. Knows nothing about tensors: the merging is `adapters.merging`'s, which is
imported when the command runs, because it brings torch.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from server.adapters.merging.recipe import MAJORITY_SIGNS, Ingredient, Strategy
from server.adapters.store.folder_store import check_name, folder_digest
from server.adapters.store.open_store import open_store
from server.adapters.store.presence import is_somebody_present, nobody_present
from server.cli.adapters import _subject
from server.cli.command import Command, quiet_registry, say, settings_of
from server.cli.flags import add_some_settings
from server.cli.progress import ProgressBar
from server.ground.config import Settings
from server.ground.errors import BadRequest

if TYPE_CHECKING:
    from server.adapters.merging.merge import MergeBase, Merged

_SETTINGS = (
    "store", "store_cache", "store_cache_bytes", "store_quota", "store_reserve", "config",
    "model", "quantize", "dtype", "device", "served_model_name", "strict_base", "adapter_memory",
    "host_memory", "max_upload_bytes", "keep_versions",
)  # fmt: skip
_LOSSY = 0.05  # a relative error that is worth a warning
_NAME = "merged"


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder to write, which must be new")
    parser.add_argument(
        "--adapter", dest="ingredients", action="append", required=True, metavar="NAME=WEIGHT",
        help="an adapter that enters, by name, name@version or folder, with its weight (default: 1); repeat it",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", default=str(Strategy.LINEAR), metavar="{" + ",".join(Strategy) + "}",
        help="how the changes become one (default: linear)",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=int, metavar="N", help="the largest rank of the result (default: linear and cat are exact)"
    )
    parser.add_argument(
        "--density", type=float, metavar="D", help="ties, dare: the share of numbers that are kept (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="dare: what its random choice is drawn from (default: 0)")
    parser.add_argument(
        "--majority-sign", metavar="{" + ",".join(MAJORITY_SIGNS) + "}",
        help="ties: how a number's sign is elected, by the inputs' sum or by their count (default: total)",
    )  # fmt: skip
    parser.add_argument("--name", metavar="NEW", help="put the result into the store under this name")
    parser.add_argument("--replace", action="store_true", help="with --name: make it a new version of a name in use")
    parser.add_argument(
        "--load-base", action="store_true",
        help="load the base's weights, which DoRA, IA3 and trained biases need (default: its config alone is read)",
    )  # fmt: skip
    add_some_settings(parser, _SETTINGS)


def _merge(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    given = vars(arguments)
    settings = settings_of(_SETTINGS, arguments)
    out, name = Path(given["out"]).expanduser() if "out" in given else None, given.get("name")
    if out is None and name is None:
        raise BadRequest("Say where the result shall go: a folder OUT, or --name NEW for the store, or both.")
    if name is not None:
        check_name(name)
    elif "replace" in given:
        raise BadRequest("--replace goes with --name: give the name in the store that gets a new version.")
    with TemporaryDirectory(prefix="graft-merge-") if out is None else nullcontext() as scratch, quiet_registry():
        target = out if out is not None else Path(scratch or "") / _NAME
        merged = _made(given, settings, target)
        _report(merged, target if out is not None else None)
        if name is not None:
            _store(settings, target, name, replaces="replace" in given)
    return 0


def _made(given: dict[str, object], settings: Settings, target: Path) -> "Merged":
    # Imported here: they bring torch.
    from server.adapters.merging.merge import MAX_RANK, merge
    from server.adapters.merging.recipe import recipe_for
    from server.sizing import base_options

    flags = {name: given[name] for name in ("rank", "density", "seed", "majority_sign") if name in given}
    recipe = recipe_for(str(given["strategy"]), max_rank=MAX_RANK, **flags)  # type: ignore[arg-type]
    named = given["ingredients"]
    assert isinstance(named, list)
    ingredients = [_ingredient(text, settings) for text in named]
    base = _base(settings, loads_weights="load_base" in given)
    device = base_options(settings).device
    return merge(ingredients, recipe, base, target, device=device, progress=ProgressBar("merging"))


def _ingredient(text: str, settings: Settings) -> Ingredient:
    """From NAME, NAME@VERSION or a folder, each with =WEIGHT or without."""
    subject, equals, number = text.rpartition("=")
    if not equals:
        subject, number = text, "1"
    try:
        weight = float(number)
    except ValueError:
        raise BadRequest(f"--adapter {text}: {number!r} is no weight. Write NAME=WEIGHT, such as legal=0.5.") from None
    folder, version = _subject(subject, settings)
    name = version.name if version is not None else folder.resolve().name
    return Ingredient(name, folder_digest(folder).digest, folder, weight)


def _base(settings: Settings, *, loads_weights: bool) -> "MergeBase":
    from server.adapters.merging.merge import MergeBase
    from server.model.dense import DenseBase
    from server.model.outline import outline
    from server.sizing import base_options

    options = base_options(settings)
    if not loads_weights:
        known = outline(options)
        return MergeBase(known.name, known.fingerprint, known.sites)
    base = DenseBase.load(options)
    sites = base.sites
    return MergeBase(base.name, base.fingerprint, sites, lambda site: sites[site.path].weight())


def _report(merged: "Merged", out: Path | None) -> None:
    error = "exact" if merged.relative_error == 0 else f"relative error {merged.relative_error:.2g}"
    where = f"{out}: " if out is not None else ""
    sys.stdout.write(f"{where}{merged.num_sites} sites, rank {merged.rank}, {error}\n")
    for warning in merged.warnings:
        say(f"warning: {warning}")
    if merged.relative_error > _LOSSY:
        say(
            f"warning: of the merged change {merged.relative_error:.0%} was lost by cutting its rank (at worst "
            f"{merged.worst_error:.0%}, at {merged.worst_site}): a larger --rank keeps more"
        )


def _store(settings: Settings, folder: Path, name: str, *, replaces: bool) -> None:
    """As `graft adapters add` does, with the same refusals."""
    from server.cli.rehearsal import Rehearsal

    store = open_store(settings, create=True)
    remedy = "it would go on with the old version; stop it first, or merge into another name."
    with nobody_present(store.root, remedy) if replaces else nullcontext():
        registered = Rehearsal(settings).register(store, folder, name, replace=replaces)
    told = "added" if registered.is_new else "is there already"
    sys.stdout.write(f"{registered.info.name} {registered.info.digest[:12]} {told}\n")
    if is_somebody_present(store.root):
        say("a server is running on this store: it serves this adapter when it is started again")


MERGE = Command("merge several adapters into one", _add_flags, _merge)
