"""Memory that is read from end to end, in huge pages.

A decode step reads all weights. In pages of 4 KiB the CPU misses its table of pages at each of them, twice
over in a virtual machine, and what it reads ahead stops at a page's end; in pages of 2 MiB it reads up to
half as fast again. Linux joins pages where it is asked to (`madvise`, since Linux 6.1 at once).
Where an administrator has switched that off ("never"), memory stays as it is.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

Span = tuple[int, int]
"""[start, stop) of addresses."""

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MIN_BYTES = 16 << 20
"""Of all spans together: less stays in the caches."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_PART_BYTES = 64 << 20
"""Asked for at a time: where pages are scarce, the rest is tried all the same."""


def use_huge_pages(spans: Iterable[Span]) -> int:
    """Puts what lies in `spans` (of this process's own memory) into huge pages, where that can be; returns
    how many bytes do so now. Values and addresses stay."""
    wanted = list(spans)
    size = page_bytes()
    if size is None or sum(stop - start for start, stop in wanted) < MIN_BYTES:
        return 0
    libc, num_bytes = ctypes.CDLL(None), 0
    for start, stop in within(joined(wanted, size), private_memory(), size):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_HUGEPAGE)
        for part in range(start, stop, _PART_BYTES):
            length = min(_PART_BYTES, stop - part)
            done = libc.madvise(ctypes.c_void_p(part), ctypes.c_size_t(length), _MADV_COLLAPSE)
            num_bytes += length if done == 0 else 0
    return num_bytes


def page_bytes() -> int | None:
    """Of a huge page; None where there are none, or none are to be used."""
    try:
        if sys.platform != "linux" or "[never]" in (SETTINGS / "enabled").read_text():
            return None
        return int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None


def joined(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """In whole pages of `size`, neighbours as one."""
    found: list[Span] = []
    for start, stop in sorted((start // size * size, -(-stop // size) * size) for start, stop in spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    yield from found


def within(spans: Iterable[Span], regions: Iterable[Span], size: int) -> Iterator[Span]:
    """The parts of `spans` that are whole pages of one of the `regions`."""
    whole = [(-(-start // size) * size, stop // size * size) for start, stop in regions]
    for start, stop in spans:
        for first, last in whole:
            if max(start, first) < min(stop, last):
                yield max(start, first), min(stop, last)


def private_memory() -> Iterator[Span]:
    """Memory of this process that is no file's and nobody else's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        if rights == "rw-p" and inode == "0":
            start, _, stop = addresses.partition("-")
            yield int(start, 16), int(stop, 16)
