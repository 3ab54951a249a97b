"""Where what a checkpoint brings along is executed: its patterns and chat templates.

Both are small programs by strangers that may run for ever or ask for all memory. They run in processes of
their own, bounded in processor time and memory, that hold no secrets, write no files and can be killed at any
moment.
"""

from toppings.sandbox.pool import Sandbox, SandboxBusyError, SandboxError

__all__ = ["Sandbox", "SandboxBusyError", "SandboxError"]
