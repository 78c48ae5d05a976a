# Freeing as the kernel's own callers do, for C speed from other Cython code.
from kmm._types cimport *

# 0, or -EFAULT (no such page), -EINVAL (order, alignment), -EEXIST (not allocated),
# -EBUSY (a user's or pinned).
cdef int free_pages(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil
# 0, or as above; *failed is the index of the first block that cannot be freed: none is then.
cdef int free_pages_bulk(mem_t *mem, const uint64_t *pfns, int64_t n, int order, int cpu,
                         int64_t *failed) noexcept nogil
# free_pages without the short way to a CPU's list; exported so that it stays out of line.
cdef int free_pages_any(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil
# 0, or as free_pages: a block becomes single pages, each to be freed by itself.
cdef int split_page(mem_t *mem, pfn_t pfn, int order) noexcept nogil
