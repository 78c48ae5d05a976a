"""What /proc shows of memory, as NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _page_flags
from kmm.errors import check_number, kernel_error
from kmm.params import (
    KPF_BUDDY,
    KPF_HWPOISON,
    MAX_NR_ZONES,
    MAX_ORDER,
    MIGRATE_TYPES,
    NR_PAGES_MAX,
)

if TYPE_CHECKING:
    from kmm.machine import Machine


def free_blocks(m: Machine) -> npt.NDArray[np.int64]:
    """Return how many free blocks there are, as pagetypeinfo shows them.

    :return: counts by [node, zone index, migratetype, order]: all possible nodes, 5 zones (DMA 0
        to Device 4), 5 migratetypes, orders 0 to 10; what is isolated counts, what lies on
        per-CPU lists does not.
    """
    counts = np.array([z.free_counts() for z in m.all_zones()], dtype=np.int64)
    return counts.reshape(len(m.nodes), MAX_NR_ZONES, MIGRATE_TYPES, MAX_ORDER)


def kpageflags(m: Machine, pfn: int, count: int) -> npt.NDArray[np.uint64]:
    """Return /proc/kpageflags of a range: a word of params.KPF_* bits a page.

    Pages are on their LRU list as soon as they are there, where the kernel keeps some waiting; a
    file's pages have buffers (PRIVATE) while they are dirty or written, and MAPPEDTODISK else.

    :param pfn: first page; count: pages.
    :raises InvalidArgument: for a range outside 64 TiB; OutOfMemory: if the host has no room for 8
        bytes a page (procfs.kpageflags tells runs).
    """
    check_number("pfn", pfn, 0, NR_PAGES_MAX - 1)
    check_number("count", count, 0, NR_PAGES_MAX - pfn)
    try:
        words = np.zeros(count, dtype=np.uint64)
    except MemoryError:
        raise kernel_error(-12, f"count: {count}; no room for 8 bytes a page") from None
    _page_flags.kpageflags(m.memmap_engine, pfn, words)
    for bad in poisoned_and_free(m, pfn, pfn + count):
        words[bad - pfn] |= np.uint64(KPF_HWPOISON)
    return words


def poisoned_and_free(m: Machine, start: int, end: int) -> list[int]:
    """Return the broken pages of a range that lie in free blocks, upward.

    Freeing a block as a whole leaves its pages their mark, and puts all of it on a free list.
    """
    word = np.zeros(1, dtype=np.uint64)
    out = []
    for pfn in sorted(p for p in m.hwpoison if start <= p < end):
        _page_flags.kpageflags(m.memmap_engine, pfn, word)
        if int(word[0]) & KPF_BUDDY:
            out.append(pfn)
    return out
