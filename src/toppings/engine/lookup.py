"""Look-up decoding: a request's next tokens guessed from what it has seen, its prompt and its own output.

Where the last tokens occurred before, those that followed them there are the draft. It is computed in the
same step as the token before it, and kept as far as the model draws the same (`draft_rows.py`).

Whether drafts pay is learnt request by request. One that is taken whole doubles the length of the next; one
that is refused at once has the request go without for a while, each time for twice as long.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toppings.core import BatchItem, Request
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.engine.step_plan import StepPlan

NGRAMS = (5, 3)
"""How many last tokens are looked for: with more, what followed is likelier to follow again."""
FIRST_LEN = 2
"""Tokens of a request's first draft."""
FIRST_PAUSE, MAX_PAUSE = 2, 128
"""Tokens that are drawn without looking for a draft, after the first that was refused and after many."""
MIN_CAPACITY = 256
MAX_STEP_ROWS = 8
"""Weights are read once for so many rows, on every CPU."""


@dataclass(slots=True)
class _Seen:
    """`tokens`, the first `num_tokens` of which are known; `max_len`: of the next draft."""

    tokens: np.ndarray[tuple[int], np.dtype[np.int32]]
    num_tokens: int = 0
    max_len: int = FIRST_LEN
    pause: int = FIRST_PAUSE
    resumes_at: int = 0  # number of tokens

    def catch_up(self, request: Request) -> None:
        num_tokens = request.num_tokens
        if num_tokens > len(self.tokens):
            grown = np.empty(max(MIN_CAPACITY, 2 * num_tokens), np.int32)
            grown[: self.num_tokens] = self.tokens[: self.num_tokens]
            self.tokens = grown
        self.tokens[self.num_tokens : num_tokens] = request.token_ids(self.num_tokens, num_tokens)
        self.num_tokens = num_tokens

    def find(self, num_tokens: int) -> list[int]:
        """What followed the latest earlier place of the last tokens; as many as these, at most."""
        known = self.tokens[: self.num_tokens]
        for n in NGRAMS:
            if len(known) <= n:
                continue
            is_match = known[n - 1 : -1] == known[-1]
            for back in range(2, n + 1):
                is_match &= known[n - back : -back] == known[-back]
            places = np.flatnonzero(is_match)
            if len(places):
                start = int(places[-1]) + n
                return [int(token) for token in known[start : start + num_tokens]]
        return []


class LookupDrafts:
    """`max_len`: of a draft; `max_step_rows`: of a step that has some, all rows counted: beyond, a row takes
    time that its draft may not be worth.

    None are made for a request whose tokens are held to a structure, or whose prompt is read."""

    def __init__(self, max_len: int, max_step_rows: int = MAX_STEP_ROWS) -> None:
        assert max_len >= 1
        self.max_step_rows = max_step_rows
        self._max_len = max_len
        self._seen: dict[Request, _Seen] = {}
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0

    def add_to(self, step: StepPlan, limits: SchedulerLimits, pages: PageAllocator, num_running: int) -> None:
        """Drafts behind the step's decodes, of tokens and pages that nobody needs; each of so many that run
        may want a page."""
        items = [i for i in step.decodes if i.needs_sample and not i.request.num_pending_tokens]
        num_rows = min(step.budget, self.max_step_rows - len(step.decodes) - len(step.prompts))
        for num_left, item in zip(range(len(items), 0, -1), items, strict=True):
            request, share = item.request, -(-num_rows // num_left)
            draft = self.draft(request, min(share, limits.max_draft_len(request)))
            has_room = pages.num_free >= num_running + pages_for(len(draft), pages.page_size)
            num_tokens = request.num_computed_tokens + 1 + len(draft)
            if draft and has_room and pages.grow(request.page_table, num_tokens):
                item.draft = draft
                num_rows -= len(draft)

    def draft(self, request: Request, num_tokens: int) -> list[int]:
        """A guess at the request's next tokens after its last one, `num_tokens` at most."""
        sampling = request.sampling
        if num_tokens <= 0 or sampling.structure is not None or sampling.reads_prompt:
            return []
        seen = self._seen.get(request)
        if seen is None:
            seen = self._seen[request] = _Seen(np.empty(0, np.int32))
        if request.num_tokens < seen.resumes_at:
            return []
        seen.catch_up(request)
        return seen.find(min(num_tokens, seen.max_len, self._max_len))

    def note_step(self, items: Sequence[BatchItem], drawn_items: Sequence[BatchItem]) -> None:
        """A step of `items` has ended; `drawn_items` has each once for every token that counts."""
        num_drawn = Counter(id(item) for item in drawn_items)
        for item in items:
            if item.draft:
                self.note(item.request, len(item.draft), num_drawn[id(item)] - 1)

    def note(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Of a draft, so many tokens were what the model drew."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        if (seen := self._seen.get(request)) is None:
            return
        if num_accepted == num_drafted:
            seen.max_len, seen.pause = min(2 * max(seen.max_len, num_drafted), self._max_len), FIRST_PAUSE
        elif num_accepted:
            seen.max_len = max(FIRST_LEN, num_accepted)
        else:
            seen.max_len = FIRST_LEN
            seen.resumes_at = request.num_tokens + seen.pause
            seen.pause = min(2 * seen.pause, MAX_PAUSE)

    def forget(self, request: Request) -> None:
        self._seen.pop(request, None)

    def counters(self) -> dict[str, int]:
        return {
            "spec_decode_drafts": self.num_drafts,
            "spec_decode_draft_tokens": self.num_draft_tokens,
            "spec_decode_accepted_tokens": self.num_accepted_tokens,
        }
