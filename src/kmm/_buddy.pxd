# The allocator's C-level interface.  Every function works on records that the caller owns
# and never allocates.
from kmm._memmap cimport MemMap
from kmm._types cimport *


cdef class BuddyZone:
    cdef zone_t z
    cdef MemMap memmap
    cdef list _walk(self, free_list_t *lst, int order)


cdef void free_one_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int mt,
                        int fpi) noexcept nogil
cdef int64_t rmqueue_smallest(mem_t *mem, zone_t *zone, int order, int mt) noexcept nogil
cdef int64_t rmqueue(mem_t *mem, zone_t *zone, int order, int mt, int flags,
                     int cpu) noexcept nogil
cdef int free_pages_prepare(mem_t *mem, pfn_t pfn, int order) noexcept nogil
cdef void free_unref_page(mem_t *mem, zone_t *zone, pfn_t pfn, int order, int cpu) noexcept nogil
cdef int64_t move_freepages(mem_t *mem, zone_t *zone, pfn_t start, pfn_t end, int mt,
                            int64_t *movable) noexcept nogil
cdef void drain_pages(mem_t *mem, zone_t *zone, int cpu) noexcept nogil
cdef bint is_free_head(const mem_t *mem, pfn_t pfn, int *order) noexcept nogil
cdef void del_page_from_free_list(mem_t *mem, zone_t *zone, pfn_t pfn, int order) noexcept nogil
