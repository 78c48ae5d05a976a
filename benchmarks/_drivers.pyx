# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The workloads, driven from C speed: the same code asks kmm and the plain buddy."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kmm._buddy cimport PageAllocator, alloc_pages, free_pages, mem_t

import numpy as np

cdef extern from "plain_buddy.h":
    ctypedef struct plain_record:
        pass
    ctypedef struct plain_buddy:
        plain_record *records
        uint64_t pages
    int plain_init(plain_buddy *b, uint64_t pages) noexcept nogil
    int64_t plain_alloc(plain_buddy *b, int order) noexcept nogil
    int plain_free(plain_buddy *b, uint64_t pfn, int order) noexcept nogil

cdef int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1000000000 + t.tv_nsec


cdef inline uint64_t splitmix64(uint64_t *state) noexcept nogil:
    cdef uint64_t z
    state[0] += <uint64_t> 0x9E3779B97F4A7C15
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t> 0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline uint64_t below(uint64_t *state, uint64_t n) noexcept nogil:
    return ((splitmix64(state) >> 32) * n) >> 32


cdef class Subject:
    """An allocator under test: a machine's, or the plain buddy."""

    cdef mem_t *mem
    cdef object owner
    cdef plain_buddy plain
    cdef uint32_t gfp
    cdef int nid
    cdef bint is_plain

    @staticmethod
    def of(PageAllocator machine, uint32_t gfp, int nid):
        """Ask a machine, at C level."""
        cdef Subject s = Subject()
        s.owner, s.mem, s.gfp, s.nid = machine, machine.mem, gfp, nid
        return s

    @staticmethod
    def plain_of(uint64_t pages):
        """A plain buddy over so many pages."""
        cdef Subject s = Subject()
        s.is_plain = True
        if plain_init(&s.plain, pages):
            raise MemoryError("plain buddy")
        return s

    def __dealloc__(self):
        free(self.plain.records)

    cdef inline int64_t take(self, int order) noexcept nogil:
        if self.is_plain:
            return plain_alloc(&self.plain, order)
        return alloc_pages(self.mem, self.gfp, order, self.nid, <uint64_t> -1, 0)

    cdef inline void give(self, uint64_t pfn, int order) noexcept nogil:
        if self.is_plain:
            plain_free(&self.plain, pfn, order)
        else:
            free_pages(self.mem, pfn, order, 0)

    def take_many(self, uint64_t[::1] out):
        """Allocate single pages one after the other; (how many, ns)."""
        cdef int64_t t, i, n = out.shape[0], pfn
        with nogil:
            t = now()
            for i in range(n):
                pfn = self.take(0)
                if pfn < 0:
                    n = i
                    break
                out[i] = <uint64_t> pfn
            t = now() - t
        return n, t

    def give_many(self, const uint64_t[::1] pfns):
        """Free single pages one after the other; ns."""
        cdef int64_t t, i, n = pfns.shape[0]
        with nogil:
            t = now()
            for i in range(n):
                self.give(pfns[i], 0)
            t = now() - t
        return t

    def churn(self, uint64_t[::1] live, int64_t count, int64_t pages, int64_t ops, uint64_t seed):
        """W3, one operation at a time; (pages live at the end, ns)."""
        cdef int64_t t, i, low = pages * 45 / 100, high = pages * 55 / 100, at
        cdef uint64_t state = seed
        with nogil:
            t = now()
            for i in range(ops):
                if count >= high or (count > low and splitmix64(&state) & 1):
                    at = <int64_t> below(&state, count)
                    self.give(live[at], 0)
                    count -= 1
                    live[at] = live[count]
                else:
                    live[count] = <uint64_t> self.take(0)
                    count += 1
            t = now() - t
        return count, t

    def mixed(self, int64_t pages, int64_t ops, uint64_t seed):
        """W4: orders 0 to 9 by weight, near 70 % full; ns of ops operations after filling."""
        cdef int64_t used = 0, want = pages * 70 / 100, count = 0, t = 0, i, at, pfn, room = pages
        cdef uint64_t state = seed, r
        cdef int order
        cdef uint64_t *live = <uint64_t *> malloc(room * sizeof(uint64_t))
        if live == NULL:
            raise MemoryError("live blocks")
        with nogil:
            for i in range(-room, ops):
                if i < 0 and used >= want:
                    continue
                if i == 0:
                    t = now()
                if used >= want or (i >= 0 and count and splitmix64(&state) & 1
                                    and used > want - pages / 50):
                    at = <int64_t> below(&state, count)
                    order = live[at] >> 60
                    self.give(live[at] & <uint64_t> 0xFFFFFFFFFFFFFFF, order)
                    used -= <int64_t> 1 << order
                    count -= 1
                    live[at] = live[count]
                else:
                    r = below(&state, 1024)
                    order = weighted_order(r)
                    pfn = self.take(order)
                    if pfn >= 0:
                        live[count] = <uint64_t> pfn | <uint64_t> order << 60
                        count += 1
                        used += <int64_t> 1 << order
            t = now() - t
            for i in range(count):
                self.give(live[i] & <uint64_t> 0xFFFFFFFFFFFFFFF, live[i] >> 60)
            free(live)
        return t

    def pairs(self, int64_t n):
        """W5: allocate and free one page, n times; ns."""
        cdef int64_t t, i
        with nogil:
            t = now()
            for i in range(n):
                self.give(<uint64_t> self.take(0), 0)
            t = now() - t
        return t


cdef inline int weighted_order(uint64_t r) noexcept nogil:
    """0 to 9 with weights 512, 128, 64, 32, 16, 8, 4, 2, 1, 1 (sum 768); r below 1024."""
    cdef uint64_t x = r * 3 / 4
    if x < 512:
        return 0
    if x < 640:
        return 1
    if x < 704:
        return 2
    if x < 736:
        return 3
    if x < 752:
        return 4
    if x < 760:
        return 5
    if x < 764:
        return 6
    if x < 766:
        return 7
    return 8 if x < 767 else 9


def shuffle(uint64_t[::1] pfns, uint64_t seed):
    """Permute an array as Fisher and Yates do."""
    cdef int64_t i, j
    cdef uint64_t state = seed, keep
    with nogil:
        for i in range(pfns.shape[0] - 1, 0, -1):
            j = <int64_t> below(&state, i + 1)
            keep = pfns[i]
            pfns[i] = pfns[j]
            pfns[j] = keep


def pick(uint64_t[::1] live, int64_t count, int64_t n, uint64_t[::1] state):
    """Move n random ones of the first count entries to their end."""
    cdef int64_t i, at
    cdef uint64_t keep, s = state[0]
    with nogil:
        for i in range(n):
            at = <int64_t> below(&s, count - i)
            keep = live[count - 1 - i]
            live[count - 1 - i] = live[at]
            live[at] = keep
    state[0] = s


def memset_pages(object buffer, int64_t pages):
    """memset over 64 bytes a page; ns."""
    cdef unsigned char[::1] view = buffer
    cdef int64_t t
    with nogil:
        t = now()
        memset(&view[0], 1, pages * 64)
        t = now() - t
    return t


def random_writes(object buffer, int64_t records, int64_t n, uint64_t seed):
    """Random read-modify-write of 16-byte records; ns for n of them."""
    cdef uint64_t[::1] view = buffer
    cdef uint64_t state = seed
    cdef int64_t t, i
    with nogil:
        t = now()
        for i in range(n):
            view[2 * below(&state, records)] += 1
        t = now() - t
    return t
