"""Taking pages back: what may be freed, and where it goes (mm/page_alloc.c)."""
from kmm._freelist cimport (block_of, clear_block_record, mark_allocated, mark_dirty,
                            mark_page_allocated, pcp_state, prefetch, set_page_next,
                            set_page_prev, set_state)
from kmm._memmap cimport get_pageblock_migratetype, journal_add, page_zone, section_online
from kmm._pcp cimport free_unref_page, free_unref_pages, pcp_overflow

cdef enum:
    EBUSY = 16
    EFAULT = 14
    EINVAL = 22
    EEXIST = 17
    GROUP = 64                      # states that a bulk call fetches ahead


cdef int why_not_allocated(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if pfn >= mem.nr_pages or not section_online(mem, pfn) or page_zone(mem, pfn) == NULL:
        return -EFAULT
    if pfn & ((<pfn_t> 1 << order) - 1):
        return -EINVAL
    if order >= PAGEBLOCK_ORDER:
        if block_of(mem, pfn).kind != KIND_ALLOCATED:
            return -EEXIST
        return -EBUSY if block_of(mem, pfn).flags & (PF_USER | PF_PINNED) else -EINVAL
    if not is_allocated_state(mem.states[pfn]):
        return -EEXIST
    return -EBUSY if mem.pages[pfn].flags & (PF_USER | PF_PINNED) else -EINVAL


cdef inline bint is_allocated_state(uint8_t state) noexcept nogil:
    return state & ~(STATE_MARKED | STATE_ORDER) == STATE_ALLOCATED


cdef inline bint is_allocated(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Whether a block of this order was handed out at pfn, and no user or pin holds it."""
    if pfn >= mem.nr_pages:
        return False
    if order >= PAGEBLOCK_ORDER:
        return (block_of(mem, pfn).kind == KIND_ALLOCATED and block_of(mem, pfn).order == order
                and (pfn & (PAGEBLOCK_PAGES - 1)) == 0
                and not block_of(mem, pfn).flags & (PF_USER | PF_PINNED))
    if mem.states[pfn] == STATE_ALLOCATED | order:
        return True
    # Poisoned pages keep their state when they go offline.
    return (mem.states[pfn] == STATE_ALLOCATED | STATE_MARKED | order
            and not mem.pages[pfn].flags & (PF_USER | PF_PINNED) and section_online(mem, pfn))


cdef inline bint free_to_pcp(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    """Free what has been handed out and has no mark to a CPU's list that has pages; whether so."""
    cdef page_t *pages = mem.pages
    cdef zone_t *zone
    cdef per_cpu_pages_t *pcp
    cdef free_list_t *lst
    cdef pfn_t head
    cdef int mt
    if (pfn >= mem.nr_pages or mem.journal != NULL
            or mem.states[pfn] != STATE_ALLOCATED | order):
        return False
    mt = get_pageblock_migratetype(mem, pfn)
    zone = page_zone(mem, pfn)
    pcp = &zone.pcp[cpu]
    lst = &pcp.lists[3 * order + mt]
    if mt >= MIGRATE_HIGHATOMIC or lst.count == 0:
        return False
    head = lst.head
    mem.states[pfn] = <uint8_t> pcp_state(order, mt)
    set_page_next(pages, NULL, pfn, head)
    set_page_prev(pages, NULL, head, pfn)
    lst.head = pfn
    lst.count += 1
    pcp.frees[order] += 1
    pcp.count += 1 << order
    if pcp.count >= pcp.high or (order and pcp.free_factor):
        pcp_overflow(mem, zone, order, 3 * order + mt, cpu)
    return True


cdef int free_pages(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    if order == 0:
        if free_to_pcp(mem, pfn, 0, cpu):
            return 0
    elif order <= 3 and free_to_pcp(mem, pfn, order, cpu):
        return 0
    return free_pages_any(mem, pfn, order, cpu)


cdef int free_pages_any(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    if not is_allocated(mem, pfn, order):
        return why_not_allocated(mem, pfn, order)
    let_go(mem, pfn, order)
    free_let_go(mem, pfn, order, cpu)
    return 0


cdef inline void let_go(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Take the mark of an allocation off a block, so that it cannot be freed twice."""
    if order >= PAGEBLOCK_ORDER:
        clear_block_record(mem, pfn)
    else:
        set_state(mem.states, mem.journal, pfn, STATE_NONE)


cdef void free_let_go(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    # A poisoned page that is freed by itself is kept out of everybody's hands.
    if order == 0 and mem.pages[pfn].flags & PF_HWPOISON:
        if mem.journal != NULL:
            journal_add(mem.journal, &mem.pages[pfn], sizeof(page_t))
        mem.pages[pfn].flags |= PF_TAKEN
        return
    free_unref_page(mem, page_zone(mem, pfn), pfn, order, cpu)


cdef int64_t claim_plain(uint8_t *states, uint64_t nr_pages, const uint64_t *pfns, int64_t n,
                         int order) noexcept nogil:
    """Let go of blocks below order 9 that are handed out and have no mark; how many.

    Stops at the first block that is something else.
    """
    cdef int64_t i = 0
    cdef pfn_t pfn
    while i < n:
        if i + GROUP < n:
            prefetch(&states[pfns[i + GROUP]])
        pfn = pfns[i]
        if pfn >= nr_pages or states[pfn] != STATE_ALLOCATED | order:
            break
        states[pfn] = STATE_NONE
        i += 1
    return i


cdef void take_back(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Undo let_go."""
    mark_allocated(mem, pfn, order)
    if order < PAGEBLOCK_ORDER and mem.pages[pfn].flags:
        set_state(mem.states, mem.journal, pfn, STATE_ALLOCATED | STATE_MARKED | order)


cdef int free_pages_bulk(mem_t *mem, const uint64_t *pfns, int64_t n, int order, int cpu,
                         int64_t *failed) noexcept nogil:
    cdef int64_t plain = 0, i
    cdef int rc
    if order < PAGEBLOCK_ORDER and mem.journal == NULL:
        plain = claim_plain(mem.states, mem.nr_pages, pfns, n, order)
    for i in range(plain, n):
        if is_allocated(mem, pfns[i], order):
            let_go(mem, pfns[i], order)
            continue
        rc = why_not_allocated(mem, pfns[i], order)
        failed[0] = i
        while i:
            i -= 1
            take_back(mem, pfns[i], order)
        return rc
    if plain == n or order:
        if n:
            free_unref_pages(mem, pfns, n, order, cpu)
    else:
        for i in range(n):
            free_let_go(mem, pfns[i], order, cpu)
    return 0


cdef int split_page(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    cdef pfn_t p
    if not is_allocated(mem, pfn, order):
        return why_not_allocated(mem, pfn, order)
    if order >= PAGEBLOCK_ORDER:
        clear_block_record(mem, pfn)
        for p in range(pfn, pfn + (<pfn_t> 1 << order), 512):
            mark_dirty(mem, p)
    for p in range(pfn, pfn + (<pfn_t> 1 << order)):
        mark_page_allocated(mem, p)
    return 0
