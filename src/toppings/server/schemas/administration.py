"""Answers about adapters and the server itself."""

from typing import Literal

from pydantic import BaseModel


class MergedPart(BaseModel):
    name: str
    weight: float
    id: int
    digest: str
    is_current: bool


class Merged(BaseModel):
    method: str
    density: float | None
    majority_sign_method: str | None
    seed: int | None
    adapters: list[MergedPart]


class AdapterRow(BaseModel):
    """`hits`, `running` and `waiting` count all who use it; only administrators are told them."""

    name: str
    id: int
    path: str
    rank: int
    step_rank: int
    targets: list[str]
    bytes: int
    digest: str
    merge: Merged | None
    is_pinned: bool
    state: Literal["device", "host", "disk"]
    layers_on_device: int
    hits: int | None = None
    running: int | None = None
    waiting: int | None = None


class AdapterList(BaseModel):
    adapters: list[AdapterRow]


class Pin(BaseModel):
    name: str
    is_pinned: bool


class Prefetch(BaseModel):
    name: str


class SglangAnswer(BaseModel):
    success: bool
    error_message: str
    loaded_adapters: dict[str, str]
    warning: str | None = None


class Span(BaseModel):
    """In ms after the request's arrival at the engine."""

    from_ms: float
    to_ms: float


class ColdLayer(BaseModel):
    load: Span | None
    num_products: int
    num_cpu_products: int
    num_slices: int
    cpu: Span | None


class ColdStep(BaseModel):
    span: Span
    num_tokens: int
    load_wait_ms: float


class ColdStart(BaseModel):
    tier: Literal["disk", "host"]
    read_ms: float
    copy_ms: float
    exposed_ms: float
    compute_ms: float
    adapter_id: int
    rank: int
    num_bytes: int
    arrived_at: float
    queue_ms: float
    first_token_ms: float
    read: Span | None
    layers: list[ColdLayer]
    steps: list[ColdStep]


class ToldColdStart(BaseModel):
    request_id: str
    tenant: str
    adapter: str
    num_prompt_tokens: int
    place: Literal["device", "cpu", "both"]
    cold_start: ColdStart


class ColdStarts(BaseModel):
    cold_starts: list[ToldColdStart]


class Stats(BaseModel):
    """What the engine and its queue hold; more fields than these."""

    model: str
    mode: str
    num_open: int
    num_pending: int
    max_queue: int
    num_adapters: int
    num_running: int
    num_waiting: int
