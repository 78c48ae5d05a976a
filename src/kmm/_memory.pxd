# Pages of users: faulted in, let go, and what they hold (mm/memory.c).
from kmm._allocator cimport PageAllocator
from kmm._memmap cimport MemMap
from kmm._rmap cimport *
from kmm._swap cimport lru_add, lru_del, lru_make_room
from kmm._types cimport *


cdef class PageUser:
    cdef user_t user
    cdef MemMap memmap
    cdef readonly int number        # of the user in the machine's table
    cdef readonly object slots      # uint64 array, read-only as the others here
    cdef readonly object store      # uint64 array or None
    cdef mem_t *_mem(self, PageAllocator m) except NULL
    cdef readonly object written    # uint8 array or None
    cdef int _check(self, int64_t start, int64_t n) except -1
    cdef int _note_written(self, old) except -1


# Make a block that was handed out one of a user's pages; its slot is written.
cdef void attach_page(mem_t *mem, int number, uint64_t index, pfn_t pfn, bint huge,
                      uint16_t flags) noexcept nogil
# Write the tokens of pages that follow from their user's seed.
cdef void sow_tokens(mem_t *mem, user_t *user, uint64_t index, pfn_t pfn,
                     int64_t pages) noexcept nogil
# Take a page from its user; it is a page that is handed out and nobody's.  Its slot is not written.
cdef void detach_page(mem_t *mem, const folio_t *folio) noexcept nogil
# Turn a user's block of order 9 into single pages, each with its part of what the block had.
cdef void split_huge_page(mem_t *mem, const folio_t *folio) noexcept nogil
# Whether somebody woke a kswapd that has not looked since.
cdef bint kswapd_pending(const mem_t *mem) noexcept nogil
# A mask of all nodes there can be.
cdef uint64_t nodes_of(const mem_t *mem) noexcept nogil
