"""Fallback between migratetypes, watermark boost and the highatomic reserve (mm/page_alloc.c).

Which pageblock a request claims when its own lists are empty decides what can be taken
offline later, so the order of the kernel's choices is kept to the page.
"""
from kmm._freelist cimport mark_dirty, move_freepages, move_to_free_list
from kmm._memmap cimport get_pageblock_migratetype, journal_add, set_pageblock_migratetype

# Which migratetypes a request may take from, first choice first.
cdef int[3][2] FALLBACKS = [
    [MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE],     # unmovable
    [MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE],   # movable
    [MIGRATE_UNMOVABLE, MIGRATE_MOVABLE],       # reclaimable
]


cdef int64_t move_freepages_block(mem_t *mem, zone_t *zone, pfn_t pfn, int mt,
                                  int64_t *movable) noexcept nogil:
    """Move a pageblock's free pages to a type's lists; 0 where it reaches beyond the zone."""
    cdef pfn_t start = pfn & ~<pfn_t> (PAGEBLOCK_PAGES - 1), end = start + PAGEBLOCK_PAGES
    if end > zone.zone_start_pfn + zone.spanned_pages:
        return 0
    if start < zone.zone_start_pfn:
        start = pfn
    return move_freepages(mem, zone, start, end, mt, movable)


cdef bint boost_watermark(zone_t *zone) noexcept nogil:
    cdef int64_t most
    if not zone.boost_factor or zone.managed_pages < 4 * PAGEBLOCK_PAGES:
        return False
    most = zone.watermark_high * zone.boost_factor / 10000
    if not most:
        return False
    if most < PAGEBLOCK_PAGES:
        most = PAGEBLOCK_PAGES
    zone.watermark_boost = min(zone.watermark_boost + PAGEBLOCK_PAGES, most)
    return True


cdef bint can_steal_fallback(const mem_t *mem, int order, int mt) noexcept nogil:
    return (order >= PAGEBLOCK_ORDER / 2 or mt == MIGRATE_RECLAIMABLE
            or mt == MIGRATE_UNMOVABLE or mem.grouping_disabled)


cdef inline int find_suitable_fallback(const zone_t *zone, int order, int mt) noexcept nogil:
    cdef int i
    for i in range(2):
        if zone.free_mask[FALLBACKS[mt][i]] >> order & 1:
            return FALLBACKS[mt][i]
    return -1


cdef int suitable_fallback(const zone_t *zone, int order, int mt) noexcept nogil:
    return find_suitable_fallback(zone, order, mt)


cdef void steal_suitable_fallback(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                                  int flags, bint whole) noexcept nogil:
    cdef int old = get_pageblock_migratetype(mem, pfn)
    cdef int64_t moved, movable = 0, alike = 0
    cdef pfn_t p
    if old >= MIGRATE_HIGHATOMIC:
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    if order >= PAGEBLOCK_ORDER:
        for p in range(pfn, pfn + (<pfn_t> 1 << order), 512):
            set_pageblock_migratetype(mem, p, mt)
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    if boost_watermark(zone) and flags & ALLOC_KSWAPD:
        zone.boosted = 1
    if not whole:
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    moved = move_freepages_block(mem, zone, pfn, mt, &movable)
    if not moved:
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    # Pages in use that suit the new type stay where they are.
    if mt == MIGRATE_MOVABLE:
        alike = movable
    elif old == MIGRATE_MOVABLE:
        alike = PAGEBLOCK_PAGES - moved - movable
    if moved + alike >= PAGEBLOCK_PAGES / 2 or mem.grouping_disabled:
        set_pageblock_migratetype(mem, pfn, mt)


cdef bint rmqueue_fallback(mem_t *mem, zone_t *zone, int order, int mt, int flags) noexcept nogil:
    """Move free pages of another type to mt's lists; whether there were any."""
    cdef int lowest = order, o, source = -1
    if mt > MIGRATE_RECLAIMABLE:
        return False
    if order < PAGEBLOCK_ORDER and flags & ALLOC_NOFRAGMENT:
        lowest = PAGEBLOCK_ORDER
    for o in range(MAX_ORDER - 1, lowest - 1, -1):
        source = find_suitable_fallback(zone, o, mt)
        if source >= 0:
            break
    if source < 0:
        return False
    if not can_steal_fallback(mem, o, mt) and mt == MIGRATE_MOVABLE and o > order:
        # A movable request that cannot claim a pageblock takes the smallest block there is.
        for o in range(order, MAX_ORDER):
            source = find_suitable_fallback(zone, o, mt)
            if source >= 0:
                break
    steal_suitable_fallback(mem, zone, zone.free_area[source][o].head, o, mt, flags,
                            can_steal_fallback(mem, o, mt))
    return True


cdef bint drop_poisoned(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    cdef pfn_t page, end = pfn + (<pfn_t> 1 << order)
    for page in range(pfn, end):
        if mem.pages[page].flags & PF_HWPOISON:
            break
    else:
        return False
    for page in range(pfn, end):
        mark_dirty(mem, page)
        if mem.journal != NULL:
            journal_add(mem.journal, &mem.pages[page], sizeof(page_t))
        mem.pages[page].flags |= PF_TAKEN
    return True


cdef void reserve_highatomic_pageblock(mem_t *mem, zone_t *zone, pfn_t pfn) noexcept nogil:
    """Keep the pageblock of a high-order atomic allocation for further ones."""
    cdef int64_t most = zone.managed_pages / 100 + PAGEBLOCK_PAGES
    if zone.nr_reserved_highatomic >= most:
        return
    if get_pageblock_migratetype(mem, pfn) >= MIGRATE_HIGHATOMIC:
        return
    zone.nr_reserved_highatomic += PAGEBLOCK_PAGES
    set_pageblock_migratetype(mem, pfn, MIGRATE_HIGHATOMIC)
    move_freepages_block(mem, zone, pfn, MIGRATE_HIGHATOMIC, NULL)


cdef bint unreserve_highatomic_pageblock(mem_t *mem, zone_t *zone, int mt,
                                         bint force) noexcept nogil:
    """Give one reserved pageblock of a zone back to a type; whether pages were moved."""
    cdef int order
    cdef pfn_t pfn
    if not force and zone.nr_reserved_highatomic <= PAGEBLOCK_PAGES:
        return False
    if not zone.free_mask[MIGRATE_HIGHATOMIC]:
        return False
    for order in range(MAX_ORDER):
        if not zone.free_mask[MIGRATE_HIGHATOMIC] >> order & 1:
            continue
        pfn = zone.free_area[MIGRATE_HIGHATOMIC][order].head
        if get_pageblock_migratetype(mem, pfn) == MIGRATE_HIGHATOMIC:
            zone.nr_reserved_highatomic = max(0, zone.nr_reserved_highatomic - PAGEBLOCK_PAGES)
        set_pageblock_migratetype(mem, pfn, mt)
        if move_freepages_block(mem, zone, pfn, mt, NULL):
            return True
    return False
