"""Where one request's output stands in its structure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from toppings.grammar import StructureError
from toppings.ops.token_mask import TokenMask, num_words
from toppings.sandbox.grammars import raise_error_of


class Guide:
    """Used by one thread at a time. `matcher`: a compiled structure's, which is copied."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher.deep_copy()
        self._num_words = num_words(vocab_size)
        self._num_followed = 0

    def mask(self, output: Sequence[int]) -> TokenMask:
        """The tokens that may follow `output`, which begins with what it was the last time; nothing but the
        end of the sequence where the structure is complete.

        Raises StructureError where the output is none of the structure's, or going on is too much.
        """
        mask = np.zeros(self._num_words, np.int32)
        try:
            self._follow(output)
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            raise_error_of(self._matcher)
        except BaseException as error:  # a panic in the library is no Exception
            raise StructureError(f"the output's structure cannot be followed any further: {error}") from error
        return mask

    def _follow(self, output: Sequence[int]) -> None:
        """What is drawn beyond the end is dropped by whoever runs ahead."""
        new = list(output[self._num_followed :])
        self._num_followed += len(new)
        while new and not self._matcher.is_stopped():
            self._matcher.consume_token(new.pop(0))
            raise_error_of(self._matcher)
