"""Requests for a given range of pages, or for many pages in a row (mm/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from kmm import _contig_alloc, _migrate, _scan
from kmm.errors import Busy, Interrupted, KernelError, OutOfMemory, bug, check_number, kernel_error
from kmm.gfp import (
    __GFP_COMP,
    __GFP_HIGHMEM,
    __GFP_MOVABLE,
    __GFP_RETRY_MAYFAIL,
    __GFP_THISNODE,
    GFP_USER,
    gfp_zone,
)
from kmm.hugetlb import hstate_of
from kmm.hugetlb_move import huge_pages_in, isolate_or_dissolve_huge_page
from kmm.migrate import MigrationTarget, is_huge, migrate_pages
from kmm.mmzone import Zone
from kmm.page_alloc import __drain_all_pages, check_gfp
from kmm.params import (
    KPF_RESERVED,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    NR_PAGES_MAX,
    PAGEBLOCK_NR_PAGES,
    ZONE_MOVABLE,
)
from kmm.trace import fallible, traced
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

SECTION_IS_ONLINE = 4
#: Pages that are isolated before they are moved, and how often a list is tried.
COMPACT_CLUSTER_MAX, MAX_TRIES = 32, 5


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


class _Range:
    """A range that is being emptied: where the search is, and what is isolated."""

    def __init__(self, m: Machine, start: int, end: int) -> None:
        block = start // PAGEBLOCK_NR_PAGES * PAGEBLOCK_NR_PAGES
        # A huge page that the range has only a part of moves as a whole.
        self.m, self.at, self.end = m, block if is_huge(m, block) else start, end
        self.pfns = np.zeros(0, dtype=np.uint64)

    def isolate(self) -> None:
        """Isolate the next 32 pages that can move, or a huge page.

        :raises OutOfMemory: for a huge page of a pool that cannot be cleared away.
        """
        room = np.zeros(COMPACT_CLUSTER_MAX, dtype=np.uint64)
        found: list[int] = []
        want = COMPACT_CLUSTER_MAX
        try:
            while want > 0 and self.at < self.end:
                n, pages, self.at, hugetlb = _contig_alloc.isolate_migratepages_range(
                    self.m.memmap_engine, self.at, self.end, want, room
                )
                found += room[:n].tolist()
                want -= pages
                if hugetlb:
                    want -= self._clear_huge_page(found)
        finally:
            self.pfns = np.array(found, dtype=np.uint64)

    def _clear_huge_page(self, found: list[int]) -> int:
        """Isolate the huge page that the search has come to, or dissolve it; pages isolated."""
        pfn, pages = self.at, 1 << hstate_of(self.m, self.at).order
        try:
            isolated = isolate_or_dissolve_huge_page(self.m, pfn)
        except Busy:
            isolated, pages = False, 0
        self.at = pfn + max(pages, PAGEBLOCK_NR_PAGES)
        if not isolated:
            return 0
        found.append(pfn)
        return pages

    def drop_clean(self) -> None:
        """Free the pages of the list that only cache what a file has."""
        dropped = np.zeros(len(self.pfns), dtype=np.uint8)
        _contig_alloc.reclaim_clean_pages_from_list(self.m, self.pfns, dropped, self.m.this_cpu)
        self.pfns = self.pfns[dropped == 0]

    def isolate_again(self) -> None:
        """Take the pages that did not move off their lists again."""
        out, refused = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
        kept = [
            pfn
            for pfn in self.pfns.tolist()
            if _migrate.isolate_range(self.m.memmap_engine, pfn, pfn + 1, out, refused)[0]
        ]
        self.pfns = np.array(kept, dtype=np.uint64)


def _page_across(m: Machine, pfn: int) -> int | None:
    """Return the gigantic page that begins below a pfn and reaches beyond it, if there is one."""
    return next((head for head in huge_pages_in(m, pfn, pfn + 1) if head < pfn), None)


@traced
def __alloc_contig_migrate_range(m: Machine, zone: Zone, start: int, end: int) -> None:
    """Move what is used out of an isolated range, 32 pages at a time.

    Clean page cache is dropped instead.  A page that somebody holds is left after five tries.

    :raises Interrupted: by a signal; OutOfMemory: when a page has nowhere to go; both leave what
        has moved where it is.
    """
    gfp = GFP_USER | __GFP_MOVABLE | __GFP_RETRY_MAYFAIL | __GFP_COMP
    if zone.zone_idx == ZONE_MOVABLE:
        gfp |= __GFP_HIGHMEM
    target = MigrationTarget(gfp, zone.nid)
    if _page_across(m, start) is not None:
        raise kernel_error(-12, f"pfn {start:#x} is part of a gigantic page")
    work, tries = _Range(m, start, end), 0
    while work.at < end or len(work.pfns):
        if m.signal_pending:
            m.signal_pending = False
            _migrate.putback_movable_pages(m.memmap_engine, work.pfns)
            raise kernel_error(-4, "a signal came")
        if not len(work.pfns):
            try:
                work.isolate()
            except KernelError:
                _migrate.putback_movable_pages(m.memmap_engine, work.pfns)
                raise
            tries = 0
            if not len(work.pfns):
                continue
        elif tries == MAX_TRIES - 1:
            return  # whoever looks whether the range is empty finds it
        else:
            tries += 1
            work.isolate_again()
        work.drop_clean()
        if not len(work.pfns):
            continue
        result = migrate_pages(m, work.pfns, target)
        work.pfns = result.left.copy()
        if result.code:
            pfn = int(result.left[0])
            raise kernel_error(-12, f"pfn {pfn:#x} of {m.describe_page(pfn)} has nowhere to go")


@fallible
def alloc_contig_range(
    m: Machine, start: int, end: int, migratetype: int = MIGRATE_MOVABLE
) -> None:
    """Take exactly the pages of a range; each is the caller's then, as a page of order 0.

    Pages that users have there move to other places, of their own node if it has some.

    :param start: first pfn; end: pfn behind the last.
    :param migratetype: what the pageblocks of the range are afterwards (0, 1 or 2).
    :raises InvalidArgument: if the pages are not online or not in one zone;
        Busy: if a page of the range cannot move; Interrupted, OutOfMemory: as
        __alloc_contig_migrate_range.  What has moved stays where it went then, and the range's
        pageblocks may be of the migratetype with their free blocks at the ends of their lists.
    """
    start = check_number("start", start, 0, NR_PAGES_MAX - 1)
    end = check_number("end", end, start + 1, NR_PAGES_MAX)
    check_number("migratetype", migratetype, 0, MIGRATE_RECLAIMABLE)
    zone = _zone_of_range(m, start, end)
    first = start // PAGEBLOCK_NR_PAGES * PAGEBLOCK_NR_PAGES
    last = -(-end // PAGEBLOCK_NR_PAGES) * PAGEBLOCK_NR_PAGES
    blocked = _scan.start_isolate_page_range(zone, start, end, False, migratetype)
    if blocked != -1:
        pfn = blocked if blocked >= 0 else -2 - blocked
        raise kernel_error(-16, f"pfn {pfn:#x} is unmovable")
    try:
        __drain_all_pages(m, zone)
        __alloc_contig_migrate_range(m, zone, start, end)
        outer = _scan.isolated_head(m.memmap_engine, start)
        found = _scan.test_pages_isolated(m.memmap_engine, outer, end, False)
        if found >= 0:
            raise kernel_error(-16, f"pfn {found:#x} is in use")
        behind = _scan.take_isolated_range(zone, outer, end)
        if outer < start:
            free_contig_range(m, outer, start - outer)
        if behind > end:
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
    """Whether a range may be tried: online, of the zone, without reserved and huge pages."""
    blocks = np.arange(pfn // PAGEBLOCK_NR_PAGES, -(-(pfn + nr_pages) // PAGEBLOCK_NR_PAGES))
    if (m.pageblocks["zone"][blocks] != zone.index + 1).any():
        return False
    if not (m.sections["flags"][blocks >> 6] & SECTION_IS_ONLINE != 0).all():
        return False
    if huge_pages_in(m, pfn, pfn + nr_pages):
        return False
    return not bool((m.kpageflags(pfn, nr_pages) & np.uint64(KPF_RESERVED)).any())


@fallible
def alloc_contig_pages(
    m: Machine, nr_pages: int, gfp: int, nid: int, nodemask: Collection[int] | None = None
) -> int:
    """Take the first range of pages in a row that can be had, aligned to its size.

    :param nr_pages: pages; a range starts at a multiple of the next power of two.
    :param gfp: says which zones may give; nid: node whose zonelist is used.
    :param nodemask: nodes that may give, None for all.
    :return: the first pfn.
    :raises OutOfMemory: if there is no such range; InvalidArgument: naming the argument.
    """
    nr_pages = check_number("nr_pages", nr_pages, 1, NR_PAGES_MAX)
    gfp = check_gfp(gfp)
    nid = check_number("nid", nid, 0, len(m.nodes) - 1)
    step = 1 << (nr_pages - 1).bit_length()
    pgdat = m.nodes[nid]
    for zone in pgdat.nofallback if gfp & __GFP_THISNODE else pgdat.zonelist:
        if zone.zone_idx > gfp_zone(gfp) or (nodemask is not None and zone.nid not in nodemask):
            continue
        pfn = -(-zone.zone_start_pfn // step) * step
        while pfn + nr_pages <= zone.zone_end_pfn:
            if _is_candidate(m, zone, pfn, nr_pages):
                try:
                    alloc_contig_range(m, pfn, pfn + nr_pages)
                except (Busy, OutOfMemory, Interrupted):
                    pass  # the next range may be had
                else:
                    return pfn
            pfn += step
    raise kernel_error(
        -12, f"no room for {counted(nr_pages, 'page')} in a row for node {nid}, gfp {gfp:#x}"
    )
