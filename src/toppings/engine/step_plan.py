"""A step's batch while the scheduler puts it together."""

from dataclasses import dataclass, field

from toppings.core import Batch, BatchItem, Request


@dataclass(slots=True)
class StepPlan:
    """A step's batch while it is put together. Where it `may_shorten`, prompts of others get, beside
    `guest_tokens` of guests', `spare_tokens` at most; `num_others`: tokens that are not guests'.

    `num_prompt_tokens` are those beyond one of each request; it `is_held_back` where somebody had less than
    the step had left, for a guest's sake.
    """

    budget: int
    may_shorten: bool = False
    decodes: list[BatchItem] = field(default_factory=list)
    prompts: list[BatchItem] = field(default_factory=list)
    late: list[Request] = field(default_factory=list)  # prompts under way that may be overtaken
    made_way: list[Request] = field(default_factory=list)  # they start again in a later step
    was_preempted: bool = False
    was_overtaken: bool = False
    guest_tokens: int = 0
    num_others: int = 0
    num_prompt_tokens: int = 0
    spare_tokens: int | None = None
    is_held_back: bool = False

    def add(self, request: Request, num_tokens: int, copy_page: int | None = None) -> None:
        is_decode = num_tokens == 1 and request.num_computed_tokens > 0
        items = self.decodes if is_decode else self.prompts
        items.append(BatchItem(request, num_tokens, 0, copy_page))
        self.budget -= num_tokens
        self.num_prompt_tokens += num_tokens - 1

    def add_decode(self, request: Request) -> None:
        """As `add`, of a sequence that goes on by one token: most are such."""
        self.decodes.append(BatchItem(request, 1))
        self.budget -= 1

    def drop(self, request: Request) -> None:
        """It was preempted after all."""
        for items in (self.prompts, self.decodes):
            for item in items:
                if item.request is request:
                    items.remove(item)
                    self.budget += item.num_rows
                    self.num_prompt_tokens -= item.num_tokens - 1
                    return

    def tokens_for(self, request: Request, *, is_guest: bool) -> int:
        """Of its uncomputed ones, as many as it may have."""
        num_tokens = max(0, min(request.num_uncomputed_tokens, self.budget))
        if self.spare_tokens is None or is_guest or num_tokens <= self.spare_tokens:
            return num_tokens
        self.is_held_back = True
        return self.spare_tokens

    def note_guest(self, num_tokens: int) -> None:
        """One has started with so many tokens."""
        if self.may_shorten:
            self.guest_tokens += num_tokens
            self.spare_tokens = max(0, self.guest_tokens // 2 - self.num_others)

    def note_others(self, num_tokens: int) -> None:
        """Others' prompts have got so many."""
        self.num_others += num_tokens
        if self.spare_tokens is not None:
            self.spare_tokens = max(0, self.spare_tokens - num_tokens)

    def batch(self) -> Batch:
        self.decodes.sort(key=_adapter_of)
        self.prompts.sort(key=_adapter_of)
        return Batch(self.decodes + self.prompts)


def _adapter_of(item: BatchItem) -> int:
    adapter_id = item.request.adapter_id
    return -1 if adapter_id is None else adapter_id
