"""What can be wrong with an adapter, and with the place where adapters are kept."""


class AdapterError(ValueError):
    """The adapter cannot be registered or served; the message names the offending key or value."""


class AdapterNotFound(AdapterError):
    """No adapter of this name or id is registered, or no directory is at its path."""


class AdapterExists(AdapterError):
    """The name is taken, and replacing was not asked for."""


class AdapterNameReserved(AdapterError):
    """The base model goes by this name."""


class StateError(OSError):
    """The state directory cannot be used, now or at all: nobody's adapter is at fault."""


class StateFullError(StateError):
    """The disk of the state directory is full."""


class StateHeldError(StateError):
    """Another process holds the state directory."""
