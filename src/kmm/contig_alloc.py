"""Requests for a given range of pages, or for many pages in a row (mm/page_alloc.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kmm import _scan
from kmm.errors import Busy, bug, check_number, kernel_error
from kmm.mmzone import Zone
from kmm.page_alloc import __drain_all_pages, gfp_zone
from kmm.params import MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE, NR_PAGES_MAX, PAGEBLOCK_NR_PAGES
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

SECTION_IS_ONLINE = 4


def _zone_of_range(m: Machine, start: int, end: int) -> Zone:
    first = start // PAGEBLOCK_NR_PAGES
    last = -(-end // PAGEBLOCK_NR_PAGES)
    blocks = np.arange(first, last)
    online = m.sections["flags"][blocks >> 6] & SECTION_IS_ONLINE != 0
    zones = m.pageblocks["zone"][first:last]
    if not online.all() or not zones.all() or (zones != zones[0]).any():
        raise kernel_error(-22, f"pfns {start:#x}-{end:#x}: not online pages of one zone")
    zone = m.page_zone(start)
    if zone is None:
        bug("alloc_contig_range", f"page {start:#x} is in no zone")
    return zone


@fallible
def alloc_contig_range(
    m: Machine, start: int, end: int, migratetype: int = MIGRATE_MOVABLE
) -> None:
    """Take exactly the pages of a range; each is the caller's then, as a page of order 0.

    Pages in use would have to move first, which is not modelled yet: they are in the way.

    :param start: first pfn; end: pfn behind the last.
    :param migratetype: what the pageblocks of the range are afterwards (0, 1 or 2).
    :raises InvalidArgument: if the pages are not online or not in one zone;
        Busy: if a page of the range is in use; the range is as before then, but its pageblocks
        are Movable and its free blocks at the ends of their lists.
    """
    check_number("end", end, 1, NR_PAGES_MAX)
    check_number("start", start, 0, end - 1)
    check_number("migratetype", migratetype, 0, MIGRATE_RECLAIMABLE)
    zone = _zone_of_range(m, start, end)
    first = start // PAGEBLOCK_NR_PAGES * PAGEBLOCK_NR_PAGES
    last = -(-end // PAGEBLOCK_NR_PAGES) * PAGEBLOCK_NR_PAGES
    blocked = _scan.start_isolate_page_range(zone, start, end, False)
    if blocked != -1:
        pfn = blocked if blocked >= 0 else -2 - blocked
        raise kernel_error(-16, f"pfn {pfn:#x} is unmovable")
    try:
        __drain_all_pages(m, zone)
        outer = _scan.isolated_head(m.memmap_engine, start)
        found = _scan.test_pages_isolated(m.memmap_engine, outer, end, False)
        if found >= 0:
            raise kernel_error(-16, f"pfn {found:#x} is in use")
        behind = _scan.take_isolated_range(zone, outer, end)
        free_contig_range(m, outer, start - outer)
        free_contig_range(m, end, behind - end)
    finally:
        _scan.undo_isolate_page_range(zone, first, last, migratetype)


@traced
def free_contig_range(m: Machine, pfn: int, nr_pages: int) -> None:
    """Free a range of single pages, first to last.

    :param pfn: first page; nr_pages: how many.
    :raises InvalidArgument: naming the argument; KernelError: as free_pages_bulk, if one of them is
        not allocated; none is freed then.
    """
    check_number("pfn", pfn, 0, NR_PAGES_MAX - 1)
    check_number("nr_pages", nr_pages, 0, m.totalram_pages)
    m.free_pages_bulk(np.arange(pfn, pfn + nr_pages, dtype=np.uint64))


def _is_candidate(m: Machine, zone: Zone, pfn: int, nr_pages: int) -> bool:
    """Whether a range may be tried: online, of the zone, without reserved pages."""
    blocks = np.arange(pfn // PAGEBLOCK_NR_PAGES, -(-(pfn + nr_pages) // PAGEBLOCK_NR_PAGES))
    if (m.pageblocks["zone"][blocks] != zone.index + 1).any():
        return False
    return bool((m.sections["flags"][blocks >> 6] & SECTION_IS_ONLINE != 0).all())


@fallible
def alloc_contig_pages(m: Machine, nr_pages: int, gfp: int, nid: int) -> int:
    """Take the first range of pages in a row that can be had, aligned to its size.

    :param nr_pages: pages; a range starts at a multiple of the next power of two.
    :param gfp: says which zones may give; nid: node whose zonelist is used.
    :return: the first pfn.
    :raises OutOfMemory: if there is no such range.
    """
    check_number("nr_pages", nr_pages, 1, NR_PAGES_MAX)
    check_number("nid", nid, 0, len(m.nodes) - 1)
    step = 1 << (nr_pages - 1).bit_length()
    for zone in m.nodes[nid].zonelist:
        if zone.zone_idx > gfp_zone(gfp):
            continue
        pfn = -(-zone.zone_start_pfn // step) * step
        while pfn + nr_pages <= zone.zone_end_pfn:
            if _is_candidate(m, zone, pfn, nr_pages):
                try:
                    alloc_contig_range(m, pfn, pfn + nr_pages)
                except Busy:
                    pass  # somebody uses a page of it
                else:
                    return pfn
            pfn += step
    raise kernel_error(-12, f"no {nr_pages} pages in a row for node {nid}, gfp {gfp:#x}")
