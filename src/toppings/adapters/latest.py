"""What is remembered of many, so that it never grows without end."""

from collections import OrderedDict
from contextlib import suppress
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Latest(OrderedDict[K, V]):
    """The `size` entries that were set last. Several threads may use it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)  # it is the newest from now on
        super().__setitem__(key, value)
        if len(self) > self._size:
            with suppress(KeyError):
                self.popitem(last=False)
