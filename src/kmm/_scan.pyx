"""Scanners over ranges of pages: isolation, and what stands in its way (mm/page_isolation.c)."""
from kmm._buddy cimport BuddyZone
from kmm._freelist cimport (del_page_from_free_list, free_one_page, is_free_head,
                            mark_dirty, mark_page_allocated, move_freepages)
from kmm._memmap cimport (MemMap, get_pageblock_migratetype, section_online,
                          set_pageblock_migratetype)
from kmm._page_owner cimport *
from kmm._types cimport *

cdef enum:
    ZONE_MOVABLE = 3


cdef inline bint is_unmovable(const in_use_t *page, bint zone_movable, bint offline) noexcept nogil:
    """Whether what is in use can neither move nor go, as far as isolation looks.

    Pins it does not see: a page that was pinned and has lost its user is on an LRU list still.

    :param offline: memory that goes offline may take poisoned and PageOffline pages along.
    """
    cdef bint listed = page.flags & (PF_LRU | PF_MOVABLE_OPS) != 0
    if page.flags & PF_RESERVED:
        return True
    if zone_movable:
        return False
    listed = listed or is_orphaned(page.flags)
    if page.compound:
        return not listed and page.kind != USER_HUGETLB
    if not page.held or (offline and page.flags & (PF_HWPOISON | PF_OFFLINE)):
        return False
    return not listed


cdef inline bint is_plain_lru_page(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Whether a single page is in use and on an LRU list, as most are that stand in the way."""
    # Records that nobody has written are not read either: for the host that would be a touch.
    return (block_of(mem, pfn).state & BLOCK_DIRTY
            and mem.states[pfn] == STATE_ALLOCATED | STATE_MARKED
            and mem.pages[pfn].flags & (PF_LRU | PF_RESERVED) == PF_LRU)


cdef int64_t has_unmovable_pages(const mem_t *mem, pfn_t start, pfn_t end,
                                 bint zone_movable, bint offline) noexcept nogil:
    """The first page of the range that can neither move nor go, or -1."""
    cdef pfn_t pfn = start, head = start
    cdef in_use_t page
    cdef int order = 0
    if (start & (MAX_ORDER_PAGES - 1) == PAGEBLOCK_PAGES and end - start <= PAGEBLOCK_PAGES
            and is_free_head(mem, start - PAGEBLOCK_PAGES, &order) and order == MAX_ORDER - 1):
        return -1
    if start & (PAGEBLOCK_PAGES - 1) or block_of(mem, start).kind == KIND_NONE:
        head = head_of(mem, start)
    if head != start:
        # Pages behind the first of a block that is no compound one have no reference.
        pfn = next_in_use(mem, head, &page)
        if page.compound and is_unmovable(&page, zone_movable, offline):
            return <int64_t> start
    while pfn < end:
        if is_plain_lru_page(mem, pfn):
            pfn += 1
            continue
        head = pfn
        pfn = next_in_use(mem, pfn, &page)
        if page.nr_pages and is_unmovable(&page, zone_movable, offline):
            return <int64_t> head
    return -1


def unmovable_pages(BuddyZone zone, pfn_t start, pfn_t end, uint64_t[::1] out):
    """List the pages of a range that keep it from being isolated to go offline.

    :param out: room for the first of them.
    :return: how many there are.
    """
    cdef const mem_t *mem = &zone.memmap.mem
    cdef pfn_t pfn = start, at
    cdef int64_t n = 0
    cdef in_use_t page
    at = head_of(mem, start)
    if at != start:
        pfn = next_in_use(mem, at, &page)
        if page.compound and is_unmovable(&page, zone.z.zone_idx == ZONE_MOVABLE, True):
            if out.shape[0]:
                out[0] = start
            n = 1
    while pfn < end:
        pfn = next_in_use(mem, pfn, &page)
        if page.nr_pages and is_unmovable(&page, zone.z.zone_idx == ZONE_MOVABLE, True):
            if n < out.shape[0]:
                out[n] = page.pfn
            n += 1
    return n


cdef int64_t isolate_pageblock(mem_t *mem, zone_t *zone, pfn_t pfn, pfn_t start, pfn_t end,
                               bint offline) noexcept nogil:
    """Isolate one pageblock of which [start, end) is wanted; -1, or the page that forbids it."""
    cdef int64_t blocked, moved
    if get_pageblock_migratetype(mem, pfn) == MIGRATE_ISOLATE:
        return <int64_t> pfn
    blocked = has_unmovable_pages(mem, max(pfn, start), min(pfn + PAGEBLOCK_PAGES, end),
                                  zone.zone_idx == ZONE_MOVABLE, offline)
    if blocked >= 0:
        return blocked
    set_pageblock_migratetype(mem, pfn, MIGRATE_ISOLATE)
    zone.nr_isolate_pageblock += 1
    moved = move_freepages(mem, zone, pfn, pfn + PAGEBLOCK_PAGES, MIGRATE_ISOLATE, NULL)
    zone.nr_free_pages -= moved
    return -1


cdef void split_at_boundary(mem_t *mem, zone_t *zone, pfn_t pfn) noexcept nogil:
    """Split a free block of order 10 whose halves are now typed apart, one of them Isolate."""
    cdef pfn_t head = pfn & ~<pfn_t>(MAX_ORDER_PAGES - 1), half = head + PAGEBLOCK_PAGES
    cdef int order = 0
    if (not pfn & PAGEBLOCK_PAGES or not is_free_head(mem, head, &order)
            or order != MAX_ORDER - 1):
        return
    if mem.blocks[head >> PAGEBLOCK_ORDER].mt != MIGRATE_ISOLATE:
        zone.nr_free_pages -= MAX_ORDER_PAGES
    del_page_from_free_list(mem, zone, head, order)
    free_one_page(mem, zone, head, PAGEBLOCK_ORDER, get_pageblock_migratetype(mem, head), FPI_NONE)
    free_one_page(mem, zone, half, PAGEBLOCK_ORDER, get_pageblock_migratetype(mem, half), FPI_NONE)


cdef void unisolate_pageblock(mem_t *mem, zone_t *zone, pfn_t pfn, int mt) noexcept nogil:
    cdef int order = 0, other = 0
    cdef pfn_t buddy
    if get_pageblock_migratetype(mem, pfn) != MIGRATE_ISOLATE:
        return
    buddy = pfn ^ PAGEBLOCK_PAGES
    if (is_free_head(mem, pfn, &order) and order == PAGEBLOCK_ORDER
            and is_free_head(mem, buddy, &other) and other == PAGEBLOCK_ORDER
            and mem.blocks[buddy >> PAGEBLOCK_ORDER].zone == zone.index + 1
            and get_pageblock_migratetype(mem, buddy) != MIGRATE_ISOLATE):
        # Freed anew, it merges with its neighbour.
        del_page_from_free_list(mem, zone, pfn, order)
        set_pageblock_migratetype(mem, pfn, mt)
        zone.nr_isolate_pageblock -= 1
        free_one_page(mem, zone, pfn, order, mt, FPI_TO_TAIL)
        return
    zone.nr_free_pages += move_freepages(mem, zone, pfn, pfn + PAGEBLOCK_PAGES, mt, NULL)
    set_pageblock_migratetype(mem, pfn, mt)
    zone.nr_isolate_pageblock -= 1


cdef bint crosses(const mem_t *mem, pfn_t boundary, pfn_t *head) noexcept nogil:
    """Whether a compound page lies on both sides of a boundary, behind which memory is online."""
    cdef in_use_t page
    if boundary >= mem.nr_pages or not section_online(mem, boundary):
        return False
    head[0] = head_of(mem, boundary)
    if head[0] == boundary:
        return False
    next_in_use(mem, head[0], &page)
    return page.compound


def start_isolate_page_range(BuddyZone zone, pfn_t start, pfn_t end, bint offline=True,
                             int mt=MIGRATE_MOVABLE):
    """Isolate the pageblocks of a range: the first, the last, then the rest upward.

    :param start: first pfn; end: pfn behind the last; offline: whether the range goes offline.
    :param mt: what pageblocks that were isolated become again after a refusal.
    :return: -1; or the pfn of the page that is in the way; or -2 less the pfn of a gigantic page
        that reaches beyond the range, which isolation does not move.
    """
    cdef mem_t *mem = &zone.memmap.mem
    cdef pfn_t first = start & ~<pfn_t> (PAGEBLOCK_PAGES - 1)
    cdef pfn_t behind = (end + PAGEBLOCK_PAGES - 1) & ~<pfn_t> (PAGEBLOCK_PAGES - 1)
    cdef pfn_t pfn, last = behind - PAGEBLOCK_PAGES, head = 0
    cdef int64_t blocked
    with nogil:
        blocked = isolate_pageblock(mem, &zone.z, first, start, end, offline)
        if blocked < 0:
            split_at_boundary(mem, &zone.z, first)
        if blocked < 0 and last != first:
            blocked = isolate_pageblock(mem, &zone.z, last, start, end, offline)
            if blocked >= 0:
                unisolate_pageblock(mem, &zone.z, first, mt)
        if blocked < 0 and crosses(mem, behind, &head):
            unisolate_pageblock(mem, &zone.z, last, mt)
            unisolate_pageblock(mem, &zone.z, first, mt)
            with gil:
                return -2 - <int64_t> head
        if blocked < 0:
            for pfn in range(first + PAGEBLOCK_PAGES, last, 512):
                blocked = isolate_pageblock(mem, &zone.z, pfn, start, end, offline)
                if blocked >= 0:
                    break
            if blocked >= 0:
                undo_isolate(mem, &zone.z, first, pfn, mt)
                unisolate_pageblock(mem, &zone.z, last, mt)
        if blocked < 0:
            split_at_boundary(mem, &zone.z, behind)
    return blocked


cdef void undo_isolate(mem_t *mem, zone_t *zone, pfn_t start, pfn_t end, int mt) noexcept nogil:
    cdef pfn_t pfn
    for pfn in range(start, end, 512):
        unisolate_pageblock(mem, zone, pfn, mt)


def undo_isolate_page_range(BuddyZone zone, pfn_t start, pfn_t end, int mt):
    """Give the isolated pageblocks of a range back to mt, upward; pfns, multiples of 512."""
    with nogil:
        undo_isolate(&zone.memmap.mem, &zone.z, start, end, mt)


def test_pages_isolated(MemMap memmap, pfn_t start, pfn_t end, bint offline=True):
    """Whether every page of an isolated range is free: -1, or the first pfn that is not."""
    cdef mem_t *mem = &memmap.mem
    cdef pfn_t pfn
    cdef int order = 0
    cdef int64_t found = -1
    with nogil:
        for pfn in range(start, end, 512):
            if section_online(mem, pfn) and get_pageblock_migratetype(mem, pfn) != MIGRATE_ISOLATE:
                found = <int64_t> pfn
                break
        pfn = start
        while found < 0 and pfn < end:
            if is_free_head(mem, pfn, &order):
                pfn += <pfn_t> 1 << order
            elif offline and may_go_in_use(mem, pfn):
                pfn += 1
            else:
                found = <int64_t> pfn
    return found


def isolated_head(MemMap memmap, pfn_t pfn):
    """Return where the free block starts that holds an isolated page, or pfn if it is not free."""
    cdef pfn_t head
    cdef int order = 0, o
    for o in range(MAX_ORDER):
        head = pfn & ~((<pfn_t> 1 << o) - 1)
        if is_free_head(&memmap.mem, head, &order) and order >= o:
            return head
    return pfn


def take_isolated_range(BuddyZone zone, pfn_t start, pfn_t end):
    """Hand out the free pages of an isolated range one by one (isolate_freepages_range).

    :param start: where a free block starts; end: pfn behind the last page wanted.
    :return: pfn behind the last page that was taken: the last block's pages all are.
    """
    cdef mem_t *mem = &zone.memmap.mem
    cdef pfn_t pfn = start, page
    cdef int order = 0
    with nogil:
        while pfn < end and is_free_head(mem, pfn, &order):
            del_page_from_free_list(mem, &zone.z, pfn, order)
            for page in range(pfn, pfn + (<pfn_t> 1 << order)):
                mark_dirty(mem, page)
                mark_page_allocated(mem, page)
            pfn += <pfn_t> 1 << order
    return pfn
