"""Per-CPU page lists: refilling, flushing, draining and many pages at once (mm/page_alloc.c).

A bulk call leaves the machine as its single calls would, one after the other.  It is faster
because it knows what comes next: pages that would only pass through a CPU's list are not
linked into it, runs of neighbours are taken and merged as one block, and the records that will
be needed are fetched ahead.
"""
from libc.string cimport memset

from kmm._fallback cimport is_bad, rmqueue_buddy
from kmm._freelist cimport (add_to_free_list, block_mt, buddy_state, ctz,
                            del_page_from_free_list, is_free_block, list_add_pcp, list_del,
                            mark_dirty, merge_pages, page_prev)
from kmm._memmap cimport is_free_state, page_zone

cdef enum:
    AHEAD = 32                      # blocks whose records are fetched before they are needed


cdef bint pcp_refill(mem_t *mem, zone_t *zone, int order, int mt, int flags,
                     int cpu) noexcept nogil:
    """Fill a CPU's empty list with a batch; whether it has any block now (rmqueue_bulk)."""
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef free_list_t *lst = &pcp.lists[order_to_pindex(mt, order)]
    cdef int64_t pfn
    cdef int i
    for i in range(refill_blocks(pcp, order)):
        pfn = rmqueue_buddy(mem, zone, order, mt, flags)
        if pfn < 0:
            break
        zone.nr_free_pages -= <int64_t> 1 << order
        if is_bad(mem, <pfn_t> pfn, order):
            continue
        list_add_pcp(mem, lst, pfn, order, mt, True)
        pcp.count += 1 << order
    return lst.count != 0


# -- who compacts waits for a block ------------------------------------------------------------

cdef int64_t merges_to(const mem_t *mem, const zone_t *zone, pfn_t pfn, int order, int to,
                       int mt) noexcept nogil:
    """Where the block of an order would start that a freed one merges to; -1 if it does not."""
    cdef pfn_t buddy
    cdef int other
    while order < to:
        buddy = pfn ^ (<pfn_t> 1 << order)
        if order < PAGEBLOCK_ORDER:
            if not is_free_state(mem.states[buddy], order):
                return -1
        else:
            if not is_free_block(mem, buddy, order, zone.index):
                return -1
            other = get_pageblock_migratetype(mem, buddy)
            if other != mt and (mt >= MIGRATE_HIGHATOMIC or other >= MIGRATE_HIGHATOMIC):
                return -1
        pfn &= buddy
        order += 1
    return <int64_t> pfn


cdef bint compaction_capture(mem_t *mem, zone_t *zone, pfn_t pfn, int order,
                             int mt) noexcept nogil:
    """Hand a freed block, merged to the order that is waited for, to who waits; whether so."""
    cdef capture_t *capture = mem.capture
    cdef int64_t head
    cdef int o
    cdef pfn_t at = pfn
    if (capture.zone != zone or capture.pfn >= 0 or mt == MIGRATE_ISOLATE or order > capture.order
            or (capture.order < PAGEBLOCK_ORDER and mt == MIGRATE_MOVABLE)):
        return False
    head = merges_to(mem, zone, pfn, order, capture.order, mt)
    if head < 0:
        return False
    for o in range(order, capture.order):
        del_page_from_free_list(mem, zone, at ^ (<pfn_t> 1 << o), o)
        at &= ~(<pfn_t> 1 << o)
    zone.nr_free_pages -= (<int64_t> 1 << capture.order) - (<int64_t> 1 << order)
    capture.pfn = head
    mark_allocated(mem, <pfn_t> head, capture.order)
    return True


# -- fetching ahead ---------------------------------------------------------------------------

cdef inline void fetch_records(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Fetch what merging a page first looks at: the states around it, its buddies' records."""
    prefetch(&mem.states[pfn])
    prefetch(&mem.pages[pfn ^ 1])
    prefetch(&mem.pages[pfn ^ 4])


cdef inline void fetch_neighbours(const page_t *pages, pfn_t pfn, int order) noexcept nogil:
    """Fetch what merging a page will write: the neighbours of its next two buddies on their lists.

    Whether these are free is not asked: a wrong guess of the branch would cost more than lines
    fetched in vain.
    """
    cdef const page_t *buddy = &pages[pfn ^ (<pfn_t> 1 << order)]
    prefetch(&pages[page_next(buddy)])
    prefetch(&pages[page_prev(buddy)])
    buddy = &pages[(pfn & ~(<pfn_t> 1 << order)) ^ (<pfn_t> 2 << order)]
    prefetch(&pages[page_next(buddy)])
    prefetch(&pages[page_prev(buddy)])


cdef int64_t free_pcplist(mem_t *mem, zone_t *zone, per_cpu_pages_t *pcp, int pindex,
                          int64_t count) noexcept nogil:
    """Give pages of one list back, oldest first; return how many of count are still to go."""
    cdef free_list_t *lst = &pcp.lists[pindex]
    cdef int order = pindex_to_order(pindex), mt, i
    cdef pfn_t pfn, near = lst.tail, far = lst.tail
    cdef bint ahead = order < 4 and min(count >> order, <int64_t> lst.count) > 4 * AHEAD
    if ahead:
        for i in range(AHEAD):
            if i >= AHEAD / 2:
                near = page_prev(&mem.pages[near])
            fetch_records(mem, far)
            far = page_prev(&mem.pages[far])
    while lst.count and count > 0:
        pfn = lst.tail
        if ahead and lst.count > AHEAD:
            fetch_records(mem, far)
            fetch_neighbours(mem.pages, near, order)
            near = page_prev(&mem.pages[near])
            far = page_prev(&mem.pages[far])
        mt = block_mt(mem, pfn, order)
        list_del(mem, lst, pfn, order)
        count -= <int64_t> 1 << order
        pcp.count -= 1 << order
        if zone.nr_isolate_pageblock:
            mt = get_pageblock_migratetype(mem, pfn)
        if mem.capture == NULL or not compaction_capture(mem, zone, pfn, order, mt):
            free_one_page(mem, zone, pfn, order, mt, FPI_NONE)
    return count


cdef void free_pcppages_bulk(mem_t *mem, zone_t *zone, per_cpu_pages_t *pcp, int64_t count,
                             int pindex) noexcept nogil:
    """Give pages back, emptying list after list from pindex on."""
    if count > pcp.count:
        count = pcp.count
    while count > 0:
        count = free_pcplist(mem, zone, pcp, pindex, count)
        pindex += 1
        if pindex >= PCP_LISTS:
            pindex = 0


cdef inline int64_t pcp_limit(const per_cpu_pages_t *pcp, int order) noexcept nogil:
    """How many pages a CPU's lists hold before some go back; 0 while they are emptied."""
    if pcp.free_factor and 0 < order <= 3:
        return 0
    return pcp.high


cdef inline int64_t nr_pcp_free(per_cpu_pages_t *pcp, int order) noexcept nogil:
    """How many pages go back now that the limit is reached; frees in a row make it more."""
    cdef int64_t n, high = pcp_limit(pcp, order)
    if pcp.free_factor and 0 < order <= 3:
        return pcp.count
    if pcp.high < pcp.batch:
        return 1
    n = <int64_t> pcp.batch << pcp.free_factor
    if n < high - pcp.batch and pcp.free_factor < 5:
        pcp.free_factor += 1
    return max(min(n, high - pcp.batch), pcp.batch)


cdef void pcp_overflow(mem_t *mem, zone_t *zone, int order, int pindex, int cpu) noexcept nogil:
    """Give pages back after a free that reached the limit."""
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    free_pcppages_bulk(mem, zone, pcp, nr_pcp_free(pcp, order), pindex)


cdef void free_unref_page_rare(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                               int cpu) noexcept nogil:
    """Free a block of an order that CPUs do not keep, or from a pageblock of a special type."""
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef int pindex
    if not pcp_allowed_order(order) or mt == MIGRATE_ISOLATE:
        free_one_page(mem, zone, pfn, order, mt, FPI_NONE)
        return
    # Pages kept for atomic requests lie among the movable ones and remember where they belong.
    pindex = order_to_pindex(MIGRATE_MOVABLE, order)
    list_add_pcp(mem, &pcp.lists[pindex], pfn, order, mt, False)
    pcp.count += 1 << order
    if pcp.count >= pcp_limit(pcp, order):
        pcp_overflow(mem, zone, order, pindex, cpu)


cdef void drain_pages(mem_t *mem, zone_t *zone, int cpu) noexcept nogil:
    if zone.pcp[cpu].count:
        free_pcppages_bulk(mem, zone, &zone.pcp[cpu], zone.pcp[cpu].count, 0)


# -- many at once: allocating ---------------------------------------------------------------

cdef inline void count_down(per_cpu_pages_t *pcp, int64_t times) noexcept nogil:
    pcp.free_factor = pcp.free_factor >> times if times < 31 else 0


cdef int64_t take_from_pcp(mem_t *mem, zone_t *zone, int order, int mt, int cpu, uint64_t *out,
                           int64_t n) noexcept nogil:
    """Take up to n blocks that a CPU's list has; return how many."""
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef free_list_t *lst = &pcp.lists[order_to_pindex(mt, order)]
    cdef int64_t i
    if n > <int64_t> lst.count:
        n = <int64_t> lst.count
    for i in range(n):
        out[i] = pop_head(mem, lst, order)
    pcp.count -= <int32_t> (n << order)
    count_down(pcp, n)
    return n


cdef inline void mark_run(mem_t *mem, pfn_t pfn, int order, int64_t n, uint64_t *out) noexcept nogil:
    """Make the caller's n blocks of an order out of the pages from pfn on."""
    cdef int64_t i
    if order == 0 and mem.journal == NULL:
        memset(&mem.states[pfn], STATE_ALLOCATED, n)
    else:
        for i in range(n):
            set_state(mem.states, mem.journal, pfn + (<pfn_t> i << order), STATE_ALLOCATED | order)
    for i in range(n):
        out[i] = pfn + (<pfn_t> i << order)


cdef int64_t blocks_of_type(const zone_t *zone, int order, int mt) noexcept nogil:
    """How many blocks of an order the lists of one type can give."""
    cdef int o
    cdef int64_t n = 0
    for o in range(order, MAX_ORDER):
        n += <int64_t> zone.free_area[mt][o].count << (o - order)
    return n


cdef int64_t take_batches(mem_t *mem, zone_t *zone, int order, int mt, int cpu, uint64_t *out,
                          int64_t n, int64_t spare) noexcept nogil:
    """Take whole batches that would pass through a CPU's empty list; return how many blocks.

    :param n: blocks wanted; spare: pages that the zone may lose before its watermark is asked
        again with another answer.
    """
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef int64_t batch = refill_blocks(pcp, order), have = blocks_of_type(zone, order, mt)
    cdef int64_t left, run, i, done = 0
    cdef int o
    cdef pfn_t pfn, at
    if order > PAGEBLOCK_ORDER or batch < 1 or mem.poisoned:
        return 0
    # A request above order 0 also needs a block to be left on the lists.
    left = min(n, have - (order > 0), spare >> order)
    left -= left % batch
    if left <= 0:
        return 0
    n = left
    while left > 0:
        # Single requests would split the first of the smallest blocks and take it piece by
        # piece, upward; what remains of it stays on lists that were empty.
        o = order + ctz(zone.free_mask[mt] >> order)
        pfn = zone.free_area[mt][o].head
        del_page_from_free_list(mem, zone, pfn, o)
        run = min(left, <int64_t> 1 << (o - order))
        if order >= PAGEBLOCK_ORDER:
            for i in range(run):
                out[done + i] = pfn + (<pfn_t> i << order)
                mark_allocated(mem, out[done + i], order)
        else:
            if o >= PAGEBLOCK_ORDER:
                mark_dirty_run(mem, pfn, run << order)
            mark_run(mem, pfn, order, run, &out[done])
        done += run
        left -= run
        at = pfn + (<pfn_t> run << order)
        add_rest(mem, zone, at, pfn + (<pfn_t> 1 << o), mt)
    zone.nr_free_pages -= n << order
    count_down(pcp, n)
    return n


cdef inline void mark_dirty_run(mem_t *mem, pfn_t pfn, int64_t pages) noexcept nogil:
    mark_dirty(mem, pfn)
    if pages > PAGEBLOCK_PAGES:
        mark_dirty(mem, pfn + PAGEBLOCK_PAGES)


cdef void add_rest(mem_t *mem, zone_t *zone, pfn_t pfn, pfn_t end, int mt) noexcept nogil:
    """Put the upper part of a split block back, in the largest aligned pieces."""
    cdef int o
    while pfn < end:
        o = ctz(<uint32_t> pfn | <uint32_t> 1 << (MAX_ORDER - 1))
        while pfn + (<pfn_t> 1 << o) > end:
            o -= 1
        if o < PAGEBLOCK_ORDER:
            mark_dirty(mem, pfn)
        add_to_free_list(mem, zone, pfn, o, mt, False)
        pfn += <pfn_t> 1 << o


# -- many at once: freeing ------------------------------------------------------------------

cdef inline int run_order(const uint64_t *pfns, int64_t n, int order) noexcept nogil:
    """The order of the block that the first of some blocks become, freed one after the other.

    Neighbours that come upward, or downward, merge among themselves whatever lies around them, so
    an aligned run of them may be freed as one.
    """
    cdef int64_t step = <int64_t> 1 << order, run = 1
    cdef pfn_t pfn = pfns[0], edge = pfn
    cdef int most, o = order
    if pfns[1] < pfn:
        edge, step = pfn + step, -step
    most = ctz(<uint32_t> edge | <uint32_t> 1 << (MAX_ORDER - 1))
    while o < most and 2 * run <= n:
        while run < <int64_t> 2 << (o - order) and pfns[run] == pfn + run * step:
            run += 1
        if run < <int64_t> 2 << (o - order):
            break
        o += 1
    return o


cdef inline void insert_page(page_t *pages, uint8_t *states, zone_t *zone, pfn_t pfn, int order,
                             int mt) noexcept nogil:
    """add_to_free_list and merge_likely for a block below order 8, without a journal."""
    cdef free_list_t *lst = &zone.free_area[mt][order]
    cdef pfn_t pair = (pfn & ~(<pfn_t> 1 << order)) ^ (<pfn_t> 2 << order)
    if lst.count == 0:
        zone.free_mask[mt] |= <uint32_t> 1 << order
    link_page(pages, NULL, lst, pfn, is_free_state(states[pair], order + 1))
    set_state(states, NULL, pfn, buddy_state(order, mt))


cdef void free_sequence(mem_t *mem, zone_t *zone, const uint64_t *pfns, int64_t n, int order,
                        int mt) noexcept nogil:
    """Free blocks of one type, whose states are clear, to the free lists in the order given."""
    cdef int64_t i = 0, pages_freed = 0
    cdef page_t *pages = mem.pages
    cdef uint8_t *states = mem.states
    cdef pfn_t pfn
    cdef int o
    if order >= PAGEBLOCK_ORDER or mem.journal != NULL or mem.capture != NULL:
        for i in range(n):
            if mem.capture == NULL or not compaction_capture(mem, zone, pfns[i], order, mt):
                free_one_page(mem, zone, pfns[i], order, mt, FPI_NONE)
        return
    while i < n:
        pfn = pfns[i]
        o = order
        if i + 1 < n and (pfns[i + 1] == pfn + (<pfn_t> 1 << order)
                          or pfns[i + 1] == pfn - (<pfn_t> 1 << order)):
            o = run_order(&pfns[i], n - i, order)
        if o > order:
            free_one_page(mem, zone, pfn & ~((<pfn_t> 1 << o) - 1), o, mt, FPI_NONE)
            i += <int64_t> 1 << (o - order)
            continue
        if i + AHEAD < n:
            fetch_records(mem, pfns[i + AHEAD])
            fetch_neighbours(pages, pfns[i + AHEAD / 2], order)
        pfn = merge_pages(pages, states, NULL, zone, pfn, &o)
        if o < PAGEBLOCK_ORDER - 1:
            insert_page(pages, states, zone, pfn, o, mt)
            pages_freed += <int64_t> 1 << order
        else:
            # What was merged below is counted here, not there.
            pages_freed += (<int64_t> 1 << order) - (<int64_t> 1 << o)
            free_one_page(mem, zone, pfn, o, mt, FPI_NONE)
        i += 1
    if mt != MIGRATE_ISOLATE:
        zone.nr_free_pages += pages_freed


cdef int64_t run_of_type(const mem_t *mem, const uint64_t *pfns, int64_t n, int *mt) noexcept nogil:
    """How many of the first pfns lie in the same zone and in pageblocks of the same type."""
    cdef int64_t i = 1
    cdef pfn_t block = pfns[0] >> PAGEBLOCK_ORDER
    cdef int zone = mem.blocks[block].zone
    mt[0] = get_pageblock_migratetype(mem, pfns[0])
    while i < n:
        if pfns[i] >> PAGEBLOCK_ORDER != block:
            block = pfns[i] >> PAGEBLOCK_ORDER
            if (mem.blocks[block].zone != zone
                    or get_pageblock_migratetype(mem, pfns[i]) != mt[0]):
                break
        i += 1
    return i


cdef void free_through_pcp(mem_t *mem, zone_t *zone, const uint64_t *pfns, int64_t n, int order,
                           int mt, int cpu) noexcept nogil:
    """Free blocks of one type by way of a CPU's list, which they leave in the order they came.

    Those that enter and leave within the call are never linked: pfns[first:i] are the newest
    part of the list.
    """
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef int pindex = order_to_pindex(MIGRATE_MOVABLE if mt == MIGRATE_HIGHATOMIC else mt, order)
    cdef free_list_t *lst = &pcp.lists[pindex]
    cdef int64_t i = 0, first = 0, room, count, here
    while i < n:
        room = (pcp_limit(pcp, order) - pcp.count + (1 << order) - 1) >> order
        if room < 1:
            room = 1
        if room > n - i:
            pcp.count += <int32_t> ((n - i) << order)
            break
        i += room
        pcp.count += <int32_t> (room << order)
        count = min(nr_pcp_free(pcp, order), pcp.count)
        count = free_pcplist(mem, zone, pcp, pindex, count)
        if count > 0:
            here = min((count + (1 << order) - 1) >> order, i - first)
            free_sequence(mem, zone, &pfns[first], here, order, mt)
            first += here
            pcp.count -= <int32_t> (here << order)
            count -= here << order
        if count > 0:
            free_pcppages_bulk(mem, zone, pcp, count, (pindex + 1) % PCP_LISTS)
    for i in range(first, n):
        list_add_pcp(mem, lst, pfns[i], order, mt, False)


cdef void free_unref_pages(mem_t *mem, const uint64_t *pfns, int64_t n, int order,
                           int cpu) noexcept nogil:
    """Free blocks that the caller has let go of, one after the other; their states are clear."""
    cdef int64_t i = 0, run
    cdef int mt = 0
    cdef zone_t *zone
    while i < n:
        zone = page_zone(mem, pfns[i])
        run = run_of_type(mem, &pfns[i], n - i, &mt)
        zone.pgfree += run << order
        if not pcp_allowed_order(order) or mt == MIGRATE_ISOLATE:
            free_sequence(mem, zone, &pfns[i], run, order, mt)
        else:
            free_through_pcp(mem, zone, &pfns[i], run, order, mt, cpu)
        i += run
