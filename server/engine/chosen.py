"""The tokens that a step has chosen: they stay on the device for the next step, and come to the CPU meanwhile.

Owns the way back of a few numbers. Knows nothing about how they were chosen.
"""

from collections.abc import Mapping, Sequence

import torch

NOT_FINITE = -1  # instead of a token: the row's logits are not numbers


def marked(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (rows,), NOT_FINITE for the rows of logits (rows, vocabulary) that do not tell."""
    return torch.where(logits.amax(dim=-1).isfinite(), tokens, NOT_FINITE)  # amax passes NaN on


class Reading:
    """Tensors of one device on their way to the CPU, behind all that the device was given before."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if all(tensor.device.type != "cuda" for tensor in tensors):
            self._host = tensors
            return
        self._host = tuple(_begun_copy(tensor) for tensor in tensors)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the CPU, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _begun_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In pinned memory, where nothing is to be read before the device has come to the copy."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Chosen:
    """One step's choice: a token for each row of `tokens` (rows,) int64, and whose row each is."""

    def __init__(self, tokens: torch.Tensor, sequence_ids: Sequence[str]) -> None:
        self.tokens = tokens
        self.row_of: Mapping[str, int] = {name: row for row, name in enumerate(sequence_ids)}
        self._reading = Reading(tokens)

    def read(self) -> dict[str, int]:
        """The tokens by sequence id. Waits for the device."""
        (tokens,) = self._reading.wait()
        return dict(zip(self.row_of, tokens.tolist(), strict=True))
