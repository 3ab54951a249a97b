"""Why an engine cannot go on, beside a device that is lost (ops/device_faults.py)."""

from toppings.vital import EngineLostError


class FollowerLostError(EngineLostError):
    """A process that holds a part of the model has ended, or is out of step: the engine cannot go on."""
