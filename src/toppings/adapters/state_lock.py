"""Who uses a state directory: one process that alone writes to it, or several that share it knowingly."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from toppings.adapters.errors import StateError, StateHeldError

OWNER = "owner.lock"


class StateLock:
    """Held until `close`, or until the process ends in whatever way."""

    def __init__(self, file: TextIO, *, is_shared: bool) -> None:
        self.is_shared = is_shared
        self._file = file

    @classmethod
    def take(
        cls, directory: Path, purpose: str, *, is_shared: bool = False, file: str = OWNER
    ) -> "StateLock":
        """`purpose`: what others are told of this process, e.g. "toppings serve". Never waits.

        Raises StateHeldError where another has it, StateError where the directory cannot be written to.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stream = open(directory / file, "a+")  # noqa: SIM115 - it is open as long as the lock is held
        except OSError as error:
            raise StateError(_unusable(directory, error)) from error
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(stream)
            stream.close()
            raise StateHeldError(
                f"the state directory {directory} is in use by {holder}; name another one "
                "(--state-dir, state_dir=) or end that process"
            ) from None
        except OSError as error:
            stream.close()
            raise StateError(_unusable(directory, error)) from error
        with suppress(OSError):  # a full disk: others are told less
            stream.truncate(0)
            stream.write(f"{os.getpid()} {purpose}")
            stream.flush()
        return cls(stream, is_shared=is_shared)

    def close(self) -> None:
        """A second call does nothing."""
        with suppress(OSError):
            self._file.close()


def _unusable(directory: Path, error: OSError) -> str:
    return f"cannot use the state directory {directory}: {error.strerror}; name another one with --state-dir"


def _holder(stream: TextIO) -> str:
    stream.seek(0)
    pid, _, purpose = stream.read(1000).partition(" ")
    return f"process {pid} ({purpose})" if pid and purpose else "another process"
