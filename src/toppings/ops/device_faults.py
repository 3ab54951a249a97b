"""Which failures of a device no later work on it can get over."""

import re

import torch

_STICKY: type[Exception] | None = getattr(torch, "AcceleratorError", None)
# torch's words, and those of the driver's own calls
_WORDS = re.compile(r"CUDA error|CUDA_ERROR_(?!OUT_OF_MEMORY)")


def is_sticky(error: BaseException | None) -> bool:
    """The device's context is lost (an illegal access, a failed launch): all that is asked of it from now on
    fails. Memory that has run out is not among them."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        if (_STICKY is not None and isinstance(error, _STICKY)) or _WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
