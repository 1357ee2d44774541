"""What one sequence's output must follow, and how far along it is.

Owns the place of a sequence in its grammar. Knows nothing about logits or the batch.
"""

from llguidance import LLMatcher

from server.model.grammar import Grammar


class Constraint:
    """A grammar on its way along one output. It has read the tokens that `accept` was called with, and no others."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None

    @property
    def vocab_size(self) -> int:
        """Of the model: as many bits has a mask."""
        return self._grammar.vocab_size

    @property
    def matcher(self) -> LLMatcher:
        """What says which tokens may come next. Made when it is first needed: not on the loop that takes requests."""
        if self._matcher is None:
            self._matcher = self._grammar.start()
        return self._matcher

    def accept(self, token_id: int) -> None:
        """Goes on by a token that its mask allowed."""
        self.matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole, and ends here: no other token could follow, or the end itself has come."""
        return self._matcher is not None and self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def fault(self) -> str | None:
        """Why the grammar cannot be followed any further: it broke a limit of the parser's; None while it can."""
        if self._matcher is None or not self._matcher.is_error():
            return None
        return self._matcher.get_error().partition("\n")[0].rstrip(". ")
