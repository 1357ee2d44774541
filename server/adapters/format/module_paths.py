"""Names of modules in checkpoints, and the site that each of them means in this base.

Owns the spelling of keys over several generations of trainers and the rule by which a module path finds its site.
Knows nothing about files, tensors or methods.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

from server.ground.errors import AdapterRejected
from server.model.site import Site

# Put in front of a key by PEFT, torch.nn.DataParallel, torch.compile and FSDP.
_PREFIXES = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
# Put inside a key by torch.compile, FSDP and activation checkpointing, at any depth.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Containers that come and go in front of the same module: with or without a head (`layers` / `model.layers`),
# transformers 4 and 5 (`language_model.model.layers` / `model.language_model.layers`).
_CONTAINERS = {"model", "language_model", "text_model", "transformer", "base_model"}
_ADAPTER_NAME = "default"
_LAYER = re.compile(
    r"(?:.*?\.)?[^.]+\.\d+(?=\.)"
)  # up to the first number: experts inside of a layer have numbers, too


def canonical_key(name: str) -> str:
    """`name` without wrapper prefixes and without PEFT's default adapter name.

    `base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` -> `model.layers.0.mlp.up_proj.lora_A.weight`;
    `base_model.vera_A` -> `vera_A`.
    """
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name[len(prefix) :]
    parts = [part for part in name.removeprefix("base_model.").split(".") if part not in _WRAPPERS]
    # `lora_A.default.weight`, `vera_lambda_b.default`: the adapter's name is last, or last but one.
    for place in (-1, -2):
        if len(parts) > -place and parts[place] == _ADAPTER_NAME:
            del parts[place]
            break
    return ".".join(parts)


class SiteFinder:
    """Finds the site that a module path of a checkpoint means.

    1. The site of exactly that path.
    2. Else the one site that has the same path once the containers in front (`model`, `language_model`, `text_model`,
       `transformer`, `base_model`) are taken off both.
    3. Else the one site whose path ends in the given path, if what stands before it holds no layer number.

    Two candidates, or none, is an error: nothing is guessed, and no key is passed over.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._exact = dict(sites)
        self._bare: defaultdict[str, list[Site]] = defaultdict(list)
        self._by_last: defaultdict[str, list[Site]] = defaultdict(list)
        for path, site in sites.items():
            self._bare[_without_containers(path)].append(site)
            self._by_last[path.rpartition(".")[2]].append(site)

    def find(self, module: str, name: str) -> Site:
        """The site for a module path; `name` is the key as the file spells it, for the message.

        Raises AdapterRejected if there is no such site, or more than one.
        """
        if module in self._exact:
            return self._exact[module]
        found = self._bare.get(_without_containers(module), []) or self._by_suffix(module)
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(sorted(site.path for site in found)[:4])
            raise AdapterRejected(f"{name}: the module {module} may mean {paths}. Save the keys with their full paths.")
        raise AdapterRejected(
            f"{name}: the base has no module {module} that an adapter can edit. "
            "Was the adapter trained on another model, or on a module that is not served?"
        )

    def _by_suffix(self, module: str) -> list[Site]:
        candidates = self._by_last.get(module.rpartition(".")[2], [])
        return [site for site in candidates if _ends_in(site.path, module)]


def layer_of(path: str) -> str | None:
    """The path of the decoder layer that a module lies in (`model.layers.3`); None for an embedding or a head."""
    found = _LAYER.match(path)
    return found.group() if found else None


def _without_containers(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _CONTAINERS:
        del parts[0]
    return ".".join(parts)


def _ends_in(path: str, module: str) -> bool:
    if not path.endswith("." + module):
        return False
    before = path[: -len(module) - 1]
    return not any(part.isdigit() for part in before.split("."))
