"""Reads a PEFT checkpoint whole, or refuses it with the reason."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toppings.adapters.base_weights import BaseWeights
from toppings.adapters.checkpoint_plan import CheckpointPlan, Place
from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.folding import ProjectionWeights
from toppings.adapters.layout import BaseShapes, gain_name, offset_name, ranks_of_extras
from toppings.adapters.peft_config import CONFIG_FILE, PeftConfig
from toppings.adapters.pickled import PICKLES
from toppings.adapters.regular_files import open_regular
from toppings.adapters.stored_tensors import WEIGHTS_FILE, StoredTensors
from toppings.adapters.text_files import TEXT_FILES, TextFiles
from toppings.adapters.vocabulary import Vocabulary, own_vocabulary
from toppings.bad_input import RequestError, check_unicode, shown
from toppings.core import MODULES

if TYPE_CHECKING:
    import torch

__all__ = ["AdapterCheckpoint", "AdapterError", "AdapterNotFound", "fingerprint", "read_checkpoint"]

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A valid adapter for `shapes`. `weights` is keyed by (layer, `MODULES` index).

    `digest` is the SHA-256 of all that it is served by; `fingerprint` sizes and modification times of its
    files before they were read; `chat_template` its own, if it brings one; `invocation_tokens` those of an
    activated LoRA; `vocabulary` its own, if it has one; `warnings` what was ignored; `outer` what is outside
    the projections, by layer and name; `is_plain`: A and B are the tensors that PEFT has saved.
    """

    path: Path
    base_model: str
    shapes: BaseShapes
    weights: Mapping[Place, ProjectionWeights]
    digest: str
    fingerprint: str
    chat_template: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    vocabulary: Vocabulary | None = None
    warnings: tuple[str, ...] = ()
    outer: Mapping[int, Mapping[str, "torch.Tensor"]] = field(default_factory=dict)
    is_plain: bool = False

    def ranks(self) -> list[list[int]]:
        """Per layer and `MODULES` index, 0 where not targeted."""
        ranks = [[0] * len(MODULES) for _ in range(self.shapes.num_layers)]
        for (layer, module), weights in self.weights.items():
            ranks[layer][module] = weights.a.shape[0]
        return ranks

    def outer_ranks(self) -> dict[str, int]:
        """Of what has a LoRA outside the projections."""
        tensors = (extra for each in self.outer.values() for extra in each.items())
        return ranks_of_extras((name, tuple(tensor.shape)) for name, tensor in tensors)

    def extras(self, layer: int) -> dict[str, "torch.Tensor"]:
        """What the layer has beside A and B, by name, as `layout.LayerLayout` calls it."""
        found: dict[str, torch.Tensor] = {}
        for module in range(len(MODULES)):
            if (weights := self.weights.get((layer, module))) is None:
                continue
            for name, tensor in ((gain_name(module), weights.gain), (offset_name(module), weights.offset)):
                if tensor is not None:
                    found[name] = tensor
        return found | dict(self.outer.get(layer, {}))


def fingerprint(path: str | Path) -> str:
    """Sizes and modification times of the checkpoint's files: changes whenever they are written.

    Raises FileNotFoundError where its configuration or weights are missing.
    """
    stats = [os.stat(f"{path}/{CONFIG_FILE}"), os.stat(f"{path}/{WEIGHTS_FILE}")]
    for name in TEXT_FILES:
        with suppress(FileNotFoundError):
            stats.append(os.stat(f"{path}/{name}"))
    return ":".join(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)


def read_checkpoint(
    path: str | Path,
    shapes: BaseShapes,
    roots: Sequence[Path] | None = None,
    base: BaseWeights | None = None,
) -> AdapterCheckpoint:
    """The adapter in the directory `path`, all of it in memory and checked against the base model's `shapes`.

    `roots`: its files must lie below one of these directories, with every link followed; None: anywhere.
    `base`: where to read the base model's weights, which some kinds of adapters need, and its tokeniser, to
    which an adapter may add tokens; None: nowhere.
    Warnings are logged, too. Raises AdapterError with the reason; AdapterNotFound where `path` is no
    directory.
    """
    path = Path(path).absolute()
    try:
        check_unicode("path", str(path))
    except RequestError as error:  # the registry could not keep it
        raise AdapterError(f"adapter {shown(ascii(str(path)))}: {error}; rename it") from error
    try:
        if not path.is_dir():
            raise AdapterNotFound(f"no adapter directory at {path}")
        _check_files(path)
        checkpoint = _read(path, shapes, roots, base)
    except OSError as error:
        raise AdapterError(f"cannot read adapter {path}: {error}") from error
    for warning in checkpoint.warnings:
        logger.warning("adapter %s: %s", path, warning)
    return checkpoint


def _read(
    path: Path,
    shapes: BaseShapes,
    roots: Sequence[Path] | None,
    base: BaseWeights | None,
) -> AdapterCheckpoint:
    mark = fingerprint(path)
    try:
        config_bytes = _read_config(path / CONFIG_FILE, roots)
        config = PeftConfig.read(config_bytes)
        digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little") + config_bytes)
        with _naming(WEIGHTS_FILE), open_regular(path / WEIGHTS_FILE, roots) as file:
            stored = StoredTensors(file)
            plan = CheckpointPlan(stored.by_key, config, shapes, base)
            digest.update(stored.head)
            tensors = stored.read(plan.keys, digest.update)
        weights, outer = plan.weights(tensors)
    except AdapterError as error:
        raise AdapterError(f"adapter {path}: {error}") from error
    text = TextFiles.read(path, roots)
    if text.chat_template is not None:
        digest.update(b"chat_template" + text.chat_template.encode("utf-8", "surrogatepass"))
    vocabulary, differences = None, list[str]()
    if base is not None:
        try:
            vocabulary, differences = own_vocabulary(text, plan.vocab_size, base)
        except AdapterError as error:
            raise AdapterError(f"adapter {path}: {error}") from error
    if vocabulary is not None:
        digest.update(b"vocabulary" + vocabulary.to_json().encode("utf-8", "surrogatepass"))
    return AdapterCheckpoint(
        path=path,
        base_model=config.base_model,
        invocation_tokens=config.invocation_tokens,
        vocabulary=vocabulary,
        shapes=shapes,
        weights=weights,
        outer=outer,
        is_plain=config.is_plain,
        digest=digest.hexdigest(),
        fingerprint=mark,
        chat_template=text.chat_template,
        warnings=(*config.warnings, *plan.warnings, *text.warnings, *differences),
    )


def _read_config(file: Path, roots: Sequence[Path] | None) -> bytes:
    with _naming(CONFIG_FILE), open_regular(file, roots) as stream:
        data = stream.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    return data


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the system says of a failed read does not name the file."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"cannot read {name}: {error.strerror or error}") from error


def _check_files(path: Path) -> None:
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(f"adapter {path}: {CONFIG_FILE} is missing")
    if not (path / WEIGHTS_FILE).is_file():
        pickle = next((name for name in PICKLES if (path / name).exists()), None)
        found = (
            f"; {pickle} is a pickle, which is not read: toppings adapters convert makes safetensors of it"
            if pickle
            else ""
        )
        raise AdapterError(f"adapter {path}: {WEIGHTS_FILE} is missing{found}")
