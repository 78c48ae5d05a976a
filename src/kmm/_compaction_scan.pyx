"""Compaction's two scanners: pages to move upward, free pages downward (mm/compaction.c).

Which pageblocks and pages they pass over, and how the free lists are reordered by a search that
tells where to begin, decides where every page ends up, so the kernel's order is kept to the page.
"""
from kmm._freelist cimport (block_of, del_page_from_free_list, is_free_head, list_next,
                            mark_allocated, mark_dirty, page_prev, set_page_next, set_page_prev)
from kmm._memmap cimport get_pageblock_migratetype, set_pageblock_migratetype
from kmm._migrate cimport isolate_folio, putback_folio
from kmm._rmap cimport *
from kmm._watermarks cimport zone_watermark_ok

cdef uint64_t FAST_START_USED = <uint64_t> -1


# -- what is in a pageblock -----------------------------------------------------------------------

cdef bint skip_persistent(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Whether a block of order 9 or more in use covers a pageblock (pageblock_skip_persistent)."""
    cdef pfn_t start = pageblock_start_pfn(pfn)
    cdef const pageblock_t *block = block_of(mem, start)
    if block.kind == KIND_ALLOCATED:
        return True
    if not start & PAGEBLOCK_PAGES:
        return False
    block = block_of(mem, start - PAGEBLOCK_PAGES)
    return block.kind == KIND_ALLOCATED and block.order > PAGEBLOCK_ORDER


cdef inline int order_in_use(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """The order of the block in use that starts at pfn; 0 where none of more than a page does."""
    if is_block_in_use(mem, pfn):
        return block_of(mem, pfn).order
    if mem.states[pfn] & ~(STATE_MARKED | STATE_ORDER) == STATE_ALLOCATED:
        return mem.states[pfn] & STATE_ORDER
    return 0


cdef inline bint was_never_written(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Whether no page of a pageblock has a state of its own."""
    return not block_of(mem, pfn).state & BLOCK_DIRTY and not is_block_in_use(mem, pfn)


# -- pages to move --------------------------------------------------------------------------------

cdef inline bint can_compact(const mem_t *mem, const compact_control_t *cc,
                             const folio_t *folio) noexcept nogil:
    """Whether a used page of order 0 may be taken off its list, or from its driver."""
    cdef uint16_t flags = folio.flags[0]
    cdef int kind = mem.users[folio.user].kind
    if flags & (PF_HWPOISON | PF_ISOLATED):
        return False
    if not flags & PF_LRU:
        return flags & PF_MOVABLE_OPS != 0
    if kind == USER_ANON:
        if flags & PF_PINNED:
            return False
    elif not cc.flags & CC_FS:
        return False
    if flags & PF_MLOCKED and not cc.flags & CC_UNEVICTABLE:
        return False
    # What is dirty can move without being written first: every user here is of that kind.
    return not (cc.mode != MIGRATE_SYNC and flags & PF_WRITEBACK)


cdef void putback_migratepages(mem_t *mem, compact_control_t *cc) noexcept nogil:
    cdef folio_t folio
    while cc.nr_migratepages:
        cc.nr_migratepages -= 1
        read_folio(mem, cc.migratepages[cc.nr_migratepages], &folio)
        putback_folio(mem, &folio)


cdef inline void update_cached_migrate(compact_control_t *cc, pfn_t pfn) noexcept nogil:
    cdef compact_t *compact = &cc.zone.compact
    pfn = pageblock_end_pfn(pfn)
    if pfn > compact.cached_migrate_pfn[0]:
        compact.cached_migrate_pfn[0] = pfn
    if cc.mode != MIGRATE_ASYNC and pfn > compact.cached_migrate_pfn[1]:
        compact.cached_migrate_pfn[1] = pfn


cdef bint too_many_isolated(const mem_t *mem, const compact_control_t *cc) noexcept nogil:
    cdef const int64_t *stat = mem.nodes[cc.zone.nid].stat
    cdef int64_t inactive = stat[NR_INACTIVE_FILE] + stat[NR_INACTIVE_ANON]
    cdef int64_t active = stat[NR_ACTIVE_FILE] + stat[NR_ACTIVE_ANON]
    if cc.flags & CC_FS:
        inactive >>= 3
        active >>= 3
    return stat[NR_ISOLATED_FILE] + stat[NR_ISOLATED_ANON] > (inactive + active) / 2


cdef bint isolate_migratepages_block(mem_t *mem, compact_control_t *cc, pfn_t low_pfn,
                                     pfn_t end_pfn) noexcept nogil:
    """Isolate pages of one pageblock, upward from low_pfn; whether the run has to stop."""
    cdef bint skip_on_failure = direct_async(cc), valid = False, skip_updated = False, taken
    cdef pfn_t valid_pfn = 0, next_skip_pfn = 0, page
    cdef int64_t scanned = 0, isolated = 0
    cdef int order = 0
    cdef folio_t folio
    cc.migrate_pfn = low_pfn
    if too_many_isolated(mem, cc):
        return True
    if skip_on_failure:
        next_skip_pfn = block_end_pfn(low_pfn, cc.order)
    while low_pfn < end_pfn:
        if skip_on_failure and low_pfn >= next_skip_pfn:
            if isolated:
                break
            next_skip_pfn = block_end_pfn(low_pfn, cc.order)
        scanned += 1
        page = low_pfn
        if not valid and pageblock_start_pfn(page) == page:
            if not isolation_suitable(mem, cc, page):
                low_pfn = end_pfn
                break
            valid, valid_pfn = True, page
        if is_free_head(mem, page, &order):
            low_pfn += <pfn_t> 1 << order
            continue
        order = order_in_use(mem, page)
        low_pfn += <pfn_t> 1 << order
        taken = False
        if order == 0 and not was_never_written(mem, page) and read_folio(mem, page, &folio):
            taken = can_compact(mem, cc, &folio)
        if taken:
            if folio.flags[0] & PF_LRU and not skip_updated:
                skip_updated = True
                if page == valid_pfn and test_and_set_skip(mem, cc, page):
                    low_pfn = page
                    break
            isolate_folio(mem, &folio)
            cc.migratepages[cc.nr_migratepages] = page
            cc.nr_migratepages += 1
            isolated += 1
            if cc.nr_migratepages >= COMPACT_CLUSTER_MAX and not cc.rescan and not cc.contended:
                break
        elif skip_on_failure:
            # A block of the order cannot come of this any more.
            if isolated:
                putback_migratepages(mem, cc)
                isolated = 0
            if low_pfn <= next_skip_pfn:
                low_pfn = next_skip_pfn
                next_skip_pfn += <pfn_t> 1 << cc.order
    if low_pfn > end_pfn:
        low_pfn = end_pfn
    if low_pfn == end_pfn and (not isolated or cc.rescan):
        if valid and not skip_updated:
            set_pageblock_skip(mem, valid_pfn, True)
        update_cached_migrate(cc, low_pfn)
    cc.migrate_scanned += scanned
    cc.isolated += isolated
    cc.migrate_pfn = low_pfn
    return False


cdef inline bint test_and_set_skip(mem_t *mem, const compact_control_t *cc,
                                   pfn_t pfn) noexcept nogil:
    cdef bint skip
    if cc.flags & CC_IGNORE_SKIP_HINT:
        return False
    skip = get_pageblock_skip(mem, pfn)
    if not skip:
        set_pageblock_skip(mem, pfn, True)
    return skip


cdef inline bint suitable_migration_source(const mem_t *mem, const compact_control_t *cc,
                                           pfn_t pfn) noexcept nogil:
    if skip_persistent(mem, pfn):
        return False
    if not direct_async(cc):
        return True
    return get_pageblock_migratetype(mem, pfn) == cc.migratetype


cdef int isolate_migratepages(mem_t *mem, compact_control_t *cc) noexcept nogil:
    cdef zone_t *zone = cc.zone
    cdef pfn_t low_pfn = fast_find_migrateblock(mem, cc)
    cdef pfn_t start = max(pageblock_start_pfn(low_pfn), zone.zone_start_pfn)
    cdef pfn_t end = pageblock_end_pfn(low_pfn)
    cdef bint found = low_pfn != cc.migrate_pfn and not cc.fast_search_fail
    while end <= cc.free_pfn:
        if not pageblock_in_zone(mem, start, end, zone):
            pass
        elif ((pageblock_start_pfn(low_pfn) == low_pfn or low_pfn == zone.zone_start_pfn)
                and not found and not isolation_suitable(mem, cc, start)):
            pass
        elif not suitable_migration_source(mem, cc, start):
            update_cached_migrate(cc, end)
        else:
            if isolate_migratepages_block(mem, cc, low_pfn, end):
                return ISOLATE_ABORT
            break
        found = False
        cc.migrate_pfn = low_pfn = start = end
        end += PAGEBLOCK_PAGES
    return ISOLATE_SUCCESS if cc.nr_migratepages else ISOLATE_NONE


# -- free pages -----------------------------------------------------------------------------------

cdef bint isolate_free_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order) noexcept nogil:
    """Take a free block off its list, if the zone can spare it (__isolate_free_page)."""
    cdef pfn_t p
    if get_pageblock_migratetype(mem, pfn) != MIGRATE_ISOLATE:
        if not zone_watermark_ok(zone, 0, zone.watermark_min + (<int64_t> 1 << order), 0, 0):
            return False
        zone.nr_free_pages -= <int64_t> 1 << order
    del_page_from_free_list(mem, zone, pfn, order)
    if order >= PAGEBLOCK_ORDER - 1:
        for p in range(pfn, pfn + (<pfn_t> 1 << order), 512):
            if get_pageblock_migratetype(mem, p) < MIGRATE_HIGHATOMIC:
                set_pageblock_migratetype(mem, p, MIGRATE_MOVABLE)
    return True


cdef inline void keep_free_page(mem_t *mem, compact_control_t *cc, pfn_t pfn,
                                int order) noexcept nogil:
    """Split an isolated block into single pages, of which the last is taken first."""
    cdef pfn_t p
    for p in range(pfn, pfn + (<pfn_t> 1 << order)):
        mark_dirty(mem, p)
        mark_allocated(mem, p, 0)
        cc.freepages[cc.nr_freepages] = p
        cc.nr_freepages += 1
    cc.isolated += <int64_t> 1 << order


cdef int64_t isolate_freepages_block(mem_t *mem, compact_control_t *cc, pfn_t *start_pfn,
                                     pfn_t end_pfn, int stride) noexcept nogil:
    """Isolate free pages of one pageblock, upward, until there are enough; how many came."""
    cdef pfn_t pfn = start_pfn[0]
    cdef int64_t scanned = 0, total = 0
    cdef int order = 0
    while pfn < end_pfn:
        scanned += 1
        if not is_free_head(mem, pfn, &order):
            pfn += (<pfn_t> 1 << order_in_use(mem, pfn)) - 1 + stride
            continue
        if not isolate_free_page(mem, cc.zone, pfn, order):
            break
        keep_free_page(mem, cc, pfn, order)
        scanned += (<int64_t> 1 << order) - 1
        total += <int64_t> 1 << order
        pfn += <pfn_t> 1 << order
        if cc.nr_migratepages <= cc.nr_freepages:
            break
        pfn += stride - 1
    start_pfn[0] = min(pfn, end_pfn)
    cc.free_scanned += scanned
    return total


cdef inline bint suitable_migration_target(const mem_t *mem, const compact_control_t *cc,
                                           pfn_t pfn) noexcept nogil:
    cdef int order = 0
    if is_free_head(mem, pfn, &order) and order >= PAGEBLOCK_ORDER:
        return False
    return (cc.flags & CC_IGNORE_BLOCK_SUITABLE
            or get_pageblock_migratetype(mem, pfn) == MIGRATE_MOVABLE)


cdef void isolate_freepages(mem_t *mem, compact_control_t *cc) noexcept nogil:
    """Find free pages for those that are to move, from the end of the zone down."""
    cdef zone_t *zone = cc.zone
    cdef pfn_t at, start, end, low_pfn = pageblock_end_pfn(cc.migrate_pfn)
    cdef int stride = COMPACT_CLUSTER_MAX if cc.mode == MIGRATE_ASYNC else 1
    cdef int64_t total
    fast_isolate_freepages(mem, cc)
    if cc.nr_freepages:
        return
    at = cc.free_pfn
    start = pageblock_start_pfn(at)
    end = min(start + PAGEBLOCK_PAGES, zone_end_pfn(zone))
    while start >= low_pfn:
        if (pageblock_in_zone(mem, start, end, zone) and suitable_migration_target(mem, cc, start)
                and isolation_suitable(mem, cc, start)):
            total = isolate_freepages_block(mem, cc, &at, end, stride)
            if at == end:
                set_pageblock_skip(mem, start, True)
                if start - PAGEBLOCK_PAGES < zone.compact.cached_free_pfn:
                    zone.compact.cached_free_pfn = start - PAGEBLOCK_PAGES
            if cc.nr_freepages >= cc.nr_migratepages:
                if at >= end:
                    at = start - PAGEBLOCK_PAGES
                break
            if at < end:
                break
            stride = 1 if total else min(COMPACT_CLUSTER_MAX, stride << 1)
        end = start
        start -= PAGEBLOCK_PAGES
        at = start
    cc.free_pfn = at


# -- the search of the free lists for where to begin ----------------------------------------------

cdef inline int freelist_scan_limit(const compact_control_t *cc) noexcept nogil:
    return (COMPACT_CLUSTER_MAX >> min(31, cc.fast_search_fail)) + 1


cdef inline pfn_t list_prev(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        return <pfn_t> block_of(mem, pfn).prev << PAGEBLOCK_ORDER
    return page_prev(&mem.pages[pfn])


cdef void begin_list_at(mem_t *mem, free_list_t *lst, pfn_t pfn, int order) noexcept nogil:
    """Turn a list so that a block of it comes first (move_freelist_head)."""
    cdef pfn_t last
    if pfn == lst.head:
        return
    last = list_prev(mem, pfn, order)
    if order >= PAGEBLOCK_ORDER:
        block_of(mem, lst.tail).next = <uint32_t> (lst.head >> PAGEBLOCK_ORDER)
        block_of(mem, lst.head).prev = <uint32_t> (lst.tail >> PAGEBLOCK_ORDER)
    else:
        set_page_next(mem.pages, NULL, lst.tail, lst.head)
        set_page_prev(mem.pages, NULL, lst.head, lst.tail)
    lst.head, lst.tail = pfn, last


cdef void end_list_at(mem_t *mem, free_list_t *lst, pfn_t pfn, int order) noexcept nogil:
    """Turn a list so that a block of it comes last (move_freelist_tail)."""
    if pfn != lst.tail:
        begin_list_at(mem, lst, list_next(mem, pfn, order), order)


cdef bint may_search_for_source(const compact_control_t *cc) noexcept nogil:
    if cc.flags & CC_IGNORE_SKIP_HINT:
        return False
    if (cc.migrate_pfn != cc.zone.zone_start_pfn
            and cc.migrate_pfn != pageblock_start_pfn(cc.migrate_pfn)):
        return False
    if cc.order <= COSTLY_ORDER:
        return False
    return not (cc.flags & CC_DIRECT and cc.migratetype != MIGRATE_MOVABLE)


cdef int64_t find_source_on_list(mem_t *mem, compact_control_t *cc, int order, pfn_t high_pfn,
                                 int limit, int *scanned) noexcept nogil:
    """A free block of an order below high_pfn whose pageblock is not to be skipped; -1."""
    cdef free_list_t *lst = &cc.zone.free_area[MIGRATE_MOVABLE][order]
    cdef pfn_t pfn = lst.head
    cdef uint64_t i
    for i in range(lst.count):
        scanned[0] += 1
        if scanned[0] > limit:
            end_list_at(mem, lst, pfn, order)
            return -1
        if pfn < high_pfn and not get_pageblock_skip(mem, pfn):
            end_list_at(mem, lst, pfn, order)
            return <int64_t> pfn
        pfn = list_next(mem, pfn, order)
    return -1


cdef pfn_t fast_find_migrateblock(mem_t *mem, compact_control_t *cc) noexcept nogil:
    """Where to look for pages to move: a pageblock low in the zone that has free pages already."""
    cdef int limit = freelist_scan_limit(cc), scanned = 0, order = cc.order - 1
    cdef int64_t found = -1
    cdef pfn_t distance, high_pfn
    if not may_search_for_source(cc):
        return cc.migrate_pfn
    distance = (cc.free_pfn - cc.migrate_pfn) >> 1
    if cc.migrate_pfn != cc.zone.zone_start_pfn:
        distance >>= 2
    high_pfn = pageblock_start_pfn(cc.migrate_pfn + distance)
    while order >= COSTLY_ORDER and found < 0 and scanned < limit:
        found = find_source_on_list(mem, cc, order, high_pfn, limit, &scanned)
        order -= 1
    cc.migrate_scanned += scanned
    if found >= 0:
        if cc.fast_start_pfn != FAST_START_USED:
            cc.fast_start_pfn = (min(cc.fast_start_pfn, <pfn_t> found) if cc.fast_start_pfn
                                 else <pfn_t> found)
        cc.fast_search_fail = 0
        # This kernel marks the pageblock, which makes the scan of it end at its first page.
        set_pageblock_skip(mem, <pfn_t> found, True)
        return max(pageblock_start_pfn(<pfn_t> found), cc.zone.zone_start_pfn)
    cc.fast_search_fail += 1
    if cc.fast_start_pfn and cc.fast_start_pfn != FAST_START_USED:
        cc.migrate_pfn = cc.fast_start_pfn
        cc.fast_start_pfn = FAST_START_USED
    return cc.migrate_pfn


cdef int next_search_order(compact_control_t *cc, int order) noexcept nogil:
    order -= 1
    if order < 0:
        order = cc.order - 1
    if order == cc.search_order:
        cc.search_order -= 1
        if cc.search_order < 0:
            cc.search_order = cc.order - 1
        return -1
    return order


cdef struct target_search_t:
    pfn_t low_pfn                   # from here on a block is taken at once
    pfn_t min_pfn                   # from here on it is better than none
    pfn_t highest                   # pageblock of the highest block seen
    int limit
    int64_t scanned


cdef int64_t find_target_on_list(mem_t *mem, compact_control_t *cc, int order,
                                 target_search_t *s) noexcept nogil:
    """A free block of an order high in the zone, the list's last first; -1."""
    cdef free_list_t *lst = &cc.zone.free_area[MIGRATE_MOVABLE][order]
    cdef pfn_t pfn = lst.tail, high_pfn = 0
    cdef int seen = 0
    cdef int64_t found = -1
    cdef uint64_t i
    for i in range(lst.count):
        seen += 1
        s.scanned += 1
        if pfn >= s.highest:
            s.highest = max(pageblock_start_pfn(pfn), cc.zone.zone_start_pfn)
        if pfn >= s.low_pfn:
            cc.fast_search_fail = 0
            cc.search_order = order
            found = <int64_t> pfn
            break
        if pfn >= s.min_pfn and pfn > high_pfn:
            high_pfn = pfn
            s.limit >>= 1
        if seen >= s.limit:
            break
        if i + 1 < lst.count:
            pfn = list_prev(mem, pfn, order)
    if found < 0 and high_pfn:
        found = <int64_t> high_pfn
    if lst.count and (found >= 0 or seen >= s.limit):
        begin_list_at(mem, lst, <pfn_t> found if found >= 0 else pfn, order)
    if seen >= s.limit:
        s.limit = max(1, s.limit >> 1)
    return found


cdef void fast_isolate_around(mem_t *mem, compact_control_t *cc, pfn_t pfn) noexcept nogil:
    """Take more free pages of the pageblock that the search led to."""
    cdef pfn_t start = max(pageblock_start_pfn(pfn), cc.zone.zone_start_pfn), first = start
    cdef pfn_t end = min(pageblock_end_pfn(pfn), zone_end_pfn(cc.zone))
    if cc.nr_freepages >= cc.nr_migratepages or direct_async(cc):
        return
    if not pageblock_in_zone(mem, start, end, cc.zone):
        return
    isolate_freepages_block(mem, cc, &start, end, 1)
    if start == end:
        set_pageblock_skip(mem, first, True)


cdef int64_t search_targets(mem_t *mem, compact_control_t *cc, target_search_t *s) noexcept nogil:
    """Search list after list for a target, and isolate it; its pfn, or -1."""
    cdef int order
    cdef int64_t found = -1
    cc.search_order = min(cc.order - 1, cc.search_order)
    order = cc.search_order
    while found < 0 and order >= 0:
        if free_of_order(cc.zone, order):
            found = find_target_on_list(mem, cc, order, s)
            if found >= 0:
                if isolate_free_page(mem, cc.zone, <pfn_t> found, order):
                    s.scanned += (<int64_t> 1 << order) - 1
                    keep_free_page(mem, cc, <pfn_t> found, order)
                else:
                    order = cc.search_order + 1
                    found = -1
            if cc.nr_freepages >= cc.nr_migratepages:
                break
        order = next_search_order(cc, order)
    return found


cdef inline bint free_of_order(const zone_t *zone, int order) noexcept nogil:
    cdef int mt
    for mt in range(MIGRATE_TYPES):
        if zone.free_area[mt][order].count:
            return True
    return False


cdef void fast_isolate_freepages(mem_t *mem, compact_control_t *cc) noexcept nogil:
    """Take free pages where the free lists say that some lie high in the zone."""
    cdef target_search_t s
    cdef pfn_t distance = cc.free_pfn - cc.migrate_pfn
    cdef compact_t *compact = &cc.zone.compact
    cdef int64_t found
    cdef bint scan_start
    if cc.order <= 0:
        return
    s.limit = max(1, freelist_scan_limit(cc) >> 1)
    scan_start = cc.free_pfn >= compact.init_free_pfn
    if scan_start:
        s.limit = PAGEBLOCK_PAGES >> 1
    s.low_pfn = pageblock_start_pfn(cc.free_pfn - (distance >> 2))
    s.min_pfn = pageblock_start_pfn(cc.free_pfn - (distance >> 1))
    s.highest = 0
    s.scanned = 0
    found = search_targets(mem, cc, &s)
    if found < 0:
        cc.fast_search_fail += 1
        if scan_start and s.highest >= s.min_pfn:
            found = <int64_t> s.highest
            cc.free_pfn = s.highest
        elif scan_start and cc.flags & CC_DIRECT:
            if pageblock_in_zone(mem, s.min_pfn, pageblock_end_pfn(s.min_pfn), cc.zone):
                found = <int64_t> s.min_pfn
            cc.free_pfn = s.min_pfn
    if s.highest and s.highest >= compact.cached_free_pfn:
        compact.cached_free_pfn = s.highest - PAGEBLOCK_PAGES
    cc.free_scanned += s.scanned
    if found >= 0:
        fast_isolate_around(mem, cc, <pfn_t> found)
