"""What the draws of a step depend on beside logits: made while the device computes them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from toppings.core import Request
from toppings.engine.drawing import Drawing
from toppings.engine.structures import StepMasks, Structures
from toppings.ops.sampling import SamplingRow
from toppings.ops.token_counts import TokenCounts
from toppings.ops.token_mask import TokenMask, mask_of


@dataclass(frozen=True, slots=True)
class RowsBegun:
    """The rows of `requests`, of which masks are being made where all tokens are known."""

    requests: list[Request]
    masks: "Future[StepMasks] | None"


class SamplingRows:
    """`structures`: set once, before the first request that has one."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self.structures: Structures | None = None
        self._eos_token_ids = eos_token_ids
        self._allowed: dict[str, TokenMask] = {}
        self._generators: dict[str, torch.Generator] = {}
        self._counts: dict[str, TokenCounts] = {}

    def begin(self, requests: list[Request]) -> RowsBegun:
        known = {r.request_id: r.output_token_ids for r in requests if not r.num_pending_tokens}
        return RowsBegun(requests, self._start_masks(requests, known))

    def finish(
        self, begun: RowsBegun, drawn_requests: Sequence[Request], drawing: Drawing | None
    ) -> tuple[list[SamplingRow], dict[str, str]]:
        """The rows, and by request id why an output cannot go on (what is drawn for it means nothing).

        Tokens of `drawn_requests` that `drawing` has yet to give are waited for where a row depends on them;
        the device has this step's work by then.
        """
        requests = begun.requests
        outputs = {r.request_id: r.output_token_ids for r in requests}
        late: dict[str, list[int]] = {}
        if drawing is not None and any(r.num_pending_tokens and _looks_back(r) for r in requests):
            drawn = zip(drawn_requests, drawing.wait().token_ids, strict=True)
            tokens = {r.request_id: token for r, token in drawn if r.num_pending_tokens}
            late = {name: [*outputs[name], token] for name, token in tokens.items() if name in outputs}
        made = [f.result() for f in (begun.masks, self._start_masks(requests, late)) if f is not None]
        masks = {name: mask for each in made for name, mask in each.masks.items()}
        failed = {name: reason for each in made for name, reason in each.failed.items()}
        outputs |= late
        rows = [
            SamplingRow(
                params=r.sampling,
                prompt_token_ids=r.prompt_token_ids,
                output_token_ids=outputs[r.request_id],
                generator=self._generator(r),
                eos_token_ids=(*self._eos_token_ids, *r.end_token_ids),
                vocab_size=r.vocab_size,
                allowed=masks.get(r.request_id, self._allowed_of(r)),
                counts=self._counts_of(r),
            )
            for r in requests
        ]
        for request, row in zip(requests, rows, strict=True):
            if row.is_stuck():
                failed.setdefault(request.request_id, "bad_words leave no token that may be drawn")
        return rows, failed

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._generators.pop(request.request_id, None)
        self._allowed.pop(request.request_id, None)
        self._counts.pop(request.request_id, None)
        if self.structures is not None:
            self.structures.forget(request)

    def _start_masks(
        self, requests: Sequence[Request], outputs: Mapping[str, list[int]]
    ) -> "Future[StepMasks] | None":
        structured = [
            r.request_id for r in requests if r.sampling.structure is not None and r.request_id in outputs
        ]
        if not structured:
            return None
        assert self.structures is not None, "a request with a structure is refused without"
        return self.structures.start_masks({name: outputs[name] for name in structured})

    def _allowed_of(self, request: Request) -> TokenMask | None:
        token_ids = request.sampling.allowed_token_ids
        if token_ids and request.request_id not in self._allowed:
            self._allowed[request.request_id] = mask_of(token_ids, request.vocab_size)
        return self._allowed.get(request.request_id)

    def _counts_of(self, request: Request) -> TokenCounts | None:
        sampling = request.sampling
        if not sampling.has_penalty:
            return None
        if request.request_id not in self._counts:
            seen = request.prompt_token_ids if sampling.repetition_penalty != 1.0 else ()
            self._counts[request.request_id] = TokenCounts(seen)
        return self._counts[request.request_id]

    def _generator(self, request: Request) -> torch.Generator | None:
        seed = request.sampling.seed
        if seed is not None and request.request_id not in self._generators:
            self._generators[request.request_id] = torch.Generator().manual_seed(seed)
        return self._generators.get(request.request_id)


def _looks_back(request: Request) -> bool:
    """Its next draw but one depends on the next."""
    sampling = request.sampling
    is_held = sampling.min_tokens > len(request.output_token_ids)
    has_bad_words = bool(sampling.bad_token_ids)
    return sampling.has_penalty or is_held or has_bad_words or sampling.structure is not None
