# The swap device: slots for the content of pages that are not in memory (mm/swapfile.c).
from kmm._rmap cimport *
from kmm._types cimport *

cdef enum:
    SWAPFILE_CLUSTER = 512

# The first slot of a cluster without any in use, from the cursor on; -1 if there is none.
cdef int64_t free_cluster(const mem_t *mem) noexcept nogil
# Put what a page holds on the swap device, and take the page from its user; False if the device
# has no room for it.  A block of order 9 needs a whole cluster.
cdef bint swap_out(mem_t *mem, const folio_t *folio) noexcept nogil
# Make a page that was handed out the page of a slot whose content is on the swap device.
cdef void swap_in(mem_t *mem, int number, uint64_t index, pfn_t pfn, uint16_t flags) noexcept nogil


cdef inline int64_t nr_swap_pages(const mem_t *mem) noexcept nogil:
    """How many slots are free (get_nr_swap_pages)."""
    return mem.swap.nr_slots - mem.swap.nr_used


cdef inline void swap_free(mem_t *mem, uint64_t slot) noexcept nogil:
    mem.swap.owner[slot] = 0
    mem.swap.cluster[slot / SWAPFILE_CLUSTER] -= 1
    mem.swap.nr_used -= 1
