"""How many files, connections among them, this process may have open, and what says that it has no more."""

import errno
import logging
import resource

logger = logging.getLogger(__name__)

OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE})


def raise_file_limit() -> int | None:
    """Let this process open as many files as it may; returns how many, or None where nothing limits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:
            logger.warning("the limit of open files stays at %d: %s", soft, error)
    return None if soft == resource.RLIM_INFINITY else soft


def is_out_of_files(error: BaseException) -> bool:
    """Whether a call failed because this process, or its machine, has too many files open."""
    return isinstance(error, OSError) and error.errno in OUT_OF_FILES
