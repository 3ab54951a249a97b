"""Where what strangers write is executed: patterns and chat templates of checkpoints, grammars of requests.

They are small programs that may run for ever or ask for all memory. They run in processes of
their own, bounded in processor time and memory, that hold no secrets, write no files and can be killed at any
moment.
"""

from toppings.sandbox.pool import Sandbox, SandboxBusyError, SandboxError, SandboxLostError

__all__ = ["Sandbox", "SandboxBusyError", "SandboxError", "SandboxLostError"]
