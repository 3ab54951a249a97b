"""What prompts of a trace have in common: the names of their blocks, and of the pages that these fill."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toppings.core import BlockHash, Request


@dataclass(frozen=True, eq=False)
class PromptBlocks:
    """`ids[indptr[i]:indptr[i + 1]]` name the blocks of `block_len` tokens that prompt i begins with; the
    last one may be shorter. Prompts with a block of the same id are the same up to its end. `ids` int64 [B],
    `indptr` int64 [N + 1]."""

    ids: NDArray[np.int64]
    indptr: NDArray[np.int64]
    block_len: int

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], block_len: int) -> "PromptBlocks":
        indptr = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
        ids = np.fromiter((each for ids in lists for each in ids), np.int64, int(indptr[-1]))
        return cls(ids, indptr.astype(np.int64), block_len)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> list[int]:
        ids: list[int] = self.ids[self.indptr[row] : self.indptr[row + 1]].tolist()
        return ids

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "PromptBlocks":
        """Those of these prompts, in this order."""
        return PromptBlocks.of([self[int(row)] for row in rows], self.block_len)


class TraceNames:
    """Names pages by the trace instead of by their tokens, which it does not have: those that a prompt's
    blocks cover are named by the block of their last token, all others, of output too, are nobody else's.

    A request's id is its number in the trace.
    """

    def __init__(self, blocks: PromptBlocks, page_size: int) -> None:
        self._blocks, self._page_size = blocks, page_size

    def extend(self, request: Request, num_tokens: int) -> None:
        names: list[Hashable] = request.block_hashes
        first, last = len(names), num_tokens // self._page_size
        if last <= first:
            return
        row, adapter_id, page_size = int(request.request_id), request.adapter_id, self._page_size
        block_len, ids = self._blocks.block_len, self._blocks[row]
        num_covered = min(len(ids) * block_len, len(request.prompt_token_ids)) // page_size
        for page in range(first, min(last, num_covered)):
            names.append((adapter_id, ids[((page + 1) * page_size - 1) // block_len], page))
        names.extend((row, page) for page in range(max(first, num_covered), last))

    def tail(self, request: Request, num_tokens: int) -> BlockHash:
        row, block_len = int(request.request_id), self._blocks.block_len
        ids = self._blocks[row]
        is_covered = num_tokens <= min(len(ids) * block_len, len(request.prompt_token_ids))
        last = (request.adapter_id, ids[(num_tokens - 1) // block_len]) if is_covered else (row,)
        return ("tail", num_tokens, last)
