"""The tables of docs/architectures.md, made from the list of families and from their tiny models as they are served.

`python -m tests.model.architectures_page` writes them into the page; `test_architectures.py` holds the page to them.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from server.model.architectures import FAMILIES
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import PRODUCTS
from tests.models import ARCHITECTURES, save_model

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- families: written by tests/model/architectures_page.py -->\n", "<!-- end of families -->\n"


def families_table(folder_of: Callable[[str], Path]) -> str:
    """A row for every family, with the sites that an adapter finds in its tiny model."""
    lines = ["| family | `model_type` | special | sites, by shared input |", "|---|---|---|---|"]
    for architecture in ARCHITECTURES:
        base = Base.load(BaseOptions(str(folder_of(architecture)), Quantization.NONE, torch.float32))
        family = next(family for family in FAMILIES if family.model_type == base.config.model_type)
        lines.append(f"| {family.name} | `{family.model_type}` | {family.special} | {_sites(base)} |")
    return "\n".join(lines) + "\n"


def table_in(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0]


def _sites(base: Base) -> str:
    """The last names of the sites, those of one group together, each group once for all layers that have it."""
    products = [group.sites for group in base.sites.groups if group.sites[0].kind in PRODUCTS]
    groups = [" ".join(f"`{site.path.rpartition('.')[2]}`" for site in sites) for sites in products]
    return " · ".join(_once(groups))


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        table = families_table(lambda architecture: save_model(architecture, Path(scratch) / architecture))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
