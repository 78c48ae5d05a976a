"""The records as the host has them: reserved at once, resident where written, given back."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Collection
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from kmm import _memmap
from kmm._buddy import BuddyZone
from kmm.params import (
    NR_PAGES_MAX,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PAGES_PER_SECTION,
    PFN_SECTION_SHIFT,
    PMD_SIZE,
)

# So many pageblocks have their records in one huge page of the host, of 2 MiB.
BLOCKS_OF_A_HUGE_PAGE = 342
# Huge pages of the host are advised for the records of so many pages at a time, 1.5 MiB.
RECORD_WINDOW_SHIFT = 17
MADV_NOHUGEPAGE = 15


def _reserve(nbytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(-1, nbytes, flags=flags)


def reserve(nbytes: int) -> mmap.mmap:
    """Reserve address space for records; nothing of it is resident until it is written.

    :raises MemoryError: if the host has no room for it.
    """
    try:
        return _reserve(nbytes)
    except OSError:
        # Machines that nobody has any more may wait for the collector, and addresses with them.
        gc.collect()
    try:
        return _reserve(nbytes)
    except OSError as e:
        raise MemoryError(
            f"cannot reserve {nbytes >> 30} GiB of address space ({e.strerror}); "
            "needed: no limit on virtual memory (ulimit -v), vm.overcommit_memory 0 or 1"
        ) from None


class Records:
    """An array each of pages, their states and tokens, pageblocks and sections, by pfn."""

    def __init__(self) -> None:
        self._maps = [
            reserve(NR_PAGES_MAX * _memmap.page_dtype.itemsize),
            reserve(NR_PAGES_MAX),
            reserve((NR_PAGES_MAX >> PAGEBLOCK_ORDER) * _memmap.pageblock_dtype.itemsize),
            reserve((NR_PAGES_MAX >> PFN_SECTION_SHIFT) * _memmap.section_dtype.itemsize),
            reserve(NR_PAGES_MAX * 8),
        ]
        self.memmap = np.frombuffer(self._maps[0], dtype=_memmap.page_dtype)
        self.page_states = np.frombuffer(self._maps[1], dtype=np.uint8)
        self.pageblocks = np.frombuffer(self._maps[2], dtype=_memmap.pageblock_dtype)
        self.sections = np.frombuffer(self._maps[3], dtype=_memmap.section_dtype)
        #: What pages hold, where their users have given them something to hold.
        self.page_tokens = np.frombuffer(self._maps[4], dtype=np.uint64)
        self._huge_windows: set[int] = set()

    # -- what is about to be written ------------------------------------------------------

    def expect_pages(self, start: int, end: int) -> None:
        """Advise huge host pages for records that are about to be written densely.

        :param start: first pfn; end: pfn behind the last.
        """
        windows = range(start >> RECORD_WINDOW_SHIFT, -(-end >> RECORD_WINDOW_SHIFT))
        for window in set(windows) - self._huge_windows:
            self._huge_windows.add(window)
            self._advise(mmap.MADV_HUGEPAGE, window)

    def expect_sections(self, first: int, count: int) -> None:
        """Advise huge host pages for pageblock records that are about to be written densely.

        :param first: section; count: how many sections come.
        """
        size = self.pageblocks.itemsize * (PAGES_PER_SECTION >> PAGEBLOCK_ORDER)
        start, end = -(-first * size // PMD_SIZE) * PMD_SIZE, (first + count) * size
        if end - start >= PMD_SIZE:
            self._hint(2, mmap.MADV_HUGEPAGE, start, (end - start) // PMD_SIZE * PMD_SIZE)

    def _advise(self, advice: int, window: int) -> None:
        for which, records in ((0, self.memmap), (1, self.page_states), (4, self.page_tokens)):
            size = records.itemsize << RECORD_WINDOW_SHIFT
            self._hint(which, advice, window * size, size)

    def _hint(self, which: int, advice: int, start: int, size: int) -> None:
        # Hosts without transparent huge pages refuse; all works there too, only slower.
        with suppress(OSError):
            self._maps[which].madvise(advice, start, size)

    # -- what is not needed any more --------------------------------------------------------

    def forget(self, pfn: int, nr_pages: int, dirty: bool) -> None:
        """Zero the records of pages that are gone and give their host memory back.

        :param pfn: first pfn; nr_pages: pages, both multiples of 512; dirty: whether records of
            single pages were written.
        """
        if dirty:
            self.forget_pages(pfn, nr_pages)
        self._forget(2, pfn, nr_pages, PAGEBLOCK_ORDER)
        first = -(-pfn // PAGES_PER_SECTION)
        whole = ((pfn + nr_pages) >> PFN_SECTION_SHIFT) - first
        if whole > 0:
            shift = PFN_SECTION_SHIFT
            self._forget(3, first << shift, whole << shift, shift)

    def forget_pages(self, pfn: int, nr_pages: int) -> None:
        """Zero the records and states of a range of pages."""
        for which in (0, 1, 4):
            self._forget(which, pfn, nr_pages, 0)
        windows = range(-(-pfn >> RECORD_WINDOW_SHIFT), (pfn + nr_pages) >> RECORD_WINDOW_SHIFT)
        for window in self._huge_windows.intersection(windows):
            # What comes next there may be sparse.
            self._huge_windows.remove(window)
            self._advise(MADV_NOHUGEPAGE, window)

    def _forget(self, which: int, pfn: int, nr_pages: int, shift: int) -> None:
        """Zero one array's records of a range of pages; untouched host pages are not touched."""
        records = (
            self.memmap,
            self.page_states,
            self.pageblocks,
            self.sections,
            self.page_tokens,
        )[which]
        size = records.itemsize
        start, end = (pfn >> shift) * size, ((pfn + nr_pages) >> shift) * size
        host = mmap.PAGESIZE
        inner, outer = -(-start // host) * host, end // host * host
        raw = np.frombuffer(self._maps[which], dtype=np.uint8)
        # At the ends the host page holds records of others too; it goes if those are zero.
        if start < inner:
            raw[start : min(inner, end)] = 0
            inner -= host * (not raw[inner - host : inner].any())
        if outer >= inner and outer < end:
            raw[outer:end] = 0
            outer += host * (not raw[outer : outer + host].any())
        if outer > inner:
            self._maps[which].madvise(mmap.MADV_DONTNEED, inner, outer - inner)

    def give_back(self, zone: BuddyZone, kept: int, marked: Collection[int] = ()) -> None:
        """Forget records of a zone's pages that are free in large blocks.

        Runs that fill huge pages of the host go first: tearing those to pieces makes whatever is
        left of them slow.

        :param kept: so many pageblocks' records are not worth the trouble.
        :param marked: pfns whose records say more than that they are free.
        """
        blocks: npt.NDArray[np.uint64] = np.zeros(zone.nr_dirty_free, dtype=np.uint64)
        blocks = np.sort(blocks[: zone.dirty_free(blocks)])
        if marked:
            said = np.array(sorted(marked), dtype=np.uint64) & ~np.uint64(PAGEBLOCK_NR_PAGES - 1)
            blocks = np.setdiff1d(blocks, said)
        runs = np.split(blocks, np.flatnonzero(np.diff(blocks) != PAGEBLOCK_NR_PAGES) + 1)
        large = [run for run in runs if len(run) >= 2 * BLOCKS_OF_A_HUGE_PAGE]
        if len(blocks) - sum(map(len, large)) > 4 * kept:
            large = runs
        for run in large:
            self.forget_pages(int(run[0]), len(run) * PAGEBLOCK_NR_PAGES)
        zone.forget_dirty(np.concatenate(large) if large else blocks[:0], kept)
