"""From positions to figures: what the report says of the base and of each adapter.

Owns the averages, and the sentences for what is beyond a limit. Knows nothing about models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from server.drift.divergence import TokenDrift
from server.drift.request import Limits

NUM_QUARTERS = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose figures they are; the base has neither name, version nor method."""

    name: str | None = None
    version: str | None = None  # digest
    method: str | None = None

    def __str__(self) -> str:
        return "the base" if self.name is None else self.name


@dataclass(frozen=True, slots=True)
class Quarter:
    """The positions of one quarter of every prompt. None where it has no position with a finite figure."""

    num_tokens: int
    mean_kl: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """The drift of the base or of one adapter; KL in nats per token. None: no position has a finite figure."""

    subject: Subject
    num_tokens: int  # positions compared: the last of a prompt too, which predicts the first token of the answer
    num_not_finite: int  # of these, with NaN logits or an infinite KL: outside of the KL figures, no agreement
    mean_kl: float | None
    median_kl: float | None
    p99_kl: float | None
    max_kl: float | None
    agreement: float  # share of positions
    num_scored_tokens: int  # tokens of the prompts that follow another
    reference_perplexity: float | None
    served_perplexity: float | None
    quarters: tuple[Quarter, ...]  # by position in the prompt, the first quarter first
    kl_of_base: float | None = None  # mean_kl over the base's own; None for the base, and where that is 0


def figures(subject: Subject, drift: TokenDrift, quarters: torch.Tensor) -> Figures:
    """The figures of one subject; `quarters` (positions,) says which quarter of its prompt each position is in."""
    is_finite = drift.kl.isfinite()
    kl = drift.kl[is_finite]
    agrees = drift.agrees & is_finite
    is_scored = ~drift.reference_nll.isnan() & ~drift.served_nll.isnan()
    by_quarter = [quarters == number for number in range(NUM_QUARTERS)]
    return Figures(
        subject=subject,
        num_tokens=len(drift.kl),
        num_not_finite=int((~is_finite).sum()),
        mean_kl=_mean(kl),
        median_kl=_quantile(kl, 0.5),
        p99_kl=_quantile(kl, 0.99),
        max_kl=_quantile(kl, 1.0),
        agreement=float(agrees.double().mean()),
        num_scored_tokens=int(is_scored.sum()),
        reference_perplexity=_perplexity(drift.reference_nll[is_scored]),
        served_perplexity=_perplexity(drift.served_nll[is_scored]),
        quarters=tuple(
            Quarter(int(inside.sum()), _mean(drift.kl[inside & is_finite]), _mean(agrees[inside].double()))
            for inside in by_quarter
        ),
    )


def beside_base(rows: Sequence[Figures]) -> tuple[Figures, ...]:
    """The same rows, the base's first, each adapter's mean KL also as a multiple of the base's."""
    base, *adapters = rows
    return (base, *(replace(row, kl_of_base=_ratio(row.mean_kl, base.mean_kl)) for row in adapters))


def breaches(row: Figures, limits: Limits) -> Iterator[str]:
    """A sentence for each limit that a row breaks. A position without a finite figure breaks every promise."""
    if row.num_not_finite:
        yield (
            f"{row.subject}: {row.num_not_finite} of {row.num_tokens} positions have NaN logits or an infinite "
            "divergence; try another --dtype"
        )
    if limits.max_kl is not None and row.mean_kl is not None and row.mean_kl > limits.max_kl:
        yield f"{row.subject}: the mean KL divergence is {row.mean_kl:.3g} nats, above --max-kl {limits.max_kl:g}"
    if limits.min_agreement is not None and row.agreement < limits.min_agreement:
        wanted = f"--min-agreement {limits.min_agreement:g}"
        yield f"{row.subject}: the top-1 agreement is {row.agreement:.4f}, below {wanted}"


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _quantile(values: torch.Tensor, share: float) -> float | None:
    """The smallest value that at least this share of the values do not exceed (nearest rank)."""
    if not len(values):
        return None
    # torch.quantile refuses more than 16 million values.
    return float(values.sort().values[max(0, math.ceil(share * len(values)) - 1)])


def _perplexity(nll: torch.Tensor) -> float | None:
    """exp of the mean negative log-probability; None where there is no token, or where it is infinite."""
    value = float(nll.mean().exp()) if len(nll) else math.inf
    return value if math.isfinite(value) else None


def _ratio(kl: float | None, of_base: float | None) -> float | None:
    return None if kl is None or not of_base else kl / of_base
