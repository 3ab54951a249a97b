"""LoRAX's `merged_adapters`: the adapter that was registered as this merge."""

import asyncio
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from pydantic import Field

from toppings.adapters.merges import MAX_PARTS, TOTAL, Merge, MergePart
from toppings.server.errors import ApiError
from toppings.server.fields import LenientBody, Name
from toppings.server.state import ServerState, Target


class MergedAdapters(LenientBody):
    """LoRAX multiplies A and B each by an adapter's weight, where PEFT's `linear` has the weight's root."""

    ids: Annotated[list[Name], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    weights: Annotated[list[float], Field(max_length=MAX_PARTS, fail_fast=True)] = []  # noqa: RUF012  (as `stop`)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None

    def to_merge(self) -> Merge:
        """In PEFT's words. Raises ApiError, and AdapterError for a value that is wrong."""
        weights = self.weights or [1.0] * len(self.ids)
        if len(weights) != len(self.ids):
            raise ApiError(400, f"merged_adapters has {len(self.ids)} ids and {len(weights)} weights")
        if (least := min(weights)) <= 0:
            raise ApiError(400, f"merged_adapters: a weight is {least}; only those above 0 are supported")
        parts = tuple(MergePart(name, w * w) for name, w in zip(self.ids, weights, strict=True))
        return Merge(parts, self.merge_strategy, self.density, self.majority_sign_method)


async def find_merged(state: ServerState, merge: Merge) -> Target:
    """The adapter that was registered as this merge of what its parts are now."""
    parts = [await state.find_target(part.name) for part in merge.parts]
    ids = [target.adapter_id for target in parts]
    for record in await asyncio.to_thread(state.registry.list):
        if record.merge is not None and _is_made_so(record.merge, merge, ids):
            return await state.find_target(record.name)
    options = {"density": merge.density, "majority_sign_method": merge.majority_sign}
    wanted = {
        "adapters": [{"name": part.name, "weight": part.weight} for part in merge.parts],
        "method": merge.method,
        **{name: value for name, value in options.items() if value is not None},
    }
    raise ApiError(
        404,
        "merged_adapters: adapters are merged when that is registered, not by a request; send to "
        f"/v1/load_lora_adapter a lora_name and merge {msgspec.json.encode(wanted).decode()}, and ask for it "
        "so or by its name. The parts must have one scale, alpha / r",
    )


def _is_made_so(made: Merge, wanted: Merge, ids: Sequence[int | None]) -> bool:
    """Whether `made` is `wanted` of these generations. LoRAX scales by the first part's alpha / r alone."""
    scales = {part.scale for part in made.parts}
    return (
        made.method == wanted.method
        and made.density == wanted.density
        and (made.majority_sign or TOTAL) == (wanted.majority_sign or TOTAL)
        and [part.adapter_id for part in made.parts] == list(ids)
        and all(
            math.isclose(a.weight, b.weight, rel_tol=1e-6)
            for a, b in zip(made.parts, wanted.parts, strict=True)
        )
        and len(scales) == 1
        and None not in scales
    )
