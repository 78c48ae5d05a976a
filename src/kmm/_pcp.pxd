# Per-CPU page lists.  What happens on nearly every call is inlined; refilling and flushing are
# calls.
from kmm._freelist cimport (add_block, block_of, clear_block_record, free_one_page, link_page,
                            mark_allocated, page_next, pcp_state, prefetch, set_state)
from kmm._memmap cimport get_pageblock_migratetype
from kmm._types cimport *

cdef bint pcp_refill(mem_t *mem, zone_t *zone, int order, int mt, int flags,
                     int cpu) noexcept nogil
cdef void pcp_overflow(mem_t *mem, zone_t *zone, int order, int pindex, int cpu) noexcept nogil
cdef void free_unref_page_rare(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                               int cpu) noexcept nogil
cdef void free_pcppages_bulk(mem_t *mem, zone_t *zone, per_cpu_pages_t *pcp, int64_t count,
                             int pindex) noexcept nogil
cdef void drain_pages(mem_t *mem, zone_t *zone, int cpu) noexcept nogil
cdef int64_t take_from_pcp(mem_t *mem, zone_t *zone, int order, int mt, int cpu, uint64_t *out,
                           int64_t n) noexcept nogil
cdef int64_t take_batches(mem_t *mem, zone_t *zone, int order, int mt, int cpu, uint64_t *out,
                          int64_t n, int64_t spare) noexcept nogil
cdef void free_unref_pages(mem_t *mem, const uint64_t *pfns, int64_t n, int order,
                           int cpu) noexcept nogil


cdef inline bint pcp_allowed_order(int order) noexcept nogil:
    return order <= 3 or order == PAGEBLOCK_ORDER


cdef inline int order_to_pindex(int mt, int order) noexcept nogil:
    if order == PAGEBLOCK_ORDER:
        return 12 + (mt == MIGRATE_MOVABLE)
    return 3 * order + mt


cdef inline int pindex_to_order(int pindex) noexcept nogil:
    return PAGEBLOCK_ORDER if pindex >= 12 else pindex // 3


cdef inline int refill_blocks(const per_cpu_pages_t *pcp, int order) noexcept nogil:
    """How many blocks an empty list takes from the free lists at once."""
    return max(pcp.batch >> order, 2) if pcp.batch > 1 else pcp.batch


cdef inline pfn_t pop_head(mem_t *mem, free_list_t *lst, int order) noexcept nogil:
    """Take a list's first block; it becomes the caller's."""
    cdef pfn_t pfn = lst.head
    # The new head keeps a stale back link: nobody follows the one of a list's head.
    if order >= PAGEBLOCK_ORDER:
        lst.head = <pfn_t> block_of(mem, pfn).next << PAGEBLOCK_ORDER
        clear_block_record(mem, pfn)
    else:
        lst.head = page_next(&mem.pages[pfn])
        prefetch(&mem.pages[lst.head])
    lst.count -= 1
    mark_allocated(mem, pfn, order)
    return pfn


cdef inline int64_t rmqueue_pcplist(mem_t *mem, zone_t *zone, int order, int mt, int flags,
                                    int cpu) noexcept nogil:
    """Take a block from a CPU's lists, which take a batch from the free lists if empty; -1."""
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef free_list_t *lst = &pcp.lists[order_to_pindex(mt, order)]
    pcp.free_factor >>= 1
    if lst.count == 0 and not pcp_refill(mem, zone, order, mt, flags, cpu):
        return -1
    pcp.count -= 1 << order
    return <int64_t> pop_head(mem, lst, order)


cdef inline void free_unref_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order,
                                 int cpu) noexcept nogil:
    """Free a block whose state says nothing any more: to a CPU's lists, or past them."""
    cdef int mt = get_pageblock_migratetype(mem, pfn), pindex
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    zone.pgfree += <int64_t> 1 << order
    if order <= 3 and mt < MIGRATE_HIGHATOMIC:
        pindex = 3 * order + mt
        link_page(mem.pages, mem.journal, &pcp.lists[pindex], pfn, False)
        set_state(mem.states, mem.journal, pfn, pcp_state(order, mt))
    elif order == PAGEBLOCK_ORDER and mt < MIGRATE_HIGHATOMIC:
        pindex = order_to_pindex(mt, order)
        add_block(mem, &pcp.lists[pindex], pfn, KIND_PCP, order, mt, False)
    else:
        free_unref_page_rare(mem, zone, pfn, order, mt, cpu)
        return
    pcp.count += 1 << order
    if pcp.count >= pcp.high or (pcp.free_factor and 0 < order <= 3):
        pcp_overflow(mem, zone, order, pindex, cpu)
