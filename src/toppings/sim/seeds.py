"""Random streams: one per seed and purpose, so that one more draw somewhere changes nothing elsewhere."""

from zlib import crc32

import numpy as np


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The stream of `purpose`; the same for the same arguments on every machine."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    return np.random.default_rng([seed, crc32(purpose.encode())])
