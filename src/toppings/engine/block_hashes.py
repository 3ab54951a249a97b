"""Names for full pages of the key-value cache, by what they hold."""

import os
from array import array
from hashlib import blake2b

from toppings.core import Request

HASH_BYTES = 16


class BlockHasher:
    """A block's name is a hash of the name of the block before it, of the adapter that has made it (its id: a
    generation, which is never used twice) and of its tokens; before the first one comes the request's salt.

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
        adapter = b"" if request.adapter_id is None else request.adapter_id.to_bytes(8, "little")
        name = names[-1] if names else self._root(request.cache_salt)
        assert isinstance(name, bytes)
        for at in range(0, len(data), step):
            name = blake2b(name + data[at : at + step] + adapter, digest_size=HASH_BYTES).digest()
            names.append(name)

    def _root(self, salt: str | None) -> bytes:
        return self._seed if salt is None else blake2b(self._seed + salt.encode(), digest_size=16).digest()
