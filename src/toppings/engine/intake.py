"""What an engine makes of a message, and checks before it takes it: raises RequestError."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from toppings.adapters.errors import AdapterError
from toppings.adapters.manager import AdapterManager
from toppings.adapters.vocabulary import Vocabulary
from toppings.bad_input import RequestError
from toppings.core import Request
from toppings.grammar.compiler import OwnTokens
from toppings.messages import AddRequest


def request_of(message: AddRequest, now: float) -> Request:
    return Request(
        message.request_id,
        message.prompt_token_ids,
        message.sampling,
        message.adapter_id,
        arrived_at=now,
        cache_salt=message.cache_salt,
        is_cacheable=message.is_cacheable,
        tenant=message.standing.tenant,
        weight=message.standing.weight,
        priority=message.standing.scheduling_priority,
    )


def set_vocabulary(request: Request, adapters: AdapterManager, vocab_size: int) -> None:
    """That of its adapter, or the base model's `vocab_size` tokens."""
    own = _own_vocabulary(request, adapters)
    request.vocab_size = vocab_size if own is None else own.size or vocab_size
    request.end_token_ids = () if own is None else own.end_token_ids


def own_tokens(request: Request, adapters: AdapterManager, eos_token_ids: Iterable[int]) -> OwnTokens | None:
    """What its adapter's vocabulary has beside the base model's, whose answers end with `eos_token_ids`."""
    if (own := _own_vocabulary(request, adapters)) is None:
        return None
    ends = (*sorted(eos_token_ids), *own.end_token_ids)
    return OwnTokens(request.vocab_size, ends, json.dumps([asdict(token) for token in own.tokens]))


def _own_vocabulary(request: Request, adapters: AdapterManager) -> Vocabulary | None:
    if request.adapter_id is None:
        return None
    try:
        return adapters.vocabulary_of(request.adapter_id)
    except AdapterError as error:
        raise RequestError(str(error)) from error


def check_tokens(request: Request) -> None:
    """One wrong id would fail the step of everyone, or a device for ever."""
    sampling, vocab_size = request.sampling, request.vocab_size
    for name, token_ids in (
        ("the prompt", request.prompt_token_ids),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("logprob_token_ids", sampling.logprob_token_ids),
    ):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
            raise RequestError(f"{name} holds token id {wrong}; the vocabulary has ids 0 to {vocab_size - 1}")


def tier_of(request: Request, adapters: AdapterManager) -> str:
    """Where its adapter is: "device", "host" or "disk"; the base model is on the device."""
    if request.adapter_id is None:
        return "device"
    try:
        return adapters.tier_of(request.adapter_id)
    except AdapterError as error:
        raise RequestError(str(error)) from error
