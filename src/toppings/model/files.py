"""The files of a checkpoint: what their JSON holds, and where each tensor is."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 64 << 20
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError where it is missing, too large, or holds no object."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        content = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(
            f"{file.parent} is not a Hugging Face checkpoint: cannot read {file.name}: {error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, not {type(content).__name__}")
    return content


def read_generation_config(path: Path) -> dict[str, Any]:
    """Empty where the checkpoint has none. Raises ValueError as `read_json`."""
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else {}


def stored_float_dtype(path: Path) -> str | None:
    """The name of the type of the first float among the weights; None where there is none."""
    with ExitStack() as stack:
        for name, file in open_tensors(path, stack).items():
            if (kind := file.get_slice(name).get_dtype()) in FLOATS:
                return FLOATS[kind]
    return None


def open_tensors(path: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of every tensor of the checkpoint, by tensor name. Raises ValueError."""
    places: dict[str, Any] = {}
    for file in _files(path):
        try:
            opened = stack.enter_context(safe_open(str(file), framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        places.update(dict.fromkeys(opened.keys(), opened))
    return places


def _files(path: Path) -> list[Path]:
    """In the order in which a tensor that is in several is taken from the last."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError(f"{index} must have a weight_map of tensors to files")
        return [path / name for name in sorted(set(weight_map.values()))]
    if list(path.glob("*.bin")) or list(path.glob("*.pt")) or list(path.glob("*.pth")):
        raise ValueError(
            f"{path} holds pickled weights, which can run code when read; convert them to safetensors"
        )
    raise ValueError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
