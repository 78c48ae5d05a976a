from kmm._types cimport *


cdef class MemMap:
    cdef mem_t mem
    cdef journal_t journal
    cdef zone_t **zonerefs
    cdef object user_objects        # by number: those with pages are kept
    cdef object pages_buffer, states_buffer, blocks_buffer, sections_buffer, tokens_buffer
    cdef void fill_zonelist(self, zonelist_t *zonelist, indices)
    cdef void set_zone(self, int index, zone_t *zone) noexcept


cdef void journal_add(journal_t *journal, void *where, uint64_t size) noexcept nogil


cdef inline void touch_block(mem_t *mem, pfn_t pfn) noexcept nogil:
    if mem.journal != NULL:
        journal_add(mem.journal, &mem.blocks[pfn >> PAGEBLOCK_ORDER], sizeof(pageblock_t))


cdef inline bint is_free_state(uint8_t state, int order) noexcept nogil:
    """Whether a free block of an order below 9 starts where this is the state."""
    return (state & (STATE_BUDDY | STATE_ORDER)) == (STATE_BUDDY | order)


cdef inline int state_order(uint8_t state) noexcept nogil:
    """The order of the block that starts where this is the state."""
    if state & STATE_PCP and not state & STATE_BUDDY:
        return state & 3
    return state & STATE_ORDER


cdef inline int state_mt(uint8_t state) noexcept nogil:
    """The type of the list that a free block is on, zone's or CPU's."""
    return state >> 4 & 7 if state & STATE_BUDDY else state >> 2 & 3


cdef inline int get_pageblock_migratetype(const mem_t *mem, pfn_t pfn) noexcept nogil:
    cdef uint64_t bit = ((pfn & (SECTION_PAGES - 1)) >> PAGEBLOCK_ORDER) * 4
    return (mem.sections[pfn >> SECTION_PFN_SHIFT].pageblock_flags[bit >> 6] >> (bit & 63)) & 7


cdef inline void set_pageblock_migratetype(mem_t *mem, pfn_t pfn, int mt) noexcept nogil:
    cdef uint64_t bit = ((pfn & (SECTION_PAGES - 1)) >> PAGEBLOCK_ORDER) * 4
    cdef uint64_t *word = &mem.sections[pfn >> SECTION_PFN_SHIFT].pageblock_flags[bit >> 6]
    if mem.grouping_disabled and mt < MIGRATE_HIGHATOMIC:
        mt = MIGRATE_UNMOVABLE
    if mem.journal != NULL:
        journal_add(mem.journal, word, sizeof(uint64_t))
    word[0] = (word[0] & ~(<uint64_t>7 << (bit & 63))) | (<uint64_t>mt << (bit & 63))


cdef inline bint get_pageblock_skip(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Whether compaction found nothing to do in a pageblock lately."""
    cdef uint64_t bit = ((pfn & (SECTION_PAGES - 1)) >> PAGEBLOCK_ORDER) * 4 + 3
    return (mem.sections[pfn >> SECTION_PFN_SHIFT].pageblock_flags[bit >> 6] >> (bit & 63)) & 1


cdef inline void set_pageblock_skip(mem_t *mem, pfn_t pfn, bint skip) noexcept nogil:
    cdef uint64_t bit = ((pfn & (SECTION_PAGES - 1)) >> PAGEBLOCK_ORDER) * 4 + 3
    cdef uint64_t *word = &mem.sections[pfn >> SECTION_PFN_SHIFT].pageblock_flags[bit >> 6]
    word[0] = (word[0] & ~(<uint64_t> 1 << (bit & 63))) | (<uint64_t> skip << (bit & 63))


cdef inline bint section_online(const mem_t *mem, pfn_t pfn) noexcept nogil:
    return (mem.sections[pfn >> SECTION_PFN_SHIFT].flags & SECTION_IS_ONLINE) != 0


cdef inline zone_t *page_zone(const mem_t *mem, pfn_t pfn) noexcept nogil:
    cdef int zone = mem.blocks[pfn >> PAGEBLOCK_ORDER].zone
    return mem.zones[zone - 1] if zone else NULL


cdef inline void wakeup_kswapd(mem_t *mem, const zone_t *zone, int order,
                               int highest) noexcept nogil:
    """Leave word for a node's kswapd; what it does about it is another mechanism's."""
    cdef node_t *node = &mem.nodes[zone.nid]
    if not zone.managed_pages:
        return
    if mem.journal != NULL:
        journal_add(mem.journal, &node.kswapd_wakeups, sizeof(int64_t))
        journal_add(mem.journal, &node.kswapd_pending, sizeof(int32_t))
        journal_add(mem.journal, &node.kswapd_order, sizeof(int32_t))
        journal_add(mem.journal, &node.kswapd_highest_zoneidx, sizeof(int32_t))
    node.kswapd_wakeups += 1
    node.kswapd_pending = 1
    node.kswapd_order = max(node.kswapd_order, order)
    node.kswapd_highest_zoneidx = max(node.kswapd_highest_zoneidx, highest)
