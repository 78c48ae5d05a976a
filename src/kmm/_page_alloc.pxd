# Allocating and freeing as the kernel's own callers do, for C speed from other Cython code.
#
# `mem` is a machine's: ``cdef PageAllocator a = machine`` and then ``a.mem``.  A CPU number
# chooses per-CPU lists; nobody locks, so one thread at a time works on a machine.
from kmm._memmap cimport MemMap
from kmm._pcp cimport free_unref_page, pcp_allowed_order, rmqueue_pcplist
from kmm._types cimport *


cdef class PageAllocator:
    cdef mem_t *mem
    cdef MemMap memmap_engine_
    cdef object probes
    cdef int watched                # probes is not None
    cdef int default_cpu
    cdef int64_t records_kept
    cdef int _cpu(self, object cpu) except -1
    cdef int _after_free(self, zone_t *zone) except -1
    cdef int _nid(self, object nid, int cpu) except -1
    cdef uint32_t _gfp(self, object gfp) except? 0xFFFFFFFF

# A pfn, or -ENOMEM.  nodes: bit n lets node n give memory; all ones for no restriction.
cdef int64_t alloc_pages(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                         int cpu) noexcept nogil
# How many of n blocks there were; out has room for n.
cdef int64_t alloc_pages_bulk(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                              int cpu, uint64_t *out, int64_t n) noexcept nogil
# 0, or -EFAULT (no such page), -EINVAL (order, alignment), -EEXIST (not allocated).
cdef int free_pages(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil
# 0, or as above; *failed is the index of the first block that cannot be freed: none is then.
cdef int free_pages_bulk(mem_t *mem, const uint64_t *pfns, int64_t n, int order, int cpu,
                         int64_t *failed) noexcept nogil
# The same two without the short way by a CPU's list; exported so that they stay out of line.
cdef int64_t alloc_pages_any(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                             int cpu) noexcept nogil
cdef int free_pages_any(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil
# One block of one zone, whatever its watermarks say; -1 if there is none.
cdef int64_t rmqueue(mem_t *mem, zone_t *zone, int order, int mt, int flags, int cpu) noexcept nogil
# 0, or as free_pages: a block becomes single pages, each to be freed by itself.
cdef int split_page(mem_t *mem, pfn_t pfn, int order) noexcept nogil
