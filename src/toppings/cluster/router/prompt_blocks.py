"""Names for the blocks of a prompt as it stands in a body: the router has no tokeniser, and needs none.

As in a server's cache (`engine/block_hashes.py`) a block's name is a hash of the one before it and of what it
holds; the first one's begins with all else that decides what a prompt becomes. Prompts that begin with the
same bytes begin with the same tokens, but for the last of them; where a client writes the same prompt in
another way, what they have in common is missed.
"""

import os
from collections.abc import Iterable
from hashlib import blake2b

BLOCK_BYTES = 1024
"""Some 256 tokens of text: what a prompt shares is known to within one block."""
MAX_BLOCKS = 256
"""Of one prompt, named within half a millisecond; what is behind is not looked at."""
NAME_BYTES = 16
_SEED = os.urandom(NAME_BYTES)
"""Nobody can look for two prompts of one name beforehand."""


def name_blocks(root: Iterable[bytes], prompt: bytes | memoryview) -> tuple[bytes, ...]:
    """One for each full block."""
    num = min(len(prompt) // BLOCK_BYTES, MAX_BLOCKS)
    if not num:
        return ()
    first = blake2b(_SEED, digest_size=NAME_BYTES)
    for part in root:
        first.update(len(part).to_bytes(8, "little") + part)
    name, names, text = first.digest(), [], memoryview(prompt)
    for at in range(0, num * BLOCK_BYTES, BLOCK_BYTES):
        block = blake2b(name, digest_size=NAME_BYTES)
        block.update(text[at : at + BLOCK_BYTES])
        name = block.digest()
        names.append(name)
    return tuple(names)
