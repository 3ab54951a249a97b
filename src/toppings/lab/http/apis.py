"""How families of servers spell a streamed request and its answer."""

from dataclasses import dataclass
from typing import Any, Protocol

from toppings.lab.outcome import PlannedCall


class RefusedError(Exception):
    """The server answered with an error, or with something that is no answer."""


@dataclass(slots=True)
class StreamedAnswer:
    """What a stream has told so far; token counts of `usage` go before the number of events."""

    num_events: int = 0
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    is_finished: bool = False


class Api(Protocol):
    """One family. `read` notes what an event says and returns True for one with a token."""

    route: str

    def body(self, call: PlannedCall) -> dict[str, Any]: ...

    def read(self, event: dict[str, Any], answer: StreamedAnswer) -> bool: ...


class CompletionsApi:
    """OpenAI's completions; `ignores_eos` sends vLLM's `ignore_eos`, so that all answers are equally long."""

    route = "/v1/completions"

    def __init__(self, *, ignores_eos: bool) -> None:
        self._extra = {"ignore_eos": True} if ignores_eos else {}

    def body(self, call: PlannedCall) -> dict[str, Any]:
        return {
            "model": call.adapter,
            "prompt": call.prompt,
            "max_tokens": call.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }

    def read(self, event: dict[str, Any], answer: StreamedAnswer) -> bool:
        if "error" in event:
            raise RefusedError(reason_of(event))
        if usage := event.get("usage"):
            answer.num_tokens = usage["completion_tokens"]
            answer.num_prompt_tokens = usage["prompt_tokens"]
        choices = event.get("choices") or []
        answer.is_finished |= any(choice.get("finish_reason") for choice in choices)
        return bool(choices)


class GenerateApi:
    """`/generate_stream` of the LightLLM family, one event per token; adapters are selected by `lora_dir`."""

    route = "/generate_stream"

    def __init__(self, *, ignores_eos: bool) -> None:
        self._ignores_eos = ignores_eos

    def body(self, call: PlannedCall) -> dict[str, Any]:
        parameters = {"max_new_tokens": call.max_tokens, "ignore_eos": self._ignores_eos}
        return {"inputs": call.prompt, "lora_dir": call.adapter, "parameters": parameters}

    def read(self, event: dict[str, Any], answer: StreamedAnswer) -> bool:
        if "token" not in event:
            raise RefusedError(reason_of(event))
        answer.is_finished = event["finished"] is True
        return True


APIS: dict[str, type[CompletionsApi] | type[GenerateApi]] = {
    "completions": CompletionsApi,
    "generate": GenerateApi,
}


def reason_of(body: Any) -> str:
    """The message in an error of any of the families of servers."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
