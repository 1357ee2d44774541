"""How several changes of one tensor become one: weighted sums, TIES and DARE.

Owns the arithmetic of the strategies, on dense changes of any shape. Knows nothing about adapters, ranks or files.

TIES: Yadav et al. 2023, arXiv:2306.01708. DARE: Yu et al. 2023, arXiv:2311.03099. In what the papers leave open (a
weight for each input, where it enters, the sign of a tie) these are PEFT's `*_svd` combinations, number for number.
PEFT's combinations without `_svd` do the same to A and to B on their own, whose product is another change.
"""

from collections.abc import Iterable, Sequence

import torch

from server.adapters.merging.recipe import Recipe


def combine(
    changes: Iterable[torch.Tensor], weights: Sequence[float], recipe: Recipe, generator: torch.Generator
) -> torch.Tensor:
    """One float32 tensor from changes of one shape, each taken when it is needed and held no longer than that.

    `generator` (on the CPU) is drawn from by DARE alone.
    """
    if recipe.strategy.is_sum:
        return weighted_sum(changes, weights)
    assert recipe.density is not None
    density = recipe.density
    if recipe.strategy.is_drawn:
        kept = (drop_at_random(change, density, generator) for change in changes)
    else:
        kept = (keep_largest(change, density) for change in changes)
    if not recipe.strategy.elects_signs:
        return weighted_sum(kept, weights)
    assert recipe.majority_sign is not None
    return mean_of_majority(list(kept), weights, recipe.majority_sign)


def weighted_sum(changes: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Of at least one."""
    pairs = zip(changes, weights, strict=True)
    first, weight = next(pairs)
    total = first * weight
    for change, weight in pairs:
        total.add_(change, alpha=weight)
    return total


def keep_largest(change: torch.Tensor, density: float) -> torch.Tensor:
    """The largest numbers by size, `density` of all (at least one), the others zero: TIES' trimming."""
    num_kept = max(1, int(density * change.numel()))
    if num_kept == change.numel():
        return change
    flat = change.reshape(-1)
    kept = torch.zeros_like(flat)
    places = torch.topk(flat.abs(), num_kept, sorted=False).indices
    kept[places] = flat[places]
    return kept.view_as(change)


def drop_at_random(change: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Each number kept with the probability `density` and divided by it, else zero: DARE's drop and rescale.

    Drawn on the CPU, so that a seed means the same numbers on every device.
    """
    if density == 1:
        return change
    mask = torch.bernoulli(torch.full(change.shape, density), generator=generator)
    return change * mask.to(change.device) / density


def mean_of_majority(changes: Sequence[torch.Tensor], weights: Sequence[float], majority_sign: str) -> torch.Tensor:
    """Per number, the mean of the weighted changes that have the elected sign: TIES' election and disjoint merge.

    The sign is elected before the weights are applied, by the sum of the numbers ("total") or of their signs
    ("frequency"); a tie is positive. An input that has another sign there, or a zero, neither adds nor counts.
    """
    votes = torch.zeros_like(changes[0])
    for change in changes:
        votes.add_(change if majority_sign == "total" else change.sign())
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(votes), votes.zero_()
    for change, weight in zip(changes, weights, strict=True):
        agrees = change.sign() == elected
        total.add_(change * agrees, alpha=weight)
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))
