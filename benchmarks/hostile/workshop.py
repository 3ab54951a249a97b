"""Writes PEFT checkpoints for a base model of given shapes, good ones and, by parts, any others."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from toppings.adapters.checkpoint_plan import module_name
from toppings.adapters.layout import BaseShapes
from toppings.core import MODULES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "v_proj")
RANK = 4
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workshop:
    shapes: BaseShapes

    def config(self, **changed: Any) -> dict[str, Any]:
        return {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": list(TARGETS), **changed}

    def key(self, layer: int, module: str, half: str) -> str:
        return f"base_model.model.{module_name(layer, MODULES.index(module))}.lora_{half}.weight"

    def tensors(self, rank: int = RANK, targets: tuple[str, ...] = TARGETS) -> Tensors:
        """Small values, the same every time."""
        generator = torch.Generator().manual_seed(0)
        made = {}
        for layer in range(self.shapes.num_layers):
            for module in targets:
                size_in, size_out = self.shapes.sizes[MODULES.index(module)]
                made[self.key(layer, module, "A")] = torch.randn(rank, size_in, generator=generator) * 0.05
                made[self.key(layer, module, "B")] = torch.randn(size_out, rank, generator=generator) * 0.05
        return made

    def write(self, path: Path, tensors: Tensors | None = None, **changed: Any) -> Path:
        """A checkpoint whose configuration has some fields `changed`; one set to `...` is left out."""
        path.mkdir(parents=True, exist_ok=True)
        fields = {name: value for name, value in self.config(**changed).items() if value is not ...}
        (path / CONFIG).write_text(json.dumps(fields))
        tensors = self.tensors() if tensors is None else tensors
        safetensors.torch.save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        return path

    def write_weights(self, path: Path, data: bytes) -> None:
        self.write(path)
        (path / WEIGHTS).write_bytes(data)

    def header(self) -> dict[str, Any]:
        """Of a good weights file, whose data `data` holds."""
        header, place = {}, 0
        for key, tensor in self.tensors().items():
            end = place + tensor.numel() * 4
            header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, end]}
            place = end
        return header

    def data(self) -> bytes:
        return b"".join(np.ascontiguousarray(tensor.numpy()).tobytes() for tensor in self.tensors().values())

    def file(self, header: object, data: bytes | None = None, length: int | None = None) -> bytes:
        """A weights file with this header (JSON, or bytes as they are), which says that it has `length`."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + (data or b"")


Make = Callable[[Workshop, Path], object]


@dataclass(frozen=True)
class Kind:
    """One way for an adapter to be odd: `make` writes it to a folder of its own.

    It is refused with a reason that matches `reason`, or served exactly as PEFT would; `must_serve` leaves no
    choice. `is_plain`: what PEFT computes is what it computes for the plain adapter, and PEFT need not be
    asked (some it cannot read at all, or not within a lifetime).
    """

    name: str
    make: Make
    reason: str = ""
    must_serve: bool = False
    is_plain: bool = False
