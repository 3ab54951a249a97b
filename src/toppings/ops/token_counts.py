"""Which tokens occurred in a sequence and how often in its output, kept from step to step: penalties read no
history twice."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_FIRST_ROOM = 256


class TokenCounts:
    """Begins with tokens that are `seen` but not of the output, as a prompt's."""

    def __init__(self, seen: Iterable[int] = ()) -> None:
        tokens = np.unique(np.fromiter(seen, np.int64))
        self._places = {token: place for place, token in enumerate(tokens.tolist())}
        self._token_ids = tokens
        self._times = np.zeros(len(tokens), np.int64)
        self._counted: list[int] = []

    def follow(self, output: list[int]) -> None:
        """`output`: all of it; what has grown since the last call is counted. Last tokens that it has no
        longer, since their step was run again, are not."""
        while self._counted and self._counted[-1:] != output[len(self._counted) - 1 : len(self._counted)]:
            self._add(self._counted.pop(), -1)
        for token in output[len(self._counted) :]:
            self._add(token, 1)
            self._counted.append(token)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """Of every token that occurred, once, [n]."""
        return self._token_ids[: len(self._places)]

    @property
    def times(self) -> npt.NDArray[np.int64]:
        """Of each of `token_ids`, how often it is in the output, [n]."""
        return self._times[: len(self._places)]

    def _add(self, token: int, times: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place >= len(self._token_ids):
            room = max(_FIRST_ROOM, 2 * len(self._token_ids))
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, np.int64)])
            self._times = np.concatenate([self._times, np.zeros(room, np.int64)])
        self._token_ids[place] = token
        self._times[place] += times
