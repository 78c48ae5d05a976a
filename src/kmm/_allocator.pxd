# The base class of a machine: ``cdef PageAllocator a = machine`` gives its ``mem``.
from kmm._memmap cimport MemMap
from kmm._types cimport *


cdef class PageAllocator:
    cdef mem_t *mem
    cdef MemMap memmap_engine_
    cdef object probes
    cdef int watched                # probes is not None
    cdef int default_cpu
    cdef int64_t records_kept
    cdef int _cpu(self, object cpu) except -1
    cdef int64_t _managed_pages(self) noexcept
    cdef int _after_free(self, zone_t *zone) except -1
    cdef int _nid(self, object nid, int cpu) except -1
    cdef uint32_t _gfp(self, object gfp) except? 0xFFFFFFFF
