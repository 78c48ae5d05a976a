# The allocator's C-level interface, for the package's own modules and for those of others
# (docs/extending.md).  Every function works on records that the caller owns and never allocates.
from kmm._allocator cimport PageAllocator
from kmm._free_pages cimport free_pages, free_pages_bulk, split_page
from kmm._freelist cimport (del_page_from_free_list, free_one_page, is_free_head, move_freepages,
                            rmqueue_smallest)
from kmm._gfp cimport GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from kmm._memmap cimport MemMap
from kmm._page_alloc cimport alloc_pages, alloc_pages_bulk
from kmm._pcp cimport drain_pages
from kmm._types cimport *

cdef extern from *:
    """
    #define KMM_ALL_NODES (~(uint64_t)0)
    """
    const uint64_t ALL_NODES "KMM_ALL_NODES"

cdef class BuddyZone:
    cdef zone_t z
    cdef MemMap memmap
    cdef list _walk(self, free_list_t *lst, int order)
