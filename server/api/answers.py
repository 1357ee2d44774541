"""What all answers to a generation share: how it is begun, its envelope (id, created, model, adapter) and its usage."""

import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.adapters.asker import current_asker
from server.adapters.registry import Portion
from server.api.errors import echo
from server.api.generation import Generation
from server.api.keys.budget import Share, current_share
from server.api.schemas import ALL_THAT_FITS, GenerationBody
from server.api.selection import chosen_parts, entered, look_elsewhere
from server.api.services import Services
from server.api.structured import Asked, asked_of, compiled
from server.engine.entry import GroupOrder, SequenceOrder
from server.engine.sequence import Delta, SamplingParams
from server.ground.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Envelope:
    """The same in every chunk of one answer."""

    id: str
    created: int  # seconds since the epoch
    model: str  # as the client named it
    adapter: Mapping[str, Any] | list[dict[str, Any]] | None  # what is used; a list for a list; None: the bare base

    def around(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """An answer (or chunk) of OpenAI's object type `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "adapter": self.adapter,
            "choices": list(choices),
        }


class Usage:
    """Tokens of one answer: each prompt once, however many choices it has, and what all choices generated.

    Cached tokens are those of the prompts that none of their choices computed.
    """

    def __init__(self, num_prompt_tokens: int, num_choices: int) -> None:
        """`num_choices`: of each prompt."""
        self._num_prompt_tokens = num_prompt_tokens
        self._num_choices = num_choices
        self._num_output_tokens: dict[int, int] = {}  # by choice
        self._num_cached_tokens: dict[int, int] = {}  # by prompt

    def count(self, index: int, delta: Delta) -> None:
        self._num_output_tokens[index] = delta.num_output_tokens
        prompt = index // self._num_choices
        known = self._num_cached_tokens.get(prompt, delta.num_cached_tokens)
        self._num_cached_tokens[prompt] = min(known, delta.num_cached_tokens)

    def shown(self) -> dict[str, Any]:
        num_output_tokens = sum(self._num_output_tokens.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }


class Chunks:
    """Envelope and usage of a stream's chunks: `usage` appears only if the client asked, as OpenAI does it."""

    def __init__(self, envelope: Envelope, usage: Usage, body: GenerationBody, kind: str) -> None:
        self._envelope = envelope
        self._usage = usage
        self._kind = kind
        self.wants_usage = body.stream_options is not None and body.stream_options.include_usage
        self._is_continuous = body.stream_options is not None and body.stream_options.continuous_usage_stats

    def chunk(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        chunk = self._envelope.around(self._kind, [choice])
        if self.wants_usage:
            chunk["usage"] = self._usage.shown() if self._is_continuous else None
        return chunk

    def last(self) -> dict[str, Any]:
        """The chunk with the usage and no choices, sent last if `wants_usage`."""
        return {**self._envelope.around(self._kind, []), "usage": self._usage.shown()}


@dataclass(frozen=True, slots=True)
class Begun:
    envelope: Envelope
    generation: Generation
    usage: Usage


async def begin(
    services: Services,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    id_prefix: str,
    forced: Asked | None = None,
) -> Begun:
    """Lease and submit `body.n` sequences per prompt, prompt by prompt. `params` has one item per prompt.

    `forced`: a grammar for all of them, in the place of what the body asks for.

    Raises the errors of selection and submission, with nothing held and nothing running.
    """
    num_sequences, share = len(prompts) * body.n, current_share()
    _take_places(services, body, num_sequences, share)
    _check_priority(body)
    _check_model_has(services, body)
    parts = chosen_parts(services, body.model, body.adapters)
    asked = asked_of(body, forced)
    if asked is not None and body.allowed_token_ids:
        raise BadRequest(
            "'allowed_token_ids' and a grammar (a response format, structured outputs, a forced call) may together "
            "leave no token; leave one of the two out.",
            param="allowed_token_ids",
        )
    grammar = None if asked is None else await compiled(services.grammars, asked)
    salt = own_salt(body.cache_salt, shares_prefixes=services.http.shares_prefixes)
    await look_elsewhere(services, (spec for spec, _ in parts))
    request_id = f"{id_prefix}-{uuid.uuid4().hex}"
    sequences = tuple(_sequences(services, body, prompts, params, request_id))
    submitted_s = time.perf_counter()
    held, streams = await entered(
        services, GroupOrder(sequences, tuple(parts), salt, grammar), is_model=body.adapter is None
    )
    model = body.model or services.base.served_names[0]
    envelope = Envelope(request_id, int(time.time()), model, _shown_adapter(held.portions, body))
    generation = Generation(streams, held.adapters, services.metrics, submitted_s)
    num_prompt_tokens = sum(len(prompt) for prompt in prompts)
    if share is not None:
        share.budget.spend_tokens(num_prompt_tokens)
    return Begun(envelope, generation, Usage(num_prompt_tokens, body.n))


def _sequences(
    services: Services,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    request_id: str,
) -> Iterator[SequenceOrder]:
    """`body.n` for each prompt, prompt by prompt."""
    index = 0
    for prompt, one in zip(prompts, _for_this_model(services, body, params), strict=True):
        prompt_ids = tuple(prompt)
        for choice in range(body.n):
            yield SequenceOrder(f"{request_id}-{index}", prompt_ids, _nth_choice(one, choice))
            index += 1


def _take_places(services: Services, body: GenerationBody, num_sequences: int, share: Share | None) -> None:
    """Counts the sequences of a request among those that its key has at once.

    Raises BadRequest for more than this server or this key may ever have, RateLimited for more than the key may now.
    """
    param = "n" if body.n > 1 else "prompt"
    if num_sequences > services.max_queued:
        raise BadRequest(
            f"The request is for {num_sequences} sequences (prompts times n); this server takes at most "
            f"{services.max_queued} at once: split the request.",
            param=param,
        )
    if share is not None:
        share.widen(num_sequences, param)


def own_salt(asked: str | None, *, shares_prefixes: bool) -> str | None:
    """What the request's blocks of the KV cache are kept under: each owner of keys has salts of its own.

    Else the time to a first token would tell one owner what another has asked.
    """
    owner = current_asker().owner
    return asked if owner is None or shares_prefixes else f"key {owner} {asked or ''}"


def check_token_ids(services: Services, ids: Iterable[int], param: str) -> None:
    """Raises BadRequest naming `param` for an id that the tokenizer or the base's embedding does not have."""
    num_ids = min(services.tokenizer.vocab_size, services.base.vocab_size)
    for token_id in ids:
        if not 0 <= token_id < num_ids:
            raise BadRequest(
                f"'{param}' has the token id {echo(token_id)}; this model's ids are 0 to {num_ids - 1}.", param=param
            )


def truncated(body: GenerationBody, prompt: list[int], max_context: int, max_tokens: int) -> list[int]:
    """The last tokens of a prompt, as many as `truncate_prompt_tokens` keeps; -1 leaves room for `max_tokens`."""
    kept = body.truncate_prompt_tokens
    if kept == ALL_THAT_FITS:
        kept = max(max_context - max_tokens, 1)
    return prompt if kept is None else prompt[-kept:]


def sampling(
    body: GenerationBody, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Raises BadRequest for fewer tokens at most than at least."""
    if body.min_tokens > max_tokens:
        raise BadRequest(
            f"'min_tokens' is {body.min_tokens}, and at most {max_tokens} tokens may come; raise 'max_tokens' or lower "
            "'min_tokens'.",
            param="min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        seed=body.seed,
        stop=tuple(body.stop),
        stop_token_ids=frozenset(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        logit_bias=tuple(body.logit_bias.items()),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        includes_stop=body.include_stop_str_in_output,
        priority=body.priority,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _check_priority(body: GenerationBody) -> None:
    """Raises BadRequest for an owner's request that wants to come before those of others."""
    if body.priority < 0 and current_asker().owner is not None:
        raise BadRequest(
            "'priority' below 0 comes before everybody's requests, and is for keys with the scope admin: send 0, or "
            "more to let others go first.",
            param="priority",
        )


def _check_model_has(services: Services, body: GenerationBody) -> None:
    """Raises BadRequest for tokens that this model does not have, or that leave nothing to say."""
    allowed, stops = body.allowed_token_ids or (), frozenset(body.stop_token_ids)
    check_token_ids(services, allowed, "allowed_token_ids")
    check_token_ids(services, stops, "stop_token_ids")
    check_token_ids(services, body.logit_bias, "logit_bias")
    ends = stops if body.ignore_eos else stops | services.tokenizer.eos_ids
    if body.min_tokens and allowed and ends.issuperset(allowed):
        raise BadRequest(
            "'allowed_token_ids' has only tokens that end the answer, and 'min_tokens' forbids them; allow another "
            "token, or leave one of the two out.",
            param="allowed_token_ids",
        )


def _for_this_model(
    services: Services, body: GenerationBody, params: Sequence[SamplingParams]
) -> Iterator[SamplingParams]:
    """With the lists that all sequences of a request share, made once: they may have a whole vocabulary."""
    allowed = array("q", dict.fromkeys(body.allowed_token_ids or ()))
    for one in params:
        shown = one.shown_tokens if body.skip_special_tokens else services.tokenizer.all_special_ids
        yield replace(one, allowed_token_ids=allowed, shown_tokens=shown)


def _nth_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one seeded request must differ, and be the same again next time: each has the seed after the last."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)


def _shown_adapter(portions: Sequence[Portion], body: GenerationBody) -> dict[str, Any] | list[dict[str, Any]] | None:
    """What answered, in the form in which it was asked for: streams say it in every chunk. None: the bare base."""
    if not portions:
        return None
    if isinstance(body.adapter, list):
        return [_shown_portion(portion) | {"weight": portion.weight} for portion in portions]
    (portion,) = portions
    weight = {} if portion.weight == 1 else {"weight": portion.weight}
    return _shown_portion(portion) | weight


def _shown_portion(portion: Portion) -> dict[str, Any]:
    """An adapter; where it seems to be of another base, with a word for that."""
    shown = {"name": portion.version.name, "version": portion.version.digest}
    return shown | {"warning": "base_mismatch"} if portion.has_doubts else shown
