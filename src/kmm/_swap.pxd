# LRU lists (mm/swap.c): what pages reclaim looks at, and in which order.
from kmm._rmap cimport *
from kmm._types cimport *

# 0, or -ENOMEM: room for n more entries on every list of the nodes in the mask that it names.
cdef int lru_make_room(mem_t *mem, uint64_t nodes, int64_t n) noexcept nogil
# The oldest entry that counts, taken off; False when there is none.
cdef bint lru_pop(mem_t *mem, int nid, int lru, folio_t *folio) noexcept nogil
# The same of the entries older than one, counted from the beginning of time.
cdef bint lru_pop_until(mem_t *mem, int nid, int lru, uint64_t end, folio_t *folio) noexcept nogil
# Each of these needs room for one more entry, of a block of order 9 too.
# Note that a page without page table entries was read: a second time makes it active.
cdef void mark_page_accessed(mem_t *mem, const folio_t *folio) noexcept nogil
# A page that reclaim waited for is clean now: it is the next to be looked at.
cdef void folio_rotate_reclaimable(mem_t *mem, const folio_t *folio) noexcept nogil
# Nobody needs a page soon, though it could not be dropped.
cdef void deactivate_file_folio(mem_t *mem, const folio_t *folio) noexcept nogil


cdef inline uint32_t lru_push(lru_list_t *lst, pfn_t pfn) noexcept nogil:
    """Put a page in front; its tag.  There has to be room."""
    cdef uint32_t tag = <uint32_t> lst.head & ((<uint32_t> 1 << LRU_TAG_BITS) - 1)
    lst.ring[lst.head & (lst.room - 1)] = pfn | <uint64_t> tag << (64 - LRU_TAG_BITS)
    lst.head += 1
    lst.nr_live += 1
    return tag


cdef inline void lru_add(mem_t *mem, zone_t *zone, pfn_t pfn, int kind, bint huge,
                         uint16_t *flags) noexcept nogil:
    """Put a page that its user's record knows already on its list (lru_cache_add)."""
    cdef int lru = lru_of(kind, flags[0])
    cdef uint32_t tag
    flags[0] |= PF_LRU
    lru_size_add(mem, zone, lru, PAGEBLOCK_PAGES if huge else 1)
    if lru == LRU_UNEVICTABLE:
        return
    tag = lru_push(&mem.nodes[zone.nid].lru[lru], pfn)
    if huge:
        set_block_tag(block_of(mem, pfn), tag)
    else:
        set_page_tag(&mem.pages[pfn], tag)


cdef inline void lru_del(mem_t *mem, zone_t *zone, int kind, bint huge,
                         uint16_t *flags) noexcept nogil:
    """Take a page off its list; its entry there counts for nothing from now on."""
    cdef int lru = lru_of(kind, flags[0])
    flags[0] &= ~PF_LRU
    lru_size_add(mem, zone, lru, -PAGEBLOCK_PAGES if huge else -1)
    if lru != LRU_UNEVICTABLE:
        mem.nodes[zone.nid].lru[lru].nr_live -= 1
