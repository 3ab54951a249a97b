"""What can be wrong with an adapter."""


class AdapterError(ValueError):
    """The adapter cannot be registered or served; the message names the offending key or value."""


class AdapterNotFound(AdapterError):
    """No adapter of this name or id is registered, or no directory is at its path."""


class AdapterExists(AdapterError):
    """The name is taken, and replacing was not asked for."""
