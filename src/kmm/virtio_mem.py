"""Parts of memory blocks that virtio-mem has taken out of use (drivers/virtio/virtio_mem.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kmm import _page_ref
from kmm.balloon_compaction import Balloon, adjust_managed_page_count, check_whole, count_by_zone
from kmm.errors import check_number, kernel_error
from kmm.memory_block import (
    MEM_CANCEL_OFFLINE,
    MEM_GOING_OFFLINE,
    MEM_OFFLINE,
    MemoryNotifier,
    MemoryNotify,
    register_memory_notifier,
    unregister_memory_notifier,
)
from kmm.params import NR_PAGES_MAX, PAGEBLOCK_NR_PAGES

if TYPE_CHECKING:
    from kmm.machine import Machine


class VirtioMem(Balloon):
    """A virtio-mem device, by the subblocks (of 2 MiB) that it has taken from the system.

    Their pages are PageOffline.  When their memory block goes offline, the device drops its
    references, and takes them back if that is called off.

    :param name: of the user that has the pages; pages: how many it can take.
    :raises InvalidArgument: as User.
    """

    lets_go = True

    def __init__(self, m: Machine, name: str, pages: int) -> None:
        super().__init__(m, name, pages, movable=False)
        self._notifier = MemoryNotifier(name, self._memory_notifier, asks=lambda m, arg: 0)
        register_memory_notifier(m, self._notifier)

    def fake_offline(self, pfn: int, nr_pages: int) -> None:
        """Take the pages of a range, whoever has them must be able to move.

        :param pfn: first; nr_pages: multiples of 512.
        :raises KernelError: as alloc_contig_range.
        """
        m = self.m
        check_number("nr_pages", nr_pages, 0, self.user.pages - self.nr_pages)
        check_number("pfn", pfn, 0, NR_PAGES_MAX - nr_pages)
        check_whole(m, pfn, nr_pages, PAGEBLOCK_NR_PAGES)
        m.alloc_contig_range(pfn, pfn + nr_pages)
        absent = np.flatnonzero(self.user.engine.slots[: self.user.pages] == 0)[:nr_pages]
        for i, index in enumerate(absent.tolist()):
            self.user.engine.attach(m, index, pfn + i)
        self._adjust_range(pfn, pfn + nr_pages, -1)

    def fake_online(self, pfn: int, nr_pages: int) -> None:
        """Give the pages of a range back.

        :raises InvalidArgument: if one of them is not the device's.
        """
        check_number("nr_pages", nr_pages, 1, NR_PAGES_MAX)
        check_number("pfn", pfn, 0, NR_PAGES_MAX - nr_pages)
        pfns = self.user.pfns()
        mine = np.flatnonzero((pfns >= pfn) & (pfns < pfn + nr_pages))
        if len(mine) != nr_pages:
            raise kernel_error(-22, f"pfn: {pfn:#x}; allowed: ranges that the device has taken")
        self._adjust_range(pfn, pfn + nr_pages, 1)
        for index in mine.tolist():
            self.user.give_back(index, 1)

    def close(self) -> None:
        """Give everything back, and be no driver any more."""
        unregister_memory_notifier(self.m, self._notifier)
        pfns = self.user.pfns()
        for zone, count in count_by_zone(self.m, pfns[pfns >= 0]):
            adjust_managed_page_count(self.m, zone, count)
        self.m.balloons.remove(self)
        self.user.close()

    def _adjust_range(self, start: int, end: int, sign: int) -> None:
        pfns = self.user.pfns()
        mine = pfns[(pfns >= start) & (pfns < end)]
        for zone, count in count_by_zone(self.m, mine):
            adjust_managed_page_count(self.m, zone, sign * count)

    def _memory_notifier(self, m: Machine, action: int, arg: MemoryNotify) -> int:
        start, end = arg.start_pfn, arg.start_pfn + arg.nr_pages
        if action == MEM_GOING_OFFLINE:
            _page_ref.set_references(m.memmap_engine, self.user.engine.number, start, end, False)
            self._adjust_range(start, end, 1)
        elif action == MEM_CANCEL_OFFLINE:
            # Also where another notifier refused before this one was asked.
            number = self.user.engine.number
            if _page_ref.set_references(m.memmap_engine, number, start, end, True):
                self._adjust_range(start, end, -1)
        elif action == MEM_OFFLINE:
            pass  # offline_pages has taken the pages from their users
        return 0
