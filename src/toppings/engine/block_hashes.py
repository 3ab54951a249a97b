"""Names for pages of the key-value cache, by what they hold."""

import os
from array import array
from hashlib import blake2b

from toppings.core import BlockHash, Request

HASH_BYTES = 16


class BlockHasher:
    """A block's name is a hash of the name of the block before it, of the adapter that acted on it (its id: a
    generation, which is never used twice), if one did, and of its tokens; before the first one comes the
    request's salt. Where an activated LoRA begins to act within a block, the place counts as well.

    BLAKE2b, of 128 bits, from a beginning that is drawn for each process: nobody can look for two prompts of
    one name beforehand.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._seed = os.urandom(HASH_BYTES)

    def extend(self, request: Request, num_tokens: int) -> None:
        """Name the request's full pages as far as its first `num_tokens` tokens fill them; all are known."""
        names, page_size = request.block_hashes, self._page_size
        start, stop = len(names) * page_size, num_tokens // page_size * page_size
        if stop <= start or not request.is_cacheable:
            return
        tokens = array("i", request.token_ids(start, stop))
        step, data = page_size * tokens.itemsize, tokens.tobytes()
        name = names[-1] if names else self._root(request.cache_salt)
        assert isinstance(name, bytes)
        for at in range(0, len(data), step):
            adapter = self._adapter(request, len(names), page_size)
            name = blake2b(name + data[at : at + step] + adapter, digest_size=HASH_BYTES).digest()
            names.append(name)

    def tail(self, request: Request, num_tokens: int) -> BlockHash:
        """Of the page that its first `num_tokens` tokens end in, without filling it. Tokens stand in it as
        they are: there are few, and each may be asked for many times."""
        index, num_rows = divmod(num_tokens, self._page_size)
        tokens = tuple(request.token_ids(num_tokens - num_rows, num_tokens))
        return request.block_hashes[index - 1], self._adapter(request, index, num_rows), tokens

    def _adapter(self, request: Request, index: int, num_rows: int) -> bytes:
        """What the adapter has to do with the first rows of page `index`."""
        adapter_id, start = request.adapter_id, request.adapter_start - index * self._page_size
        if adapter_id is None or start >= num_rows:
            return b""
        return adapter_id.to_bytes(8, "little") + max(0, start).to_bytes(4, "little")

    def _root(self, salt: str | None) -> bytes:
        return self._seed if salt is None else blake2b(self._seed + salt.encode(), digest_size=16).digest()
