# Allocating as the kernel's own callers do, for C speed from other Cython code.
#
# `mem` is a machine's: ``cdef PageAllocator a = machine`` and then ``a.mem``.  A CPU number
# chooses per-CPU lists; nobody locks, so one thread at a time works on a machine.
from kmm._types cimport *

# A pfn, or -ENOMEM.  nodes: bit n lets node n give memory; all ones for no restriction.
cdef int64_t alloc_pages(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                         int cpu) noexcept nogil
# How many of n blocks there were; out has room for n.
cdef int64_t alloc_pages_bulk(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                              int cpu, uint64_t *out, int64_t n) noexcept nogil
# alloc_pages without the short way by a CPU's list; exported so that it stays out of line.
cdef int64_t alloc_pages_any(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                             int cpu) noexcept nogil
# One block of one zone, whatever its watermarks say; -1 if there is none.
cdef int64_t rmqueue(mem_t *mem, zone_t *zone, int order, int mt, int flags, int cpu) noexcept nogil
# rmqueue past the per-CPU lists; exported so that it stays out of line.
cdef int64_t rmqueue_direct(mem_t *mem, zone_t *zone, int order, int mt, int flags) noexcept nogil
# The last resort of a request that must not fail; and a reserved pageblock opened for a request.
cdef int64_t alloc_pages_reserve(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                                 int cpu) noexcept nogil
cdef bint unreserve_highatomic(mem_t *mem, uint32_t gfp, int nid, uint64_t nodes) noexcept nogil
