"""Opening files of strangers: never waiting for one, and only where it may lie."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

_KERNELS = ("/proc", "/sys")
"""Where files are what the kernel makes up as they are read: of this process, its environment."""


def open_regular(file: str | Path, roots: Sequence[Path] | None = None) -> BinaryIO:
    """Opens `file` to be read, without buffers of its own choosing, whatever links lead to it.

    Raises OSError, also for what is no regular file: opening a FIFO, or a device, might never return. Its
    place is asked of the opened file, so that no link can be put there meanwhile: PermissionError for one
    outside of all `roots` (None: anywhere will do), or that the kernel makes up.
    """
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(file))
        place = os.readlink(f"/proc/self/fd/{fd}")
        if _is_below(place, _KERNELS):
            raise PermissionError(errno.EACCES, "it is a link to a file of the kernel", str(file))
        if roots is not None and not _is_below(place, list(map(os.path.realpath, roots))):
            raise PermissionError(errno.EACCES, "it is a link that leads out of the adapter roots", str(file))
    except BaseException:
        os.close(fd)
        raise
    return open(fd, "rb")


def _is_below(place: str, directories: Sequence[str]) -> bool:
    return any(place.startswith(directory.rstrip("/") + "/") for directory in directories)
