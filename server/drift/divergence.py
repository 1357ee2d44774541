"""The arithmetic: how far two distributions over the vocabulary are apart, token by token.

Owns the formulas and their precision. Knows nothing about prompts, adapters or where logits come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

NO_TARGET = -1
_CHUNK_ELEMENTS = 1 << 22  # float64 temporaries are 32 MiB each, whatever the vocabulary


@dataclass(frozen=True, slots=True)
class TokenDrift:
    """One value per position, on the CPU, each (positions,).

    kl float64: KL(reference || served) in nats; NaN where either side is no distribution, infinite where the served
    one excludes a token that the reference does not. agrees bool: the token that greedy decoding would serve has the
    reference's largest logit. reference_nll, served_nll float64: -log p of the token that follows; NaN where none does.
    """

    kl: torch.Tensor
    agrees: torch.Tensor
    reference_nll: torch.Tensor
    served_nll: torch.Tensor

    @staticmethod
    def concatenated(parts: Sequence["TokenDrift"]) -> "TokenDrift":
        return TokenDrift(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenDrift)))


def token_drift(
    reference: torch.Tensor, served: torch.Tensor, targets: torch.Tensor, chunk_elements: int = _CHUNK_ELEMENTS
) -> TokenDrift:
    """Compares logits (positions, vocabulary) of any floating dtypes and devices; targets (positions,) int64.

    A target is the id of the token that follows, or NO_TARGET. Sums run over the whole vocabulary in float64, on the
    served logits' device, in chunks of positions.
    """
    num_rows = max(1, chunk_elements // reference.shape[-1])
    parts = [
        _drift(reference[at : at + num_rows], served[at : at + num_rows], targets[at : at + num_rows])
        for at in range(0, reference.shape[0], num_rows)
    ]
    return TokenDrift.concatenated(parts)


def _drift(reference: torch.Tensor, served: torch.Tensor, targets: torch.Tensor) -> TokenDrift:
    reference = reference.to(served.device)
    # Greedy decoding takes the first of the largest, in the served dtype; of a tie in the reference any is right.
    choice = served.argmax(dim=-1, keepdim=True)
    agrees = reference.gather(-1, choice)[:, 0] == reference.amax(dim=-1)
    log_p = torch.log_softmax(reference.double(), dim=-1)
    log_q = torch.log_softmax(served.double(), dim=-1)
    targets = targets.to(served.device)
    reference_nll, served_nll = _nll(log_p, targets), _nll(log_q, targets)
    # KL(p || q) = sum p (log p - log q), where 0 log 0 = 0: masked tokens (-inf) would give 0 * (inf - inf).
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)
    kl = terms.sum(dim=-1).clamp_min(0.0)  # rounding may leave -1e-17; NaN stays NaN
    return TokenDrift(kl.cpu(), agrees.cpu(), reference_nll.cpu(), served_nll.cpu())


def _nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    found = log_probabilities.gather(-1, targets.clamp_min(0)[:, None])[:, 0].neg()
    return found.masked_fill(targets == NO_TARGET, torch.nan)
