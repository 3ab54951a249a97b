"""A step's batch while the scheduler puts it together."""

from dataclasses import dataclass, field

from toppings.core import Batch, BatchItem, Request


@dataclass(slots=True)
class StepPlan:
    """A step's batch while it is put together. `guest_tokens`: of guests' prompts, beside which others' get
    `spare_tokens` at most; `num_others`: tokens that are not guests'."""

    budget: int
    items: list[BatchItem] = field(default_factory=list)
    late: list[Request] = field(default_factory=list)  # prompts under way that may be overtaken
    made_way: list[Request] = field(default_factory=list)  # they start again in a later step
    was_preempted: bool = False
    was_overtaken: bool = False
    guest_tokens: int = 0
    num_others: int = 0
    spare_tokens: int | None = None

    def add(self, request: Request, num_tokens: int, copy_page: int | None = None) -> None:
        self.items.append(BatchItem(request, num_tokens, copy_page=copy_page))
        self.budget -= num_tokens

    def drop(self, request: Request) -> None:
        """It was preempted after all."""
        for item in self.items:
            if item.request is request:
                self.items.remove(item)
                self.budget += item.num_rows
                return

    def batch(self) -> Batch:
        return Batch(sorted(self.items, key=_batch_order))


def _batch_order(item: BatchItem) -> tuple[bool, int]:
    adapter_id = item.request.adapter_id
    return (not item.is_decode, -1 if adapter_id is None else adapter_id)
