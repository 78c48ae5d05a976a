# Free lists: links, split and coalesce.  Everything here is inlined into the modules that use
# it, because a call through a module boundary costs as much as what it does.
#
# Blocks of order 9 and 10 are linked through the pageblock records, smaller ones through the
# page records, so that free memory that was never split touches no page record.
from kmm._memmap cimport (get_pageblock_migratetype, is_free_state, journal_add, state_mt,
                          touch_block)
from kmm._types cimport *

cdef extern from *:
    """
    #define kmm_ctz(x) __builtin_ctz(x)
    #define kmm_prefetch(p) __builtin_prefetch((const void *)(p), 1)
    #ifndef KMM_DEBUG
    #define KMM_DEBUG 0
    #endif
    """
    int ctz "kmm_ctz"(uint32_t x) noexcept nogil
    void prefetch "kmm_prefetch"(const void *p) noexcept nogil
    const int KMM_DEBUG


# -- page records and states -----------------------------------------------------------------
#
# The hot functions take the arrays and the journal, not the mem_t: after a write of a byte the
# compiler would have to read a mem_t anew.

cdef inline pfn_t page_next(const page_t *page) noexcept nogil:
    return page.next | <pfn_t> page.next_hi << 32


cdef inline pfn_t page_prev(const page_t *page) noexcept nogil:
    return page.prev | <pfn_t> page.prev_hi << 32


cdef inline void set_page_next(page_t *pages, journal_t *journal, pfn_t pfn,
                               pfn_t to) noexcept nogil:
    if journal != NULL:
        journal_add(journal, &pages[pfn], sizeof(page_t))
    pages[pfn].next = <uint32_t> to
    pages[pfn].next_hi = <uint8_t> (to >> 32)


cdef inline void set_page_prev(page_t *pages, journal_t *journal, pfn_t pfn,
                               pfn_t to) noexcept nogil:
    if journal != NULL:
        journal_add(journal, &pages[pfn], sizeof(page_t))
    pages[pfn].prev = <uint32_t> to
    pages[pfn].prev_hi = <uint8_t> (to >> 32)


cdef inline void set_state(uint8_t *states, journal_t *journal, pfn_t pfn,
                           int state) noexcept nogil:
    if journal != NULL:
        journal_add(journal, &states[pfn], 1)
    states[pfn] = <uint8_t> state


cdef inline int buddy_state(int order, int mt) noexcept nogil:
    return STATE_BUDDY | order | mt << 4


cdef inline int pcp_state(int order, int mt) noexcept nogil:
    return STATE_PCP | order | mt << 2


# -- lists of blocks below order 9 ----------------------------------------------------------

cdef inline void link_page(page_t *pages, journal_t *journal, free_list_t *lst, pfn_t pfn,
                           bint tail) noexcept nogil:
    cdef pfn_t end
    if lst.count == 0:
        lst.head = lst.tail = pfn
    elif tail:
        end = lst.tail
        set_page_prev(pages, journal, pfn, end)
        set_page_next(pages, journal, end, pfn)
        lst.tail = pfn
    else:
        end = lst.head
        set_page_next(pages, journal, pfn, end)
        set_page_prev(pages, journal, end, pfn)
        lst.head = pfn
    lst.count += 1


cdef inline void unlink_page(page_t *pages, journal_t *journal, free_list_t *lst,
                             pfn_t pfn) noexcept nogil:
    cdef pfn_t nxt, prv
    # The list tells its ends, links do not: what the head says of its forerunner and the tail of
    # its follower is stale, which saves touching one more record.
    lst.count -= 1
    if pfn == lst.head:
        lst.head = page_next(&pages[pfn])
        prefetch(&pages[lst.head])
        return
    prv = page_prev(&pages[pfn])
    if pfn == lst.tail:
        lst.tail = prv
        return
    nxt = page_next(&pages[pfn])
    set_page_next(pages, journal, prv, nxt)
    set_page_prev(pages, journal, nxt, prv)


# -- lists of pageblocks ----------------------------------------------------------------------

cdef inline pageblock_t *block_of(const mem_t *mem, pfn_t pfn) noexcept nogil:
    return &mem.blocks[pfn >> PAGEBLOCK_ORDER]


cdef inline void add_block(mem_t *mem, free_list_t *lst, pfn_t pfn, int kind, int order, int mt,
                           bint tail) noexcept nogil:
    cdef uint32_t me = <uint32_t> (pfn >> PAGEBLOCK_ORDER)
    cdef pageblock_t *block = &mem.blocks[me]
    touch_block(mem, pfn)
    block.kind, block.order, block.mt = kind, order, mt
    block.next = block.prev = 0
    if lst.count == 0:
        lst.head = lst.tail = pfn
    elif tail:
        block.prev = <uint32_t> (lst.tail >> PAGEBLOCK_ORDER)
        touch_block(mem, lst.tail)
        block_of(mem, lst.tail).next = me
        lst.tail = pfn
    else:
        block.next = <uint32_t> (lst.head >> PAGEBLOCK_ORDER)
        touch_block(mem, lst.head)
        block_of(mem, lst.head).prev = me
        lst.head = pfn
    lst.count += 1


cdef inline void unlink_block(mem_t *mem, free_list_t *lst, pfn_t pfn) noexcept nogil:
    cdef const pageblock_t *block = block_of(mem, pfn)
    cdef pfn_t nxt = <pfn_t> block.next << PAGEBLOCK_ORDER
    cdef pfn_t prv = <pfn_t> block.prev << PAGEBLOCK_ORDER
    lst.count -= 1
    if pfn == lst.head:
        lst.head = nxt
    elif pfn == lst.tail:
        lst.tail = prv
    else:
        touch_block(mem, prv)
        block_of(mem, prv).next = <uint32_t> (nxt >> PAGEBLOCK_ORDER)
        touch_block(mem, nxt)
        block_of(mem, nxt).prev = <uint32_t> (prv >> PAGEBLOCK_ORDER)


cdef inline void clear_block_record(mem_t *mem, pfn_t pfn) noexcept nogil:
    cdef pageblock_t *block = block_of(mem, pfn)
    touch_block(mem, pfn)
    block.kind = block.order = block.mt = 0
    block.next = block.prev = 0
    block.flags = 0


cdef inline void list_add_pcp(mem_t *mem, free_list_t *lst, pfn_t pfn, int order, int mt,
                              bint tail) noexcept nogil:
    """Put a block on a CPU's list; its state or record says so."""
    if order >= PAGEBLOCK_ORDER:
        add_block(mem, lst, pfn, KIND_PCP, order, mt, tail)
    else:
        link_page(mem.pages, mem.journal, lst, pfn, tail)
        set_state(mem.states, mem.journal, pfn, pcp_state(order, mt))


cdef inline void list_del(mem_t *mem, free_list_t *lst, pfn_t pfn, int order) noexcept nogil:
    """Take a block off its list; nothing starts there afterwards."""
    if order >= PAGEBLOCK_ORDER:
        unlink_block(mem, lst, pfn)
        clear_block_record(mem, pfn)
    else:
        unlink_page(mem.pages, mem.journal, lst, pfn)
        set_state(mem.states, mem.journal, pfn, STATE_NONE)


cdef inline pfn_t list_next(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        return <pfn_t> block_of(mem, pfn).next << PAGEBLOCK_ORDER
    return page_next(&mem.pages[pfn])


# -- what a record says -----------------------------------------------------------------------

cdef inline int block_mt(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        return block_of(mem, pfn).mt
    return state_mt(mem.states[pfn])


cdef inline bint is_free_head(const mem_t *mem, pfn_t pfn, int *order) noexcept nogil:
    cdef const pageblock_t *block = block_of(mem, pfn)
    if block.kind == KIND_BUDDY and (pfn & (PAGEBLOCK_PAGES - 1)) == 0:
        order[0] = block.order
        return True
    if block.state & BLOCK_DIRTY and mem.states[pfn] & STATE_BUDDY:
        order[0] = mem.states[pfn] & STATE_ORDER
        return True
    return False


cdef inline bint is_free_block(const mem_t *mem, pfn_t pfn, int order, int zone) noexcept nogil:
    """Whether a free block of order 9 or 10 of a zone starts at pfn (a pageblock's start)."""
    cdef const pageblock_t *block = block_of(mem, pfn)
    return (pfn < mem.nr_pages and block.kind == KIND_BUDDY and block.order == order
            and block.zone == zone + 1)


# -- a zone's free lists ------------------------------------------------------------------------

cdef inline int64_t dirty_blocks(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """How many of the pageblocks of a block of order 9 or 10 the host keeps records of."""
    cdef const pageblock_t *block = block_of(mem, pfn)
    cdef int64_t n = block[0].state >> 7
    if order > PAGEBLOCK_ORDER:
        n += block[1].state >> 7
    return n


cdef inline void add_to_free_list(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                                  bint tail) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        add_block(mem, &zone.free_area[mt][order], pfn, KIND_BUDDY, order, mt, tail)
        zone.nr_dirty_free += dirty_blocks(mem, pfn, order)
    else:
        link_page(mem.pages, mem.journal, &zone.free_area[mt][order], pfn, tail)
        set_state(mem.states, mem.journal, pfn, buddy_state(order, mt))
    zone.free_mask[mt] |= <uint32_t> 1 << order


cdef inline void del_page_from_free_list(mem_t *mem, zone_t *zone, pfn_t pfn,
                                         int order) noexcept nogil:
    cdef int mt = block_mt(mem, pfn, order)
    cdef free_list_t *lst = &zone.free_area[mt][order]
    list_del(mem, lst, pfn, order)
    if order >= PAGEBLOCK_ORDER:
        zone.nr_dirty_free -= dirty_blocks(mem, pfn, order)
    if lst.count == 0:
        zone.free_mask[mt] &= ~(<uint32_t> 1 << order)


cdef inline void move_to_free_list(mem_t *mem, zone_t *zone, pfn_t pfn, int order,
                                   int mt) noexcept nogil:
    del_page_from_free_list(mem, zone, pfn, order)
    add_to_free_list(mem, zone, pfn, order, mt, True)


cdef inline bint merge_likely(const mem_t *mem, pfn_t pfn, int order, int zone) noexcept nogil:
    """Whether the block and its buddy, once both are free, would merge on at the next order."""
    cdef pfn_t pair
    if order >= PAGEBLOCK_ORDER:
        return False
    pair = (pfn & ~(<pfn_t> 1 << order)) ^ (<pfn_t> 2 << order)
    if order == PAGEBLOCK_ORDER - 1:
        return is_free_block(mem, pair, PAGEBLOCK_ORDER, zone)
    return is_free_state(mem.states[pair], order + 1)


cdef inline pfn_t merge_pages(page_t *pages, uint8_t *states, journal_t *journal, zone_t *zone,
                              pfn_t pfn, int *order) noexcept nogil:
    """Take the free buddies of a block below order 9 off their lists; the merged block's pfn."""
    cdef pfn_t buddy
    cdef int o = order[0], mt
    cdef free_list_t *lst
    while o < PAGEBLOCK_ORDER:
        buddy = pfn ^ (<pfn_t> 1 << o)
        if not is_free_state(states[buddy], o):
            break
        mt = state_mt(states[buddy])
        lst = &zone.free_area[mt][o]
        unlink_page(pages, journal, lst, buddy)
        set_state(states, journal, buddy, STATE_NONE)
        if lst.count == 0:
            zone.free_mask[mt] &= ~(<uint32_t> 1 << o)
        pfn &= buddy
        o += 1
    order[0] = o
    return pfn


cdef inline pfn_t merge_pageblocks(mem_t *mem, zone_t *zone, pfn_t pfn, int *order,
                                   int mt) noexcept nogil:
    """Take the free buddy of a block of order 9 off its list, unless their types keep apart."""
    cdef pfn_t buddy = pfn ^ PAGEBLOCK_PAGES
    cdef int buddy_mt
    if not is_free_block(mem, buddy, PAGEBLOCK_ORDER, zone.index):
        return pfn
    buddy_mt = get_pageblock_migratetype(mem, buddy)
    if buddy_mt != mt and (mt >= MIGRATE_HIGHATOMIC or buddy_mt >= MIGRATE_HIGHATOMIC):
        return pfn
    del_page_from_free_list(mem, zone, buddy, PAGEBLOCK_ORDER)
    order[0] = PAGEBLOCK_ORDER + 1
    return pfn & buddy


cdef inline void free_one_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                               int fpi) noexcept nogil:
    """Put a block on the free lists, merged with its buddies (__free_one_page)."""
    if mt != MIGRATE_ISOLATE:
        zone.nr_free_pages += <int64_t> 1 << order
    if order < PAGEBLOCK_ORDER and block_of(mem, pfn).state & BLOCK_DIRTY:
        pfn = merge_pages(mem.pages, mem.states, mem.journal, zone, pfn, &order)
    if order == PAGEBLOCK_ORDER:
        pfn = merge_pageblocks(mem, zone, pfn, &order, mt)
    if order < PAGEBLOCK_ORDER:
        mark_dirty(mem, pfn)
    add_to_free_list(mem, zone, pfn, order, mt,
                     (fpi & FPI_TO_TAIL) or merge_likely(mem, pfn, order, zone.index))


cdef inline void mark_dirty(mem_t *mem, pfn_t pfn) noexcept nogil:
    """Remember that page records of a pageblock are about to be written."""
    if not block_of(mem, pfn).state & BLOCK_DIRTY:
        touch_block(mem, pfn)
        block_of(mem, pfn).state |= BLOCK_DIRTY


cdef inline void expand(mem_t *mem, zone_t *zone, pfn_t pfn, int low, int high,
                        int mt) noexcept nogil:
    """Put back the upper halves of a block of order high of which order low is taken."""
    if high >= PAGEBLOCK_ORDER and low < PAGEBLOCK_ORDER:
        mark_dirty(mem, pfn)
    while high > low:
        high -= 1
        add_to_free_list(mem, zone, pfn + (<pfn_t> 1 << high), high, mt, False)


cdef inline int64_t rmqueue_smallest(mem_t *mem, zone_t *zone, int order,
                                     int mt) noexcept nogil:
    """Take a block off the lists of one type, split as needed; -1 if there is none."""
    cdef uint32_t mask = zone.free_mask[mt] >> order
    cdef int o
    cdef pfn_t pfn
    if mask == 0:
        return -1
    o = order + ctz(mask)
    pfn = zone.free_area[mt][o].head
    del_page_from_free_list(mem, zone, pfn, o)
    expand(mem, zone, pfn, order, o, mt)
    return <int64_t> pfn


cdef inline int64_t move_freepages(mem_t *mem, zone_t *zone, pfn_t start, pfn_t end, int mt,
                                   int64_t *movable) noexcept nogil:
    """Move the free blocks whose head lies in [start, end) to mt; count movable used pages."""
    cdef pfn_t pfn = start
    cdef int order = 0
    cdef int64_t moved = 0
    while pfn < end:
        if is_free_head(mem, pfn, &order):
            move_to_free_list(mem, zone, pfn, order, mt)
            moved += <int64_t> 1 << order
            pfn += <pfn_t> 1 << order
            continue
        if not block_of(mem, pfn).state & BLOCK_DIRTY:
            pfn = (pfn | (PAGEBLOCK_PAGES - 1)) + 1
            continue
        if movable != NULL and mem.pages[pfn].flags & (PF_LRU | PF_MOVABLE_OPS):
            movable[0] += 1
        pfn += 1
    return moved


# -- what the caller holds ------------------------------------------------------------------------

cdef inline void mark_allocated(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        touch_block(mem, pfn)
        block_of(mem, pfn).kind, block_of(mem, pfn).order = KIND_ALLOCATED, order
    else:
        set_state(mem.states, mem.journal, pfn, STATE_ALLOCATED | order)


cdef inline void mark_page_allocated(mem_t *mem, pfn_t pfn) noexcept nogil:
    """Make a page somebody's that was part of a larger block and may bear marks."""
    cdef int marked = STATE_MARKED if mem.pages[pfn].flags else 0
    set_state(mem.states, mem.journal, pfn, STATE_ALLOCATED | marked)
