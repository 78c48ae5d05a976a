"""The allocator's calls for Python: arguments are checked, the work is done in C without the GIL."""
import numpy as np

from kmm._free_pages cimport free_pages, free_pages_bulk, split_page
from kmm._gfp cimport *
from kmm._memmap cimport MemMap, page_zone
from kmm._page_alloc cimport (alloc_pages, alloc_pages_bulk, alloc_pages_flags, slowpath_flags,
                              unreserve_highatomic, wake_kswapds, would_serve)

from kmm.errors import check_number, kernel_error

cdef enum:
    EINVAL = 22
    LARGE_REQUEST = 1 << 17         # pages; the records of fewer are not worth a huge host page

cdef uint64_t ALL_NODES = <uint64_t> -1
cdef object ndarray = np.ndarray

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

DEF_GFP = GFP_KERNEL


cdef inline int64_t number(object value, str name, int64_t low, int64_t high) except? -1:
    """An argument that has to be a whole number between two limits; errors name it."""
    cdef int overflow = 0
    cdef int64_t out
    if type(value) is int:
        out = PyLong_AsLongLongAndOverflow(value, &overflow)
        if not overflow and low <= out <= high:
            return out
    return check_number(name, value, low, high)


cdef inline pfn_t pfn_number(object value) except? <pfn_t> -1:
    """An argument that has to be a page frame number, of a page that exists or not."""
    cdef int overflow = 0
    cdef int64_t out
    if type(value) is int:
        out = PyLong_AsLongLongAndOverflow(value, &overflow)
        if not overflow and out >= 0:
            return <pfn_t> out
    return check_number("pfn", value, 0, (1 << 64) - 1)


cdef class PageAllocator:
    """Hands out a machine's pages and takes them back."""

    def _attach(self, MemMap memmap, int records_kept):
        """Work on a machine's records.

        :param records_kept: free pageblocks of a zone whose page records the host may keep.
        """
        self.memmap_engine_ = memmap
        self.mem = &memmap.mem
        self.default_cpu = 0
        self.records_kept = records_kept

    @property
    def kprobes(self):
        """The recorder of calls and orders to fail, None while nobody watches."""
        return self.probes

    @kprobes.setter
    def kprobes(self, value):
        self.probes = value
        self.watched = value is not None

    @property
    def free_records_kept(self):
        """Free pageblocks of a zone whose page records the host may keep."""
        return self.records_kept

    @property
    def this_cpu(self):
        """The CPU that kernel code and requests without ``cpu`` run on."""
        return self.default_cpu

    @this_cpu.setter
    def this_cpu(self, value):
        self.default_cpu = number(value, "this_cpu", 0, self.mem.nr_cpus - 1)

    cdef int _cpu(self, object cpu) except -1:
        if cpu is None:
            return self.default_cpu
        return number(cpu, "cpu", 0, self.mem.nr_cpus - 1)

    cdef int _nid(self, object nid, int cpu) except -1:
        if nid is None:
            return self.mem.node_of_cpu[cpu]
        return number(nid, "nid", 0, self.mem.nr_nodes - 1)

    cdef uint32_t _gfp(self, object gfp) except? 0xFFFFFFFF:
        cdef uint32_t flags = number(gfp, "gfp", 0, GFP_BITS)
        if (flags & (GFP_BIT_MOVABLE | GFP_BIT_RECLAIMABLE)) == (
                GFP_BIT_MOVABLE | GFP_BIT_RECLAIMABLE):
            raise kernel_error(-EINVAL, f"gfp: {flags:#x}; allowed: movable or reclaimable, not both")
        return flags

    cdef int _after_free(self, zone_t *zone) except -1:
        if zone.nr_dirty_free > self.records_kept and zone.nr_dirty_free > zone.dirty_free_limit:
            self.give_back_records()
        return 0

    def alloc_pages(self, order=0, gfp=DEF_GFP, nid=None, cpu=None):
        """Allocate a block of 2^order pages.

        :param order: 0 to 10; gfp: __GFP_* flags; nid: node whose zonelist is used, that of the
            CPU if None; cpu: whose lists serve, ``this_cpu`` if None.
        :return: the pfn of the first page.
        :raises OutOfMemory: if no zone may give one; InvalidArgument: naming the argument.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef uint32_t flags = self._gfp(gfp)
        cdef int c = self._cpu(cpu)
        cdef int n = self._nid(nid, c)
        cdef int64_t pfn
        if self.watched:
            return self._alloc_slowly(o, flags, n, c)
        pfn = alloc_pages(self.mem, flags, o, n, ALL_NODES, c)
        if pfn < 0:
            return self._alloc_slowly(o, flags, n, c)
        return pfn

    def free_pages(self, pfn, order=0, cpu=None):
        """Free a block of 2^order pages.

        :raises KernelError: EFAULT where there is no online page, EINVAL for another order than
            it was allocated with, EEXIST if it is free already or inside a larger block.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef int c = self._cpu(cpu)
        cdef pfn_t page = pfn_number(pfn)
        cdef int rc
        if self.watched:
            self._free_slowly(page, o, c)
            return
        rc = free_pages(self.mem, page, o, c)
        if rc:
            raise kernel_error(rc, f"free of pfn {page:#x}, order {o}")
        self._after_free(page_zone(self.mem, page))

    def alloc_pages_bulk(self, n, order=0, gfp=DEF_GFP, nid=None, out=None, cpu=None):
        """Allocate up to n blocks, as single calls would one after the other.

        Runs without the GIL.

        :param n: blocks; order, gfp, nid, cpu: as for alloc_pages.
        :param out: a uint64 array, or another buffer of uint64, of at least n to fill; an array
            of a part of it is returned.
        :return: a uint64 array of the pfns of those there were.
        :raises InvalidArgument: naming the argument.
        """
        cdef int64_t want = number(n, "n", 0, <int64_t> self.mem.nr_pages), done
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef uint32_t flags = self._gfp(gfp)
        cdef int c = self._cpu(cpu)
        cdef int node = self._nid(nid, c)
        cdef uint64_t[::1] room
        if out is None:
            # There are not more than the machine's pages.
            want = min(want, self._managed_pages() >> o)
            out = np.empty(want, dtype=np.uint64)
        try:
            room = out
        except (ValueError, TypeError, BufferError):
            room = None
        if room is None or room.shape[0] < want:
            raise kernel_error(-EINVAL, f"out: allowed: a writable uint64 array of at least {want}")
        if type(out) is not ndarray:
            out = np.asarray(out)  # the memory of whatever has some
        if want == 0:
            return out[:0]
        if want << o >= LARGE_REQUEST:
            self._before_large_request(want << o, flags, node)
        with nogil:
            done = alloc_pages_bulk(self.mem, flags, o, node, ALL_NODES, c, &room[0], want)
        while done < want:
            # Each further block needs what only the long way can bring.
            more = self._alloc_more(o, flags, node, c)
            if more is None:
                break
            room[done] = more
            done += 1
            with nogil:
                done += alloc_pages_bulk(self.mem, flags, o, node, ALL_NODES, c, &room[done],
                                         want - done)
        return out if done == len(out) else out[:done]

    def free_pages_bulk(self, pfns, order=0, cpu=None):
        """Free many blocks of one order; if one of them cannot be freed, none is.

        Runs without the GIL.

        :param pfns: a uint64 array of one dimension, or anything that can become one.
        :raises KernelError: naming the first pfn that cannot be freed.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef int c = self._cpu(cpu)
        cdef int64_t n, failed = -1
        cdef int rc
        cdef const uint64_t[::1] array
        if pfns is None:
            raise kernel_error(-EINVAL, "pfns: None; allowed: a list of numbers from 0 to 2^64 - 1")
        try:
            array = pfns
        except (ValueError, TypeError, BufferError):
            array = self._as_pfns(pfns)
        n = array.shape[0]
        if n == 0:
            return
        with nogil:
            rc = free_pages_bulk(self.mem, &array[0], n, o, c, &failed)
        if rc:
            raise kernel_error(
                rc, f"free of pfn {array[failed]:#x} (index {failed}), order {o}")
        self._after_free(page_zone(self.mem, array[0]))

    def split_page(self, pfn, order):
        """Turn a block of 2^order pages into single pages, each to be freed by itself.

        :raises KernelError: as free_pages.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef pfn_t page = pfn_number(pfn)
        cdef int rc = split_page(self.mem, page, o)
        if rc:
            raise kernel_error(rc, f"split of pfn {page:#x}, order {o}")

    cdef int64_t _managed_pages(self) noexcept:
        cdef int64_t total = 0
        cdef int i
        for i in range(self.mem.nr_zones):
            total += self.mem.zones[i].managed_pages
        return total

    def _request(self, int gfp, int order, int nid, uint64_t nodes, int cpu):
        """One request without what waits for others; a pfn, or -ENOMEM (__alloc_pages)."""
        return alloc_pages(self.mem, gfp, order, nid, nodes, cpu)

    def _from_freelist(self, int gfp, int order, int nid, uint64_t nodes, int cpu, int flags):
        """One walk over the free lists with ALLOC_* flags; a pfn, or -ENOMEM."""
        return alloc_pages_flags(self.mem, gfp, order, nid, nodes, cpu, flags)

    def _slowpath_flags(self, int gfp, int order):
        """The ALLOC_* flags of a request that has to wait (gfp_to_alloc_flags)."""
        return slowpath_flags(gfp, order)

    def _wake_kswapds(self, int gfp, int order, int nid, uint64_t nodes):
        """Wake the kswapd of every node that may serve a request."""
        wake_kswapds(self.mem, gfp, order, nid, nodes)

    def _would_serve(self, int zone_index, int gfp, int order, int flags, int64_t free):
        """Whether a zone would serve a request by a mark if it had so many free pages."""
        return would_serve(self.mem, self.mem.zones[zone_index], gfp, order, flags, free)

    def _unreserve_highatomic(self, int gfp, int nid, uint64_t nodes):
        """Open one pageblock kept for atomic requests, in a zone that may serve a request.

        :return: whether there was one.
        """
        return unreserve_highatomic(self.mem, gfp, nid, nodes)

    def _release(self, pfn_t pfn, int order, int cpu):
        """One free; 0 or a negative errno (__free_pages)."""
        return free_pages(self.mem, pfn, order, cpu)
