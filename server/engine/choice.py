"""The choice of a step's tokens: its sequences' rules, masks and random numbers meet their logits.

Owns what each row is sampled with. Nothing here waits for the device. Knows nothing about the loop, or what becomes of
a token.
"""

from collections.abc import Mapping

import torch

from server.engine.chosen import Chosen, marked
from server.engine.flight import Flight
from server.engine.logits import edit_logits
from server.engine.masks import StepMasks
from server.engine.runner import StepLogits
from server.engine.sampler import SamplingRow, sample
from server.engine.sequence import ScheduledSequence


def choose(logits: StepLogits, flights: Mapping[str, Flight], masks: StepMasks | None) -> Chosen:
    """The next token of each sequence that samples, NOT_FINITE where its logits do not tell; `flights` by sequence id.

    A sequence that is in flight no more (it ended while the step ran) gets a token that nobody reads.
    """
    names = [item.sequence.sequence_id for item in logits.samplers]
    if not names:
        return Chosen(torch.empty(0, dtype=torch.int64), names)
    rows = [_sampling_row(item, flights) for item in logits.samplers]
    if masks is None and not any(row.rules for row in rows):  # the logits are as the step has left them
        if logits.greedy is not None and all(row.temperature == 0 for row in rows):
            return Chosen(logits.greedy, names)
        if logits.draw is not None:
            return Chosen(logits.draw(rows), names)
    allowed = logits.sampled if masks is None else masks.applied(logits)
    tokens = sample(edit_logits(allowed, rows), rows, logits.argmax)
    return Chosen(marked(logits.sampled, tokens), names)


def _sampling_row(item: ScheduledSequence, flights: Mapping[str, Flight]) -> SamplingRow:
    params = item.sequence.params
    flight = flights.get(item.sequence.sequence_id)
    # One random number per sampled token of this request, so that a seed does not depend on the batch.
    uniform = flight.uniform() if flight is not None and params.temperature > 0 else 0.0
    rules = None if flight is None else flight.rules
    return SamplingRow(params.temperature, params.top_p, params.top_k, uniform, params.min_p, rules)
