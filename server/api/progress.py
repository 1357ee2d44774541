"""What metrics, and its key's budget, are told of one sequence while its deltas pass by, from submission to its end.

Owns its moments and its counts. Knows nothing about who reads the deltas.
"""

import time
from collections.abc import Sequence

from server.api import notes
from server.api.keys.budget import Budget
from server.engine.sequence import Delta, FinishReason
from server.ground.metrics import Metrics

_FINISHED = (FinishReason.STOP, FinishReason.LENGTH)


class Progress:
    """One sequence, from `submitted_s` on (of `time.perf_counter`)."""

    def __init__(
        self, adapters: Sequence[str], metrics: Metrics, submitted_s: float, budget: Budget | None = None
    ) -> None:
        """`adapters`: the names of those that it uses; none for the bare base. `budget`: its key's, if that has one."""
        self._adapters = adapters
        self._budget = budget
        self._metrics = metrics
        self._submitted_s = self._heard_s = submitted_s
        self._first_token_s: float | None = None
        self._num_counted = 0  # output tokens so far
        self._is_prefilled = False
        metrics.adapters.count_sequence(adapters)

    def observe(self, delta: Delta) -> None:
        """A delta has come."""
        if not self._is_prefilled and (delta.num_output_tokens > 0 or delta.finish_reason in _FINISHED):
            self._count_prompt(delta)
        num_new = delta.num_output_tokens - self._num_counted
        if num_new > 0:
            self._count(num_new, delta.queue_s)
        if delta.finish_reason is not None:
            self.finish(delta.finish_reason, delta)

    def _count_prompt(self, first: Delta) -> None:
        """The prefill has ended, once for good: a preempted sequence that computes its prompt again has one prompt."""
        self._is_prefilled = True
        self._metrics.count_prompt(first.num_prompt_tokens, first.num_cached_tokens)
        self._metrics.adapters.count_tokens(self._adapters, num_prompt=first.num_prompt_tokens)

    def _count(self, num_new: int, queue_s: float) -> None:
        now_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._metrics.observe_first_token(now_s - self._submitted_s, queue_s)
        else:
            self._metrics.observe_next_tokens(num_new, now_s - self._heard_s)
        self._metrics.count_output_tokens(num_new)
        notes.current().num_output_tokens += num_new
        self._metrics.adapters.count_tokens(self._adapters, num_output=num_new)
        if self._budget is not None:
            self._budget.spend_tokens(num_new)
        self._heard_s = now_s
        self._num_counted += num_new

    def finish(self, reason: FinishReason, last: Delta) -> None:
        """It has ended, or its reader has all that it wants, with the delta `last`."""
        self._metrics.count_finished(reason)
        notes.current().num_prompt_tokens += last.num_prompt_tokens
        if reason is FinishReason.ERROR:
            self._metrics.adapters.count_failure(self._adapters)
        if reason not in _FINISHED:
            return
        now_s = time.perf_counter()
        whole_s = now_s - self._submitted_s
        self._metrics.observe_finished(last.num_prompt_tokens, self._num_counted, whole_s, last.queue_s)
        if self._first_token_s is not None:
            self._metrics.observe_decode(self._num_counted, now_s - self._first_token_s)

    def abort(self) -> None:
        """Its reader has left."""
        self._metrics.count_finished(FinishReason.ABORT)
