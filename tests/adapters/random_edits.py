"""Random adapters in the normal form: edits that no method needs all of, at every kind of product.

For tests of what applies edits, whatever method they come from.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from server.adapters.method import Edit, Lowered
from server.model.site import PRODUCTS, Site, SiteKind
from server.ops.site_ops import Tensors

VECTOR_FIELDS = ("mid_scale", "mid_shift", "in_scale", "up_scale", "out_scale", "out_shift")


def random_edit(site: Site, seed: int, rank: int, fields: Iterable[str] = ()) -> Edit:
    """An edit of this rank (0: no rows) with these vector fields, as strong as a trained one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # An embedding's input is one-hot, so its dot products need no damping.
    spread = 0.3 if site.kind is SiteKind.EMBEDDING else 0.3 / site.d_in**0.5
    widths = {"mid_scale": rank, "mid_shift": rank, "in_scale": site.d_in}
    vectors = {}
    for field in fields:
        vector = 0.2 * normal(widths.get(field, site.d_out))
        vectors[field] = vector if field.endswith("shift") else 1 + vector
    if not rank:
        return Edit(**vectors)
    return Edit(down=spread * normal(rank, site.d_in), up=normal(rank, site.d_out), **vectors)


def random_adapter(sites: Iterable[Site], seed: int, *, max_rank: int = 3, share: float = 0.7) -> Lowered:
    """Edits at about `share` of the sites, each of its own rank up to `max_rank` and with some of the fields."""
    generator = torch.Generator().manual_seed(seed)
    edits = {}
    for site in sites:
        if site.kind not in PRODUCTS:
            continue
        rank = int(torch.randint(0, max_rank + 1, (1,), generator=generator))
        chosen = torch.rand(len(VECTOR_FIELDS) + 1, generator=generator)
        fields = [f for f, p in zip(VECTOR_FIELDS, chosen[1:], strict=True) if p < 0.4 and (rank or "mid" not in f)]
        if site.kind is SiteKind.EMBEDDING and "in_scale" in fields:
            fields.remove("in_scale")
        if chosen[0] < share and (rank or fields):
            edits[site.path] = random_edit(site, seed * 1000 + site.index, rank, fields)
    return Lowered("random", max_rank, 1, edits)


def with_random_ops(adapter: Lowered, sites: Iterable[Site], seed: int) -> Lowered:
    """The same adapter with ops at every linear, also where it has no edit: each seed has another shape of them."""
    edits = dict(adapter.edits)
    for site in sites:
        if site.kind is SiteKind.LINEAR:
            ops = _random_ops(site, seed + site.index, 2 << seed % 2)
            edits[site.path] = replace(edits.get(site.path, Edit()), ops=ops)
    return replace(adapter, edits=edits)


def _random_ops(site: Site, seed: int, size: int) -> dict[str, Tensors]:
    """A turn of the input, one of the output, or a product beside the two, by the seed; of parts of this size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made: list[dict[str, Tensors]] = [
        {"block_rotation": {"blocks": torch.eye(size) + 0.1 * normal(site.d_in // size, size, size)}},
        {
            "kronecker": {
                "left": normal(size, size),
                "right": 0.1 / size * normal(site.d_out // size, site.d_in // size),
            }
        },
        {
            "pair_rotation": {
                "own": 1 + 0.1 * normal(site.d_out),
                "other": 0.1 * normal(site.d_out),
                "partners": torch.arange(float(site.d_out)).view(-1, 2, size // 2).flip(1).flatten(),
            }
        },
    ]
    return made[seed % 3] | made[(seed + 1) % 3]
