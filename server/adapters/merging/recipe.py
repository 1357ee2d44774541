"""What a merge is asked to do: its inputs, their weights, the strategy and its parameters.

Owns which parameters belong to which strategy, their defaults and their limits. Knows nothing about tensors or bases;
no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from server.ground.errors import BadRequest

MAX_INPUTS = 64
_DEFAULT_DENSITY = 0.5
_MAX_SEED = (1 << 63) - 1
MAJORITY_SIGNS = ("total", "frequency")


class Strategy(StrEnum):
    LINEAR = "linear"
    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"

    @property
    def is_sum(self) -> bool:
        """Whether the result is the weighted sum of the changes, which concatenation gives without loss."""
        return self in (Strategy.LINEAR, Strategy.CAT, Strategy.SVD)

    @property
    def is_drawn(self) -> bool:
        return self in (Strategy.DARE_LINEAR, Strategy.DARE_TIES)

    @property
    def elects_signs(self) -> bool:
        return self in (Strategy.TIES, Strategy.DARE_TIES)


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One adapter that enters a merge: a folder, the name and version that it is known by, and its weight."""

    name: str
    version: str  # 64 hex digits
    folder: Path
    weight: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """A strategy with its parameters; make it with `recipe_for`. None where the strategy has no such parameter."""

    strategy: Strategy
    rank: int | None = None  # None: what is exact, or else the largest rank of the inputs
    density: float | None = None
    seed: int | None = None
    majority_sign: str | None = None

    def as_json(self, ingredients: Sequence[Ingredient]) -> dict[str, Any]:
        """The recipe as the manifest keeps it; what the strategy has no use for is left out."""
        inputs = [{"name": item.name, "version": item.version, "weight": item.weight} for item in ingredients]
        parameters = {
            "rank": self.rank,
            "density": self.density,
            "seed": self.seed,
            "majority_sign": self.majority_sign,
        }
        given = {name: value for name, value in parameters.items() if value is not None}
        return {"strategy": str(self.strategy), "inputs": inputs, **given}


def recipe_for(
    strategy: str,
    *,
    max_rank: int,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    majority_sign: str | None = None,
) -> Recipe:
    """The recipe with its defaults filled in: density 0.5, seed 0, majority sign "total".

    Raises BadRequest, naming the parameter, for one out of its range and for one that the strategy has no use for.
    """
    try:
        chosen = Strategy(strategy)
    except ValueError:
        known = ", ".join(Strategy)
        raise BadRequest(
            f"strategy: {strategy!r:.40} is none of {known}. Choose one of them.", param="strategy"
        ) from None
    _refuse_unused(chosen, rank=rank, density=density, seed=seed, majority_sign=majority_sign)
    _check_rank(rank, max_rank)
    _check_density(density)
    if seed is not None and not (type(seed) is int and 0 <= seed <= _MAX_SEED):
        raise BadRequest(f"seed: {seed!r:.40} must be a whole number from 0 to {_MAX_SEED}.", param="seed")
    if majority_sign is not None and majority_sign not in MAJORITY_SIGNS:
        raise BadRequest(
            f"majority_sign: {majority_sign!r:.40} must be one of {', '.join(MAJORITY_SIGNS)}.", param="majority_sign"
        )
    return Recipe(
        strategy=chosen,
        rank=rank,
        density=None if chosen.is_sum else _DEFAULT_DENSITY if density is None else density,
        seed=(seed or 0) if chosen.is_drawn else None,
        majority_sign=(majority_sign or "total") if chosen.elects_signs else None,
    )


def check_ingredients(ingredients: Sequence[Ingredient]) -> None:
    """Raises BadRequest for no input or too many, for a weight of zero or not finite, and for one content twice."""
    if not 1 <= len(ingredients) <= MAX_INPUTS:
        raise BadRequest(
            f"adapters: a merge takes 1 to {MAX_INPUTS} adapters, not {len(ingredients)}.", param="adapters"
        )
    seen: dict[str, str] = {}
    for item in ingredients:
        if not math.isfinite(item.weight) or abs(item.weight) > 1e6:
            raise BadRequest(
                f"adapters: {item.weight} of {item.name!r} must be a finite number of at most 1e6.", param="adapters"
            )
        if item.weight == 0:
            raise BadRequest(
                f"adapters: {item.name!r} has the weight 0, which leaves it out: take it off the list.",
                param="adapters",
            )
        if item.version in seen:
            raise BadRequest(
                f"adapters: {seen[item.version]!r} and {item.name!r} are the same content "
                f"({item.version[:12]}): give it once, with the weight that it shall have.",
                param="adapters",
            )
        seen[item.version] = item.name


def _refuse_unused(strategy: Strategy, **given: object) -> None:
    unused = {
        "rank": (strategy is Strategy.CAT, "it keeps the rank of every input; for a smaller one use linear or svd"),
        "density": (strategy.is_sum, "only ties, dare_linear and dare_ties prune"),
        "seed": (not strategy.is_drawn, "only dare_linear and dare_ties draw at random"),
        "majority_sign": (not strategy.elects_signs, "only ties and dare_ties elect a sign"),
    }
    for name, (is_unused, reason) in unused.items():
        if is_unused and given[name] is not None:
            raise BadRequest(f"{name}: {strategy} has no use for it ({reason}). Leave it out.", param=name)


def _check_rank(rank: int | None, max_rank: int) -> None:
    if rank is not None and not (type(rank) is int and 1 <= rank <= max_rank):
        raise BadRequest(f"rank: {rank!r:.40} must be a whole number from 1 to {max_rank}.", param="rank")


def _check_density(density: float | None) -> None:
    # The second half is true of no NaN.
    if density is not None and not (type(density) in (int, float) and 0 < density <= 1):
        raise BadRequest(
            f"density: {density!r:.40} must be above 0 and at most 1, the share of numbers that are kept.",
            param="density",
        )
