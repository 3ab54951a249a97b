"""The base model's weights, read from its checkpoint one at a time: for adapters that are told relative to
them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toppings.adapters.errors import AdapterError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaseWeights:
    """The checkpoint in `path`, whose weights are served in `dtype`."""

    path: Path
    dtype: str

    @contextmanager
    def open(self) -> Iterator["OpenWeights"]:
        """Raises AdapterError where the checkpoint cannot be read."""
        from toppings.model.files import open_tensors

        with ExitStack() as stack:
            try:
                places = open_tensors(self.path, stack)
            except ValueError as error:
                raise AdapterError(f"the base model's weights cannot be read: {error}") from error
            yield OpenWeights(places, self.dtype)


@dataclass(frozen=True)
class OpenWeights:
    _places: dict[str, Any]
    _dtype: str

    def weight(self, module: str) -> "torch.Tensor":
        """[out, in] of a projection, [vocabulary, hidden] of the embedding: fp32, rounded as it is served.

        Raises AdapterError where there is none.
        """
        found = self.find(f"{module}.weight")
        if found is None:
            raise AdapterError(f"the base model's checkpoint has no {module}.weight")
        return found

    def bias(self, module: str) -> "torch.Tensor | None":
        """[out], likewise."""
        return self.find(f"{module}.bias")

    def find(self, name: str) -> "torch.Tensor | None":
        import torch

        if (file := self._places.get(name)) is None:
            return None
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(getattr(torch, self._dtype)).float()
