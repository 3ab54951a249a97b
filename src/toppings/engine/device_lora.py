"""The adapters' part of one forward, computed on the device: the decoder's `LoraContext`."""

import time
from collections.abc import Sequence

from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.loader import LoadHandle
from toppings.adapters.modes import LoadingMode
from toppings.core import GROUPS
from toppings.model.decoder import LoraContext
from toppings.ops.columns import adjust_columns_
from toppings.ops.lora import LoraSegments, add_lora_


class LoraSum:
    """Several parts of one forward, in this order."""

    def __init__(self, *parts: LoraContext) -> None:
        self._parts = parts

    def start(self, layer: int, group: str, x: Tensor) -> None:
        for part in self._parts:
            part.start(layer, group, x)

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        for part in self._parts:
            part.finish(layer, group, x, y)


class DeviceLora:
    """Adds every adapter's product to the base model's, waiting for weights where the mode says so.

    `out_offsets` gives, per projection group, the column of the fused output at which each module begins;
    `groups` are those that any adapter of the step changes in any layer, the others cost no call. `loads` are
    the loads under way when the step began; `wait_s` adds up what they made this step wait. `adjusts`:
    columns have gains and offsets, by default where the step's adapters have.
    """

    def __init__(
        self,
        pool: DevicePool,
        segments: LoraSegments,
        out_offsets: dict[str, tuple[int, ...]],
        groups: frozenset[str],
        *,
        loads: Sequence[LoadHandle] = (),
        mode: LoadingMode | None = None,
        adjusts: bool | None = None,
    ) -> None:
        assert mode is not None or not loads
        self._pool = pool
        self._segments = segments
        self._out_offsets = out_offsets
        self._loads = loads
        self._mode = mode
        self._groups = groups
        self._adjusts = pool.has_columns(segments.slots) if adjusts is None else adjusts
        self.wait_s = 0.0

    def start(self, layer: int, group: str, x: Tensor) -> None:
        """Nothing to send ahead: the weights come to the device, not the rows to the weights."""

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        if self._loads and group == "qkv":  # the first group of a layer
            self._await_layer(layer)
        if group not in self._groups:
            return
        if self._adjusts:
            adjust_columns_(
                y,
                arena=self._pool.arena,
                places=self._pool.columns[:, layer, GROUPS[group][0] :],
                out_offsets=self._out_offsets[group],
                segments=self._segments,
            )
        add_lora_(
            y,
            x,
            arena=self._pool.arena,
            table=self._pool.table,
            layer=layer,
            group=GROUPS[group],
            out_offsets=self._out_offsets[group],
            segments=self._segments,
        )

    def _await_layer(self, layer: int) -> None:
        assert self._mode is not None
        started_at = time.perf_counter()
        for load in self._loads:
            self._mode.wait_before_layer(load, layer)
        self.wait_s += time.perf_counter() - started_at
