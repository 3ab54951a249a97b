"""Which failures of a step no later step can get over."""

import torch

from toppings.vital import EngineLostError

_STICKY: type[Exception] | None = getattr(torch, "AcceleratorError", None)


class FollowerLostError(EngineLostError):
    """A process that holds a part of the model has ended, or is out of step: the engine cannot go on."""


def is_sticky(error: BaseException | None) -> bool:
    """The device's context is lost (an illegal access, a failed launch): all that is asked of it from now on
    fails. Memory that has run out is not among them."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        if (_STICKY is not None and isinstance(error, _STICKY)) or "CUDA error" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
