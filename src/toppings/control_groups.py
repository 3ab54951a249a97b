"""How much memory this process may still take: what the machine has, and what its control groups allow."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

BOUND_V2, USED_V2 = "memory.max", "memory.current"
BOUND_V1, USED_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"


def memory_available(root: Path = Path("/")) -> int:
    """Bytes, by the kernel's estimate and the bounds of the process's group and of all above it.

    Pages of files that nobody has used lately count as free: the kernel takes them back first.
    """
    found = re.search(r"MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"))
    free = int(found[1]) * 1024 if found else 0
    for directory in _groups(root):
        for bound_name, used_name in ((BOUND_V2, USED_V2), (BOUND_V1, USED_V1)):
            bound, used = _number(directory / bound_name), _number(directory / used_name)
            if bound is not None and used is not None:
                free = min(free, max(0, bound - max(0, used - _inactive_file_bytes(directory))))
    return free


def _groups(root: Path) -> Iterator[Path]:
    """Directories of the process's memory groups, each with those above it, of both versions. In a container
    that sees only a part of the tree, what is below its mount is looked at."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in [mounts / "memory"] if controllers else [mounts, mounts / "unified"]:
            below = PurePosixPath(path.lstrip("/"))
            yield from (mount / part for part in (below, *below.parents))


def _inactive_file_bytes(directory: Path) -> int:
    """Of the group and those below it: version 1 tells the sum under a name of its own."""
    lines = [line.split() for line in _text(directory / "memory.stat").splitlines()]
    numbers = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    return numbers.get("total_inactive_file", numbers.get("inactive_file", 0))


def _number(path: Path) -> int | None:
    """None, too, of "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
