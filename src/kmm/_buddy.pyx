"""Free lists: split, coalesce, migratetypes, per-CPU lists (the core of mm/page_alloc.c).

One zone's lists are a :class:`BuddyZone`.  Blocks of order 9 and 10 are linked through the
pageblock records, smaller ones through the page records, so that free memory that was never
split touches no page record.  List ends follow the kernel: onlined and moved blocks go to the
tail, freed and split ones to the head, and a block that is likely to merge soon to the tail.
"""
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kmm._memmap cimport (get_pageblock_migratetype, page_kind, page_mt, page_order, page_zone,
                          section_online, set_pageblock_migratetype, touch_block, touch_page)

cdef extern from *:
    """
    #ifndef KMM_DEBUG
    #define KMM_DEBUG 0
    #endif
    """
    const int KMM_DEBUG


cdef enum:
    EBUSY = 16
    ENOMEM = 12
    EINVAL = 22
    EFAULT = 14
    EEXIST = 17

# Which migratetypes a request may take from, first choice first.
cdef int[3][2] FALLBACKS = [
    [MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE],     # unmovable
    [MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE],   # movable
    [MIGRATE_UNMOVABLE, MIGRATE_MOVABLE],       # reclaimable
]


# -- links ------------------------------------------------------------------------------

cdef inline pfn_t _next(const mem_t *mem, pfn_t pfn, bint big) noexcept nogil:
    if big:
        return <pfn_t> mem.blocks[pfn >> PAGEBLOCK_ORDER].next << PAGEBLOCK_ORDER
    return mem.pages[pfn].next | (<pfn_t> (mem.pages[pfn].flags & PF_NEXT_HI) << 32)


cdef inline pfn_t _prev(const mem_t *mem, pfn_t pfn, bint big) noexcept nogil:
    if big:
        return <pfn_t> mem.blocks[pfn >> PAGEBLOCK_ORDER].prev << PAGEBLOCK_ORDER
    return mem.pages[pfn].prev | (<pfn_t> ((mem.pages[pfn].flags & PF_PREV_HI)
                                           >> PF_PREV_HI_SHIFT) << 32)


cdef inline void _set_next(mem_t *mem, pfn_t pfn, pfn_t to, bint big) noexcept nogil:
    if big:
        touch_block(mem, pfn)
        mem.blocks[pfn >> PAGEBLOCK_ORDER].next = <uint32_t> (to >> PAGEBLOCK_ORDER)
    else:
        touch_page(mem, pfn)
        mem.pages[pfn].next = <uint32_t> to
        mem.pages[pfn].flags = (mem.pages[pfn].flags & ~<uint32_t> PF_NEXT_HI) | <uint32_t> (to >> 32)


cdef inline void _set_prev(mem_t *mem, pfn_t pfn, pfn_t to, bint big) noexcept nogil:
    if big:
        touch_block(mem, pfn)
        mem.blocks[pfn >> PAGEBLOCK_ORDER].prev = <uint32_t> (to >> PAGEBLOCK_ORDER)
    else:
        touch_page(mem, pfn)
        mem.pages[pfn].prev = <uint32_t> to
        mem.pages[pfn].flags = ((mem.pages[pfn].flags & ~<uint32_t> PF_PREV_HI)
                                | (<uint32_t> (to >> 32) << PF_PREV_HI_SHIFT))


cdef void list_add(mem_t *mem, free_list_t *lst, pfn_t pfn, int order, bint tail) noexcept nogil:
    cdef bint big = order >= PAGEBLOCK_ORDER
    if lst.count == 0:
        _set_next(mem, pfn, 0, big)
        _set_prev(mem, pfn, 0, big)
        lst.head = lst.tail = pfn
    elif tail:
        _set_next(mem, pfn, 0, big)
        _set_prev(mem, pfn, lst.tail, big)
        _set_next(mem, lst.tail, pfn, big)
        lst.tail = pfn
    else:
        _set_prev(mem, pfn, 0, big)
        _set_next(mem, pfn, lst.head, big)
        _set_prev(mem, lst.head, pfn, big)
        lst.head = pfn
    lst.count += 1


cdef void list_del(mem_t *mem, free_list_t *lst, pfn_t pfn, int order) noexcept nogil:
    cdef bint big = order >= PAGEBLOCK_ORDER
    cdef pfn_t nxt = _next(mem, pfn, big), prv = _prev(mem, pfn, big)
    # The ends are told by the list, not by the link: 0 is both "no link" and a pfn.
    if pfn == lst.head:
        lst.head = nxt
    else:
        _set_next(mem, prv, nxt, big)
    if pfn == lst.tail:
        lst.tail = prv
    else:
        _set_prev(mem, nxt, prv, big)
    lst.count -= 1


# -- what a record says -----------------------------------------------------------------

cdef inline void set_block_state(mem_t *mem, pfn_t pfn, int order, int kind, int mt) noexcept nogil:
    cdef pageblock_t *block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    cdef page_t *page
    touch_block(mem, pfn)
    if order >= PAGEBLOCK_ORDER:
        block.kind, block.order, block.mt = kind, order, mt
        return
    touch_page(mem, pfn)
    page = &mem.pages[pfn]
    if page_kind(page) == KIND_BUDDY:
        block.nr_heads -= 1
    if kind == KIND_BUDDY:
        block.nr_heads += 1
    block.state |= 0x80
    page.flags = ((page.flags & ~<uint32_t> (PF_KIND | PF_ORDER | PF_MT))
                  | (kind << PF_KIND_SHIFT) | (order << PF_ORDER_SHIFT) | (mt << PF_MT_SHIFT))


cdef inline void clear_block_state(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    cdef pageblock_t *block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    cdef page_t *page
    touch_block(mem, pfn)
    if order >= PAGEBLOCK_ORDER:
        block.kind = block.order = block.mt = 0
        block.next = block.prev = 0
        return
    touch_page(mem, pfn)
    page = &mem.pages[pfn]
    if page_kind(page) == KIND_BUDDY:
        block.nr_heads -= 1
    page.next = page.prev = 0
    page.flags &= ~<uint32_t> (PF_KIND | PF_ORDER | PF_MT | PF_NEXT_HI | PF_PREV_HI)


cdef inline int block_mt(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        return mem.blocks[pfn >> PAGEBLOCK_ORDER].mt
    return page_mt(&mem.pages[pfn])


cdef bint is_free_head(const mem_t *mem, pfn_t pfn, int *order) noexcept nogil:
    cdef const pageblock_t *block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    if block.kind == KIND_BUDDY and (pfn & (PAGEBLOCK_PAGES - 1)) == 0:
        order[0] = block.order
        return True
    if block.nr_heads and page_kind(&mem.pages[pfn]) == KIND_BUDDY:
        order[0] = page_order(&mem.pages[pfn])
        return True
    return False


cdef inline bint is_buddy(const mem_t *mem, pfn_t pfn, int order, int zone) noexcept nogil:
    cdef const pageblock_t *block
    if pfn >= mem.nr_pages:
        return False
    block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    if order >= PAGEBLOCK_ORDER:
        return block.kind == KIND_BUDDY and block.order == order and block.zone == zone + 1
    return (block.nr_heads != 0 and page_kind(&mem.pages[pfn]) == KIND_BUDDY
            and page_order(&mem.pages[pfn]) == order)


# -- free lists -------------------------------------------------------------------------

cdef inline void add_to_free_list(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                                  bint tail) noexcept nogil:
    set_block_state(mem, pfn, order, KIND_BUDDY, mt)
    list_add(mem, &zone.free_area[order][mt], pfn, order, tail)
    zone.nr_free[order] += 1


cdef void del_page_from_free_list(mem_t *mem, zone_t *zone, pfn_t pfn, int order) noexcept nogil:
    list_del(mem, &zone.free_area[order][block_mt(mem, pfn, order)], pfn, order)
    clear_block_state(mem, pfn, order)
    zone.nr_free[order] -= 1


cdef void move_to_free_list(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt) noexcept nogil:
    list_del(mem, &zone.free_area[order][block_mt(mem, pfn, order)], pfn, order)
    set_block_state(mem, pfn, order, KIND_BUDDY, mt)
    list_add(mem, &zone.free_area[order][mt], pfn, order, True)


cdef inline bint _merge_likely(const mem_t *mem, pfn_t pfn, int order, int zone) noexcept nogil:
    cdef pfn_t higher
    if order >= MAX_ORDER - 2:
        return False
    higher = pfn & ((pfn ^ (<pfn_t> 1 << order)))
    return is_buddy(mem, higher ^ (<pfn_t> 1 << (order + 1)), order + 1, zone)


cdef void free_one_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                        int fpi) noexcept nogil:
    cdef pfn_t buddy
    cdef int buddy_mt
    if mt != MIGRATE_ISOLATE:
        zone.nr_free_pages += <int64_t> 1 << order
    while order < MAX_ORDER - 1:
        buddy = pfn ^ (<pfn_t> 1 << order)
        if not is_buddy(mem, buddy, order, zone.index):
            break
        if order >= PAGEBLOCK_ORDER:
            buddy_mt = get_pageblock_migratetype(mem, buddy)
            if buddy_mt != mt and (mt >= MIGRATE_HIGHATOMIC or buddy_mt >= MIGRATE_HIGHATOMIC):
                break
        del_page_from_free_list(mem, zone, buddy, order)
        pfn &= buddy
        order += 1
    add_to_free_list(mem, zone, pfn, order, mt,
                     (fpi & FPI_TO_TAIL) or _merge_likely(mem, pfn, order, zone.index))


cdef void expand(mem_t *mem, zone_t *zone, pfn_t pfn, int low, int high, int mt) noexcept nogil:
    while high > low:
        high -= 1
        add_to_free_list(mem, zone, pfn + (<pfn_t> 1 << high), high, mt, False)


cdef int64_t rmqueue_smallest(mem_t *mem, zone_t *zone, int order, int mt) noexcept nogil:
    cdef int o
    cdef pfn_t pfn
    for o in range(order, MAX_ORDER):
        if zone.free_area[o][mt].count:
            pfn = zone.free_area[o][mt].head
            del_page_from_free_list(mem, zone, pfn, o)
            expand(mem, zone, pfn, order, o, mt)
            return <int64_t> pfn
    return -1


cdef int64_t move_freepages(mem_t *mem, zone_t *zone, pfn_t start, pfn_t end, int mt,
                            int64_t *movable) noexcept nogil:
    """Move the free blocks whose head lies in [start, end) to mt; count movable used pages."""
    cdef pfn_t pfn = start
    cdef int order = 0
    cdef int64_t moved = 0
    cdef const pageblock_t *block
    while pfn < end:
        block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
        if is_free_head(mem, pfn, &order):
            move_to_free_list(mem, zone, pfn, order, mt)
            moved += <int64_t> 1 << order
            pfn += <pfn_t> 1 << order
            continue
        if block.nr_heads == 0 and (movable == NULL or not block.state & 0x80):
            pfn = (pfn | (PAGEBLOCK_PAGES - 1)) + 1
            continue
        if movable != NULL and mem.pages[pfn].flags & (PF_LRU | PF_MOVABLE_OPS):
            movable[0] += 1
        pfn += 1
    return moved


cdef int64_t move_freepages_block(mem_t *mem, zone_t *zone, pfn_t pfn, int mt,
                                  int64_t *movable) noexcept nogil:
    cdef pfn_t start = pfn & ~<pfn_t> (PAGEBLOCK_PAGES - 1), end = start + PAGEBLOCK_PAGES
    if end > zone.zone_start_pfn + zone.spanned_pages:
        return 0
    if start < zone.zone_start_pfn:
        start = pfn
    return move_freepages(mem, zone, start, end, mt, movable)


# -- fallback ---------------------------------------------------------------------------

cdef bint _boost_watermark(zone_t *zone) noexcept nogil:
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


cdef inline bint _can_steal(const mem_t *mem, int order, int mt) noexcept nogil:
    return (order >= PAGEBLOCK_ORDER / 2 or mt == MIGRATE_RECLAIMABLE
            or mt == MIGRATE_UNMOVABLE or mem.grouping_disabled)


cdef int find_suitable_fallback(zone_t *zone, int order, int mt) noexcept nogil:
    cdef int i
    for i in range(2):
        if zone.free_area[order][FALLBACKS[mt][i]].count:
            return FALLBACKS[mt][i]
    return -1


cdef void steal_suitable_fallback(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                                  int flags, bint whole) noexcept nogil:
    cdef int old = get_pageblock_migratetype(mem, pfn)
    cdef int64_t moved, movable = 0, alike
    cdef pfn_t p
    if old >= MIGRATE_HIGHATOMIC:
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    if order >= PAGEBLOCK_ORDER:
        for p in range(pfn, pfn + (<pfn_t> 1 << order), 512):
            set_pageblock_migratetype(mem, p, mt)
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    if _boost_watermark(zone) and flags & ALLOC_KSWAPD:
        zone.boosted = 1
    if not whole:
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    moved = move_freepages_block(mem, zone, pfn, mt, &movable)
    if not moved:
        move_to_free_list(mem, zone, pfn, order, mt)
        return
    if mt == MIGRATE_MOVABLE:
        alike = movable
    else:
        alike = PAGEBLOCK_PAGES - moved - movable if old == MIGRATE_MOVABLE else 0
    if moved + alike >= PAGEBLOCK_PAGES / 2 or mem.grouping_disabled:
        set_pageblock_migratetype(mem, pfn, mt)


cdef bint rmqueue_fallback(mem_t *mem, zone_t *zone, int order, int mt, int flags) noexcept nogil:
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
    if not _can_steal(mem, o, mt) and mt == MIGRATE_MOVABLE and o > order:
        # A movable request that cannot claim a pageblock takes the smallest block there is.
        for o in range(order, MAX_ORDER):
            source = find_suitable_fallback(zone, o, mt)
            if source >= 0:
                break
    steal_suitable_fallback(mem, zone, zone.free_area[o][source].head, o, mt, flags,
                            _can_steal(mem, o, mt))
    return True


cdef int64_t _rmqueue(mem_t *mem, zone_t *zone, int order, int mt, int flags) noexcept nogil:
    cdef int64_t pfn = rmqueue_smallest(mem, zone, order, mt)
    if pfn < 0 and rmqueue_fallback(mem, zone, order, mt, flags):
        pfn = rmqueue_smallest(mem, zone, order, mt)
    return pfn


# -- per-CPU lists ----------------------------------------------------------------------

cdef inline bint pcp_allowed_order(int order) noexcept nogil:
    return order <= 3 or order == PAGEBLOCK_ORDER


cdef inline int order_to_pindex(int mt, int order) noexcept nogil:
    if order == PAGEBLOCK_ORDER:
        return 12 + (mt == MIGRATE_MOVABLE)
    return 3 * order + mt


cdef inline int pindex_to_order(int pindex) noexcept nogil:
    return PAGEBLOCK_ORDER if pindex >= 12 else pindex / 3


cdef void free_pcppages_bulk(mem_t *mem, zone_t *zone, per_cpu_pages_t *pcp, int64_t count,
                             int pindex) noexcept nogil:
    cdef int order, mt
    cdef pfn_t pfn
    cdef free_list_t *lst
    if count > pcp.count:
        count = pcp.count
    pindex -= 1
    while count > 0:
        pindex += 1
        if pindex >= PCP_LISTS:
            pindex = 0
        lst = &pcp.lists[pindex]
        order = pindex_to_order(pindex)
        while lst.count and count > 0:
            pfn = lst.tail
            mt = block_mt(mem, pfn, order)
            list_del(mem, lst, pfn, order)
            clear_block_state(mem, pfn, order)
            count -= <int64_t> 1 << order
            pcp.count -= 1 << order
            if zone.nr_isolate_pageblock:
                mt = get_pageblock_migratetype(mem, pfn)
            free_one_page(mem, zone, pfn, order, mt, FPI_NONE)


cdef void free_unref_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int cpu) noexcept nogil:
    cdef int mt = get_pageblock_migratetype(mem, pfn), pindex
    cdef int64_t high, n
    cdef per_cpu_pages_t *pcp
    cdef bint free_high
    if not pcp_allowed_order(order) or mt == MIGRATE_ISOLATE:
        free_one_page(mem, zone, pfn, order, mt, FPI_NONE)
        return
    pcp = &zone.pcp[cpu]
    pindex = order_to_pindex(MIGRATE_MOVABLE if mt == MIGRATE_HIGHATOMIC else mt, order)
    set_block_state(mem, pfn, order, KIND_PCP, mt)
    list_add(mem, &pcp.lists[pindex], pfn, order, False)
    pcp.count += 1 << order
    free_high = pcp.free_factor != 0 and order > 0 and order <= 3
    high = 0 if pcp.high == 0 or free_high else pcp.high
    if pcp.count < high:
        return
    if free_high:
        n = pcp.count
    elif pcp.high < pcp.batch:
        n = 1
    else:
        n = <int64_t> pcp.batch << pcp.free_factor
        if n < high - pcp.batch and pcp.free_factor < 5:
            pcp.free_factor += 1
        n = max(min(n, high - pcp.batch), pcp.batch)
    free_pcppages_bulk(mem, zone, pcp, n, pindex)


cdef int64_t rmqueue_pcplist(mem_t *mem, zone_t *zone, int order, int mt, int flags,
                             int cpu) noexcept nogil:
    cdef per_cpu_pages_t *pcp = &zone.pcp[cpu]
    cdef free_list_t *lst = &pcp.lists[order_to_pindex(mt, order)]
    cdef int64_t pfn
    cdef int n, i
    pcp.free_factor >>= 1
    if lst.count == 0:
        n = pcp.batch
        if n > 1:
            n = max(n >> order, 2)
        for i in range(n):
            pfn = _rmqueue(mem, zone, order, mt, flags)
            if pfn < 0:
                break
            set_block_state(mem, pfn, order, KIND_PCP, mt)
            list_add(mem, lst, pfn, order, True)
            pcp.count += 1 << order
            zone.nr_free_pages -= <int64_t> 1 << order
        if lst.count == 0:
            return -1
    pfn = lst.head
    list_del(mem, lst, pfn, order)
    clear_block_state(mem, pfn, order)
    pcp.count -= 1 << order
    return pfn


cdef int64_t rmqueue(mem_t *mem, zone_t *zone, int order, int mt, int flags, int cpu) noexcept nogil:
    """Take a block for the caller: per-CPU list, highatomic reserve, free lists."""
    cdef int64_t pfn = -1
    if pcp_allowed_order(order):
        pfn = rmqueue_pcplist(mem, zone, order, mt, flags, cpu)
    if pfn < 0:
        if flags & ALLOC_HIGHATOMIC:
            pfn = rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn < 0:
            pfn = _rmqueue(mem, zone, order, mt, flags)
        if pfn < 0 and flags & (ALLOC_OOM | ALLOC_NON_BLOCK):
            pfn = rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn >= 0:
            zone.nr_free_pages -= <int64_t> 1 << order
    if pfn >= 0:
        set_block_state(mem, pfn, order, KIND_ALLOCATED, mt)
        if order < PAGEBLOCK_ORDER:
            touch_page(mem, pfn)
            mem.pages[pfn].refcount = 1
    return pfn


cdef int claim_allocated(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Check that a block of this order was handed out at pfn, and mark that it is being freed."""
    cdef pageblock_t *block
    cdef page_t *page
    if pfn >= mem.nr_pages or page_zone(mem, pfn) == NULL or not section_online(mem, pfn):
        return -EFAULT
    if pfn & ((<pfn_t> 1 << order) - 1):
        return -EINVAL
    if order >= PAGEBLOCK_ORDER:
        block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
        if block.kind != KIND_ALLOCATED:
            return -EEXIST
        if block.order != order:
            return -EINVAL
        touch_block(mem, pfn)
        block.kind = KIND_NONE
        return 0
    page = &mem.pages[pfn]
    if page_kind(page) != KIND_ALLOCATED:
        return -EEXIST
    if page_order(page) != order:
        return -EINVAL
    touch_page(mem, pfn)
    page.flags &= ~<uint32_t> PF_KIND
    return 0


cdef void unclaim_allocated(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if order >= PAGEBLOCK_ORDER:
        mem.blocks[pfn >> PAGEBLOCK_ORDER].kind = KIND_ALLOCATED
    else:
        mem.pages[pfn].flags |= KIND_ALLOCATED << PF_KIND_SHIFT


cdef void forget_allocated(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    clear_block_state(mem, pfn, order)
    if order < PAGEBLOCK_ORDER:
        mem.pages[pfn].refcount = 0
        mem.pages[pfn].flags &= PF_HWPOISON


cdef int free_pages_prepare(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Check that a block of this order was handed out at pfn, and forget that it was."""
    cdef int rc = claim_allocated(mem, pfn, order)
    if rc == 0:
        forget_allocated(mem, pfn, order)
    return rc


cdef void drain_pages(mem_t *mem, zone_t *zone, int cpu) noexcept nogil:
    if zone.pcp[cpu].count:
        free_pcppages_bulk(mem, zone, &zone.pcp[cpu], zone.pcp[cpu].count, 0)


# -- the Python face --------------------------------------------------------------------

cdef int check_request(const zone_t *zone, int order, int mt, int cpu) except -1:
    if not 0 <= order < MAX_ORDER or not 0 <= mt <= MIGRATE_RECLAIMABLE or not 0 <= cpu < zone.nr_cpus:
        raise ValueError(f"rmqueue: order {order}, migratetype {mt} or CPU {cpu} out of range")
    return 0


cdef class BuddyZone:
    """The counters, free lists and per-CPU lists of one zone (struct zone)."""

    def __cinit__(self, MemMap memmap, int index, int zone_idx, int nr_cpus, *args, **kwargs):
        cdef int cpu
        if not 0 <= index < memmap.mem.nr_zones or nr_cpus < 1:
            raise ValueError(f"BuddyZone: index {index} or nr_cpus {nr_cpus} out of range")
        memset(&self.z, 0, sizeof(zone_t))
        self.memmap = memmap
        self.z.index, self.z.zone_idx, self.z.nr_cpus = index, zone_idx, nr_cpus
        self.z.boost_factor = 15000
        self.z.pcp = <per_cpu_pages_t *> calloc(nr_cpus, sizeof(per_cpu_pages_t))
        if self.z.pcp == NULL:
            raise MemoryError("BuddyZone: per-CPU lists")
        for cpu in range(nr_cpus):
            self.z.pcp[cpu].batch = 1
        memmap.set_zone(index, &self.z)

    def __dealloc__(self):
        if self.memmap is not None:
            self.memmap.set_zone(self.z.index, NULL)
        free(self.z.pcp)

    def save(self):
        """The zone's counters, list ends and per-CPU lists as bytes, for restore()."""
        return ((<char *> &self.z)[:sizeof(zone_t)],
                (<char *> self.z.pcp)[:self.z.nr_cpus * sizeof(per_cpu_pages_t)])

    def restore(self, saved):
        """Put back what save() returned; the records themselves come from the journal."""
        cdef bytes zone = saved[0], pcp = saved[1]
        if (<size_t> len(zone) != sizeof(zone_t)
                or <size_t> len(pcp) != self.z.nr_cpus * sizeof(per_cpu_pages_t)):
            raise ValueError("restore: not what save() returned")
        cdef per_cpu_pages_t *lists = self.z.pcp
        memcpy(&self.z, <char *> zone, sizeof(zone_t))
        self.z.pcp = lists
        memcpy(lists, <char *> pcp, len(pcp))

    # Counters are plain attributes: the chains read and write them as the kernel does.
    @property
    def index(self): return self.z.index
    @property
    def zone_idx(self): return self.z.zone_idx
    @property
    def nr_cpus(self): return self.z.nr_cpus
    @property
    def zone_start_pfn(self): return self.z.zone_start_pfn
    @zone_start_pfn.setter
    def zone_start_pfn(self, uint64_t v): self.z.zone_start_pfn = v
    @property
    def spanned_pages(self): return self.z.spanned_pages
    @spanned_pages.setter
    def spanned_pages(self, uint64_t v): self.z.spanned_pages = v
    @property
    def present_pages(self): return self.z.present_pages
    @present_pages.setter
    def present_pages(self, int64_t v): self.z.present_pages = v
    @property
    def present_early_pages(self): return self.z.present_early_pages
    @present_early_pages.setter
    def present_early_pages(self, int64_t v): self.z.present_early_pages = v
    @property
    def managed_pages(self): return self.z.managed_pages
    @managed_pages.setter
    def managed_pages(self, int64_t v): self.z.managed_pages = v
    @property
    def nr_free_pages(self): return self.z.nr_free_pages
    @nr_free_pages.setter
    def nr_free_pages(self, int64_t v): self.z.nr_free_pages = v
    @property
    def nr_isolate_pageblock(self): return self.z.nr_isolate_pageblock
    @nr_isolate_pageblock.setter
    def nr_isolate_pageblock(self, int64_t v): self.z.nr_isolate_pageblock = v
    @property
    def nr_reserved_highatomic(self): return self.z.nr_reserved_highatomic
    @nr_reserved_highatomic.setter
    def nr_reserved_highatomic(self, int64_t v): self.z.nr_reserved_highatomic = v
    @property
    def watermark_min(self): return self.z.watermark_min
    @watermark_min.setter
    def watermark_min(self, int64_t v): self.z.watermark_min = v
    @property
    def watermark_low(self): return self.z.watermark_low
    @watermark_low.setter
    def watermark_low(self, int64_t v): self.z.watermark_low = v
    @property
    def watermark_high(self): return self.z.watermark_high
    @watermark_high.setter
    def watermark_high(self, int64_t v): self.z.watermark_high = v
    @property
    def watermark_boost(self): return self.z.watermark_boost
    @watermark_boost.setter
    def watermark_boost(self, int64_t v): self.z.watermark_boost = v
    @property
    def boost_factor(self): return self.z.boost_factor
    @boost_factor.setter
    def boost_factor(self, int32_t v): self.z.boost_factor = v
    @property
    def pageset_high(self): return self.z.pageset_high
    @property
    def pageset_batch(self): return self.z.pageset_batch
    @property
    def stat_threshold(self): return self.z.stat_threshold
    @stat_threshold.setter
    def stat_threshold(self, int64_t v): self.z.stat_threshold = v

    @property
    def lowmem_reserve(self):
        """Pages kept from allocations that could use a higher zone, one per zone index."""
        return tuple(self.z.lowmem_reserve[i] for i in range(NR_ZONES))

    @lowmem_reserve.setter
    def lowmem_reserve(self, values):
        for i in range(NR_ZONES):
            self.z.lowmem_reserve[i] = values[i]

    def nr_free(self):
        """Free blocks per order, as buddyinfo shows them (isolated ones included)."""
        return [self.z.nr_free[o] for o in range(MAX_ORDER)]

    def free_counts(self):
        """Blocks on each list: a list per migratetype of counts per order."""
        return [[self.z.free_area[o][mt].count for o in range(MAX_ORDER)]
                for mt in range(MIGRATE_TYPES)]

    def free_list(self, int order, int mt):
        """The pfns on one free list, head first."""
        return self._walk(&self.z.free_area[order][mt], order)

    def pcp_list(self, int cpu, int pindex):
        """The pfns on one per-CPU list, head first."""
        return self._walk(&self.z.pcp[cpu].lists[pindex], pindex_to_order(pindex))

    cdef list _walk(self, free_list_t *lst, int order):
        cdef pfn_t pfn = lst.head
        cdef uint64_t i
        cdef list out = []
        for i in range(lst.count):
            out.append(pfn)
            pfn = _next(&self.memmap.mem, pfn, order >= PAGEBLOCK_ORDER)
        return out

    def pcp_state(self, int cpu):
        """(count, high, batch, free_factor) of one CPU's lists; pages, pages, pages, steps."""
        cdef per_cpu_pages_t *pcp = &self.z.pcp[cpu]
        return pcp.count, pcp.high, pcp.batch, pcp.free_factor

    def pcp_pages(self):
        """Pages on all per-CPU lists."""
        cdef int cpu
        cdef int64_t n = 0
        for cpu in range(self.z.nr_cpus):
            n += self.z.pcp[cpu].count
        return n

    def init_free_lists(self):
        """Empty every free list (init_currently_empty_zone)."""
        memset(self.z.free_area, 0, sizeof(self.z.free_area))
        memset(self.z.nr_free, 0, sizeof(self.z.nr_free))

    def pageset_update(self, int high, int batch, bint remember):
        """Set high and batch (pages) on every CPU; remember them as the zone's own."""
        cdef int cpu
        if remember:
            self.z.pageset_high, self.z.pageset_batch = high, batch
        for cpu in range(self.z.nr_cpus):
            self.z.pcp[cpu].high, self.z.pcp[cpu].batch = high, batch

    def pageset_reset(self):
        """Fall back to the boot pageset: high 0, batch 1, nothing cached."""
        cdef int cpu
        for cpu in range(self.z.nr_cpus):
            memset(&self.z.pcp[cpu], 0, sizeof(per_cpu_pages_t))
            self.z.pcp[cpu].batch = 1

    def drain(self, int cpu=-1):
        """Give the pages of one CPU's lists, or of all (-1), back to the free lists."""
        cdef int c
        with nogil:
            for c in range(self.z.nr_cpus):
                if cpu < 0 or c == cpu:
                    drain_pages(&self.memmap.mem, &self.z, c)

    def rmqueue(self, int order, int mt, int flags=0, int cpu=0):
        """Take one block of 2^order pages; return its pfn or -ENOMEM."""
        cdef int64_t pfn
        check_request(&self.z, order, mt, cpu)
        with nogil:
            pfn = rmqueue(&self.memmap.mem, &self.z, order, mt, flags, cpu)
        return pfn if pfn >= 0 else -ENOMEM

    def rmqueue_bulk(self, int order, int mt, int flags, int cpu, uint64_t[::1] out):
        """Fill out with pfns of blocks of 2^order pages; return how many there were."""
        cdef Py_ssize_t i = 0, n = out.shape[0]
        cdef int64_t pfn
        check_request(&self.z, order, mt, cpu)
        with nogil:
            while i < n:
                pfn = rmqueue(&self.memmap.mem, &self.z, order, mt, flags, cpu)
                if pfn < 0:
                    break
                out[i] = <uint64_t> pfn
                i += 1
        return i

    def free_range_core(self, pfn_t start, pfn_t nr, int mt, int fpi):
        """Free the pages of a range in the largest aligned blocks (__free_pages_core).

        :param start: first pfn; nr: pages; mt: the list they go to; fpi: FPI_* flags.
        :return: the number of blocks freed.
        """
        cdef pfn_t pfn = start, end = start + nr
        cdef int order
        cdef uint64_t chunks = 0
        with nogil:
            while pfn < end:
                order = MAX_ORDER - 1
                while order and (pfn & ((<pfn_t> 1 << order) - 1) or pfn + (<pfn_t> 1 << order) > end):
                    order -= 1
                free_one_page(&self.memmap.mem, &self.z, pfn, order, mt, fpi)
                pfn += <pfn_t> 1 << order
                chunks += 1
        return chunks

    def add_free_block(self, pfn_t pfn, int order, int mt):
        """Put a block on a free list as it is, without merging (rebuilding a recorded state)."""
        add_to_free_list(&self.memmap.mem, &self.z, pfn, order, mt, True)
        if mt != MIGRATE_ISOLATE:
            self.z.nr_free_pages += <int64_t> 1 << order

    def offline_isolated_pages(self, pfn_t start, pfn_t end):
        """Take the free blocks of an isolated range off the lists (__offline_isolated_pages).

        :return: pages taken, or -EBUSY at the first page that is not free.
        """
        cdef pfn_t pfn = start
        cdef int order = 0
        with nogil:
            while pfn < end:
                if not is_free_head(&self.memmap.mem, pfn, &order):
                    if self.memmap.mem.pages[pfn].flags & PF_HWPOISON:
                        pfn += 1
                        continue
                    break
                del_page_from_free_list(&self.memmap.mem, &self.z, pfn, order)
                pfn += <pfn_t> 1 << order
            if KMM_DEBUG and pfn >= end:
                junk_fill(&self.memmap.mem, start, end)
        return pfn - start if pfn >= end else -EBUSY

    def recount(self):
        """Count the free blocks of the span by walking its records, not its lists.

        :return: a list per migratetype of counts per order, and the pages on per-CPU lists.
        """
        cdef pfn_t pfn = self.z.zone_start_pfn, end = pfn + self.z.spanned_pages, step
        cdef int order = 0, mt, o
        cdef int64_t counts[MIGRATE_TYPES][MAX_ORDER]
        cdef int64_t pcp = 0
        cdef mem_t *mem = &self.memmap.mem
        memset(counts, 0, sizeof(counts))
        with nogil:
            while pfn < end:
                step = _recount_step(mem, &self.z, pfn, &order, counts, &pcp)
                pfn += step
        return [[counts[mt][o] for o in range(MAX_ORDER)] for mt in range(MIGRATE_TYPES)], pcp


cdef pfn_t _recount_step(mem_t *mem, zone_t *zone, pfn_t pfn, int *order,
                         int64_t counts[MIGRATE_TYPES][MAX_ORDER], int64_t *pcp) noexcept nogil:
    cdef const pageblock_t *block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    cdef pfn_t left = PAGEBLOCK_PAGES - (pfn & (PAGEBLOCK_PAGES - 1))
    if block.zone != zone.index + 1 or not section_online(mem, pfn):
        return left
    if is_free_head(mem, pfn, order):
        counts[block_mt(mem, pfn, order[0])][order[0]] += 1
        return <pfn_t> 1 << order[0]
    if block.kind == KIND_PCP and left == PAGEBLOCK_PAGES:
        pcp[0] += PAGEBLOCK_PAGES
        return left
    if not block.state & 0x80:
        return left
    if page_kind(&mem.pages[pfn]) == KIND_PCP:
        pcp[0] += 1 << page_order(&mem.pages[pfn])
        return <pfn_t> 1 << page_order(&mem.pages[pfn])
    return 1


cdef void junk_fill(mem_t *mem, pfn_t start, pfn_t end) noexcept nogil:
    # Nobody may look at the records of an offline range; in a debug build they are nonsense.
    memset(&mem.pages[start], 0xFF, (end - start) * sizeof(page_t))
    memset(&mem.blocks[start >> PAGEBLOCK_ORDER], 0xFF,
           ((end - start) >> PAGEBLOCK_ORDER) * sizeof(pageblock_t))


def free_pages(MemMap memmap, pfn_t pfn, int order, int cpu=0):
    """Free one block of 2^order pages; 0, or -EFAULT (no such page), -EINVAL (wrong order or
    alignment), -EEXIST (not allocated: freed twice, or part of a larger block)."""
    cdef int rc
    with nogil:
        rc = free_pages_prepare(&memmap.mem, pfn, order)
        if rc == 0:
            free_unref_page(&memmap.mem, page_zone(&memmap.mem, pfn), pfn, order, cpu)
    return rc


def free_pages_bulk(MemMap memmap, const uint64_t[::1] pfns, int order, int cpu=0):
    """Free many blocks of 2^order pages.

    Checks all of them before it frees the first, so a refused call changes nothing.

    :return: (0, n), or the errno and the index of the block that cannot be freed.
    """
    cdef Py_ssize_t i, n = pfns.shape[0], done = 0
    cdef int rc = 0
    cdef mem_t *mem = &memmap.mem
    with nogil:
        while done < n:
            rc = claim_allocated(mem, pfns[done], order)
            if rc:
                break
            done += 1
        for i in range(done):
            if rc:
                unclaim_allocated(mem, pfns[i], order)
            else:
                forget_allocated(mem, pfns[i], order)
                free_unref_page(mem, page_zone(mem, pfns[i]), pfns[i], order, cpu)
    return rc, done


def take_page_off_buddy(MemMap memmap, pfn_t pfn):
    """Take one page out of the free block that holds it and poison it; 0, or -EBUSY."""
    cdef mem_t *mem = &memmap.mem
    cdef zone_t *zone = page_zone(mem, pfn)
    cdef int order = 0, o, mt
    cdef pfn_t head, half
    if zone == NULL or not section_online(mem, pfn):
        return -EBUSY
    for o in range(MAX_ORDER):
        head = pfn & ~((<pfn_t> 1 << o) - 1)
        if is_free_head(mem, head, &order) and order >= o:
            break
    else:
        return -EBUSY
    mt = get_pageblock_migratetype(mem, pfn)
    del_page_from_free_list(mem, zone, head, order)
    while order:
        order -= 1
        half = <pfn_t> 1 << order
        if pfn >= head + half:
            add_to_free_list(mem, zone, head, order, mt, False)
            head += half
        else:
            add_to_free_list(mem, zone, head + half, order, mt, False)
    if mt != MIGRATE_ISOLATE:
        zone.nr_free_pages -= 1
    mem.blocks[pfn >> PAGEBLOCK_ORDER].state |= 0x80
    mem.pages[pfn].flags |= PF_HWPOISON
    return 0
