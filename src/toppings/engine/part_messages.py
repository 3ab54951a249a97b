"""What the lead of a split model tells its followers, and they it; MessagePack over a socket pair each."""

from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from toppings.adapters.mirror import Free, Load, MarkLoaded, Place, PoolCommand
from toppings.config import EngineConfig
from toppings.core import Batch, BatchItem, Request
from toppings.model.config import ModelConfig
from toppings.sampling_params import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)
_SCORED = SamplingParams(temperature=0.0, prompt_logprobs=0)


class Start(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The first message: `index` of its part of `model`, and the file by which the processes meet."""

    config: EngineConfig
    model: ModelConfig
    index: int
    store_path: str


class Begin(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All parts are loaded. The lead's arena, of `arena_bytes`, follows as a descriptor."""

    num_pages: int
    num_slots: int
    arena_bytes: int


class StepItem(msgspec.Struct, frozen=True, array_like=True):
    """`token_ids`: those of this step, of which the first `num_base_tokens` are the base model's; `slot`: of
    its adapter; `num_scored`: rows, from the first on, whose logits are wanted beside those to draw from;
    `copy_page` as in `BatchItem`."""

    token_ids: list[int]
    num_computed_tokens: int
    page_table: list[int]
    slot: int | None
    needs_sample: bool
    num_scored: int
    num_base_tokens: int
    copy_page: int | None


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    items: list[StepItem]


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Close and end."""


class Loaded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The follower's part of the model is there; it now waits for the others."""


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """It cannot start."""

    reason: str


class Landed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """These loads are in its pool."""

    load_ids: list[int]


ToFollower = Start | Begin | Step | Stop | PoolCommand
FromFollower = Loaded | Failed | Landed


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(kind: type, name: str) -> Any:
    assert kind is torch.dtype, kind
    return getattr(torch, name)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_name_of)
_TO_FOLLOWER: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(
    Start | Begin | Step | Stop | Place | MarkLoaded | Free | Load,
    dec_hook=_named,
)
_FROM_FOLLOWER: msgspec.msgpack.Decoder[FromFollower] = msgspec.msgpack.Decoder(Loaded | Failed | Landed)


def encode(message: ToFollower | FromFollower) -> bytes:
    return _ENCODER.encode(message)


def receive_command(connection: Connection) -> ToFollower:
    """Raises EOFError where the lead has gone."""
    return _TO_FOLLOWER.decode(connection.recv_bytes())


def receive_reply(connection: Connection) -> FromFollower:
    """Raises EOFError where the follower has gone."""
    return _FROM_FOLLOWER.decode(connection.recv_bytes())


class _StepRequest(Request):
    """A request of which only this step is known: its tokens stand in `prompt_token_ids`."""

    __slots__ = ("needs_sample", "num_scored")

    def __init__(self, number: int, item: StepItem) -> None:
        super().__init__(
            str(number),
            item.token_ids,
            _SCORED if item.num_scored else _GREEDY,
            item.slot,
            num_computed_tokens=item.num_computed_tokens,
            page_table=item.page_table,
            adapter_start=item.num_computed_tokens + item.num_base_tokens,
        )
        self.needs_sample = item.needs_sample
        self.num_scored = item.num_scored

    @property
    def num_tokens(self) -> int:
        return self.num_computed_tokens + len(self.prompt_token_ids) + (not self.needs_sample)

    def token_ids(self, start: int, stop: int) -> list[int]:
        return self.prompt_token_ids

    def scored_token_ids(self, num_tokens: int) -> list[int]:
        """As many as there are; the lead knows them."""
        return [0] * self.num_scored


def step_of(batch: Batch, slots: dict[int, int]) -> Step:
    """`slots` of the batch's adapters, by adapter id."""
    return Step(
        [
            StepItem(
                _new_tokens(item),
                item.request.num_computed_tokens,
                item.request.page_table,
                None if item.adapter_id is None else slots[item.adapter_id],
                item.needs_sample,
                len(item.request.scored_token_ids(item.num_tokens)),
                item.num_base_tokens,
                item.copy_page,
            )
            for item in batch.items
        ]
    )


def _new_tokens(item: BatchItem) -> list[int]:
    start = item.request.num_computed_tokens
    return item.request.token_ids(start, start + item.num_tokens)


def batch_of(step: Step) -> Batch:
    """The lead's batch, with slots for adapter ids and everything sampled greedily."""
    return Batch(
        [
            BatchItem(_StepRequest(i, item), len(item.token_ids), copy_page=item.copy_page)
            for i, item in enumerate(step.items)
        ]
    )
