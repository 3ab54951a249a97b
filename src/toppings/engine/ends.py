"""When a request's output ends, and what is said of one that fails."""

from dataclasses import dataclass

from toppings.core import FinishReason, Request
from toppings.messages import RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Ends:
    eos_token_ids: frozenset[int]
    max_model_len: int

    def output(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """What is said of a token that was drawn, its last one by now."""
        finish_reason, stop_token_id = self.reason(request, token_id)
        return RequestOutput(
            request.request_id,
            [token_id],
            logprobs=None if logprobs is None else [logprobs],
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
        )

    def reason(self, request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Why it ends with this token, its last one by now; the stop token, if that is why."""
        sampling, num_output = request.sampling, len(request.output_token_ids)
        may_stop = num_output >= sampling.min_tokens
        if may_stop and token_id in sampling.stop_token_ids:
            return FinishReason.STOP, token_id
        # A complete structure ends before `min_tokens`: nothing else may be drawn then.
        may_end = may_stop or sampling.structure is not None
        is_end = token_id in self.eos_token_ids or token_id in request.end_token_ids
        if may_end and is_end and not sampling.ignore_eos:
            return FinishReason.STOP, None
        if num_output >= sampling.max_tokens or request.num_tokens >= self.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def may_go_on(self, request: Request) -> bool:
        """After one more token than are known or pending, if none of them stops it."""
        num_more = request.num_pending_tokens + 1
        num_output, num_tokens = len(request.output_token_ids) + num_more, request.num_tokens + num_more
        return num_output < request.sampling.max_tokens and num_tokens < self.max_model_len


def error_output(request_id: str, reason: str) -> RequestOutput:
    return RequestOutput(request_id, [], finish_reason=FinishReason.ERROR, error=reason)
