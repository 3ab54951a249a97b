"""What an engine makes of a message, and checks before it takes it: raises RequestError."""

from toppings.adapters.errors import AdapterError
from toppings.adapters.manager import AdapterManager
from toppings.bad_input import RequestError
from toppings.core import Request
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


def check_tokens(request: Request, vocab_size: int) -> None:
    """One wrong id would fail the step of everyone, or a device for ever."""
    sampling = request.sampling
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
