"""The base model's weights, read from its checkpoint one at a time: for adapters that are told relative to
them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toppings.adapters.errors import AdapterError
from toppings.adapters.text_files import TextFiles

if TYPE_CHECKING:
    import torch


EMBED, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class BaseWeights:
    """The checkpoint in `path`, whose weights are served in `dtype`. `is_tied`: its output layer is its
    embedding."""

    path: Path
    dtype: str
    is_tied: bool = False

    @contextmanager
    def open(self) -> Iterator["OpenWeights"]:
        """Raises AdapterError where the checkpoint cannot be read."""
        from toppings.model.prequantized import open_weights

        with ExitStack() as stack:
            try:
                places = open_weights(self.path, stack)
            except ValueError as error:
                raise AdapterError(f"the base model's weights cannot be read: {error}") from error
            yield OpenWeights(places, self.dtype, self.is_tied)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding. Raises AdapterError as `open`."""
        with self.open() as weights:
            return weights.shape(EMBED)[0]

    @cached_property
    def text(self) -> TextFiles:
        """What its tokeniser's files say."""
        return TextFiles.read(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        """Raises ValueError where there is none that can be used."""
        from toppings.model.tokenizer import load_tokenizer

        try:
            return load_tokenizer(self.path)
        except Exception as error:  # the library raises whatever its parsers do
            raise ValueError(f"cannot read the base model's tokeniser: {error}") from error


@dataclass(frozen=True)
class OpenWeights:
    _places: dict[str, Any]
    _dtype: str
    is_tied: bool

    def weight(self, module: str) -> "torch.Tensor":
        """[out, in] of a projection, [vocabulary, hidden] of the embedding: fp32, rounded as it is served.

        Raises AdapterError where there is none.
        """
        found = self.find(f"{self._stored_name(module)}.weight")
        assert found is not None
        return found

    def shape(self, module: str) -> tuple[int, ...]:
        """Of its weight. Raises AdapterError where there is none."""
        name = f"{self._stored_name(module)}.weight"
        return tuple(self._places[name].get_slice(name).get_shape())

    def modules(self) -> list[str]:
        """Those that have a weight."""
        found = [name.removesuffix(".weight") for name in self._places if name.endswith(".weight")]
        return found if HEAD in found else [*found, HEAD]

    def _stored_name(self, module: str) -> str:
        """A tied output layer may be stored as the embedding alone, and the other way round."""
        tied = {HEAD: EMBED, EMBED: HEAD}
        for name in (module, tied.get(module, module)):
            if f"{name}.weight" in self._places and (name == module or self.is_tied):
                return name
        raise AdapterError(f"the base model's checkpoint has no {module}.weight")

    def bias(self, module: str) -> "torch.Tensor | None":
        """[out], likewise."""
        return self.find(f"{module}.bias")

    def find(self, name: str) -> "torch.Tensor | None":
        import torch

        if (file := self._places.get(name)) is None:
            return None
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(getattr(torch, self._dtype)).float()
