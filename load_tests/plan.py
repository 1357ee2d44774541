"""What a run will send, drawn before it starts: when, with which adapter, how long a prompt.

Owns the draws (Poisson arrivals, Zipf popularity, prompt lengths and words), all from one seed. Knows nothing about
servers, HTTP and clocks; the same seed gives the same requests on every machine and against every server.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Short and common, so that most tokenizers make one or two tokens of each.
_SENTENCE = (
    "the house has a door and two small windows, people walk along the river every morning when the sun is out, "
    "some carry bread or water, others talk about work and weather, a dog runs after birds near the old bridge, "
    "children ask why the boat is slow, nobody knows, later it rains, then all of them go home to eat and sleep"
)
WORDS = tuple(_SENTENCE.split())


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for. `zipf` 0 makes all adapters equally popular."""

    rate_per_s: float
    duration_s: float
    zipf: float
    min_prompt_tokens: int
    max_prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the plan. `rank` is the popularity rank of its adapter, from 1; 0 with None, the bare base."""

    number: int
    scheduled_s: float  # after the start of the run
    adapter: str | None
    rank: int
    num_prompt_tokens: int  # wanted; the server's own count is in the outcome


@dataclass(frozen=True, slots=True)
class TokenScale:
    """How the server's tokenizer counts our words: tokens = overhead + tokens_per_word * words."""

    tokens_per_word: float = 1.0
    overhead: float = 0.0

    @classmethod
    def through(cls, few: tuple[int, int], many: tuple[int, int]) -> "TokenScale":
        """The line through two measured (words, tokens) pairs; words must differ."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        return cls(slope, few[1] - slope * few[0]) if slope > 0 else cls()

    def num_words(self, num_tokens: int) -> int:
        """The words whose prompt comes closest to `num_tokens`; at least one."""
        return max(1, round((num_tokens - self.overhead) / self.tokens_per_word))


def zipf_law(num_adapters: int, exponent: float) -> list[float]:
    """The probability of each rank: rank ** -exponent, over the sum of all (Zipf's law on a finite set).

    Not a power-law *density* (`numpy.random.power`), which some load tests draw from under this name.
    """
    weights = [rank**-exponent for rank in range(1, num_adapters + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """Seconds after the start, ascending, below `duration_s`: gaps are independent and exponential."""
    draws = _draws(seed, "arrivals")
    gaps = (draws.expovariate(rate_per_s) for _ in itertools.count())
    return list(itertools.takewhile(lambda at_s: at_s < duration_s, itertools.accumulate(gaps)))


def ranked(names: Sequence[str], num_adapters: int, seed: int) -> tuple[str, ...]:
    """`num_adapters` of `names`, the most popular first; who is popular is the seed's choice, not the alphabet's.

    Raises ValueError if there are fewer names.
    """
    if len(set(names)) < num_adapters:
        raise ValueError(
            f"--adapters asks for {num_adapters}, but only {len(set(names))} are known: ask for fewer, or name more "
            f"with --adapter-names"
        )
    return tuple(_draws(seed, "ranks").sample(sorted(set(names)), num_adapters))


def draw(load: Load, adapters: Sequence[str]) -> tuple[Request, ...]:
    """The requests of a run in the order of their arrival; `adapters` by rank, none for the bare base."""
    arrivals = poisson_arrivals(load.rate_per_s, load.duration_s, load.seed)
    ranks = [0] * len(arrivals)
    if adapters:
        law = zipf_law(len(adapters), load.zipf)
        ranks = _draws(load.seed, "adapters").choices(range(1, len(adapters) + 1), law, k=len(arrivals))
    lengths = _draws(load.seed, "lengths")
    return tuple(
        Request(
            number=number,
            scheduled_s=at_s,
            adapter=adapters[rank - 1] if rank else None,
            rank=rank,
            num_prompt_tokens=lengths.randint(load.min_prompt_tokens, load.max_prompt_tokens),
        )
        for number, (at_s, rank) in enumerate(zip(arrivals, ranks, strict=True))
    )


def prompt(request: Request, scale: TokenScale, seed: int) -> str:
    """Words in an order of the request's own, so that no prefix cache answers for the server."""
    draws = _draws(seed, f"words of {request.number}")
    return " ".join(draws.choices(WORDS, k=scale.num_words(request.num_prompt_tokens)))


def _draws(seed: int, what: str) -> random.Random:
    """A stream of its own for each purpose: more arrivals do not change who is popular."""
    return random.Random(f"{seed}/{what}")
