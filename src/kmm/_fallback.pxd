# What a request does when the lists of its own migratetype are empty.
from kmm._freelist cimport rmqueue_smallest
from kmm._types cimport *

cdef bint rmqueue_fallback(mem_t *mem, zone_t *zone, int order, int mt, int flags) noexcept nogil
cdef int64_t move_freepages_block(mem_t *mem, zone_t *zone, pfn_t pfn, int mt,
                                  int64_t *movable) noexcept nogil
cdef void reserve_highatomic_pageblock(mem_t *mem, zone_t *zone, pfn_t pfn) noexcept nogil
cdef bint unreserve_highatomic_pageblock(mem_t *mem, zone_t *zone, int mt,
                                         bint force) noexcept nogil

# Whether a request of a type may make another type's pageblock its own for a block of an order;
# and the type whose block it would take, or -1.
cdef bint can_steal_fallback(const mem_t *mem, int order, int mt) noexcept nogil
cdef int suitable_fallback(const zone_t *zone, int order, int mt) noexcept nogil


cdef bint drop_poisoned(mem_t *mem, pfn_t pfn, int order) noexcept nogil


cdef inline bint is_bad(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Whether a block just taken holds a poisoned page; nobody has it then (check_new_pages)."""
    return mem.poisoned and drop_poisoned(mem, pfn, order)


cdef inline int64_t rmqueue_buddy(mem_t *mem, zone_t *zone, int order, int mt,
                                  int flags) noexcept nogil:
    """Take a block of a type, claiming one of another type if need be; -1 (__rmqueue)."""
    cdef int64_t pfn = rmqueue_smallest(mem, zone, order, mt)
    if pfn < 0 and rmqueue_fallback(mem, zone, order, mt, flags):
        pfn = rmqueue_smallest(mem, zone, order, mt)
    return pfn
