"""Isolating what is used in a range that somebody wants as a whole (mm/compaction.c)."""
from kmm._allocator cimport PageAllocator
from kmm._free_pages cimport free_pages
from kmm._freelist cimport is_free_head
from kmm._memmap cimport MemMap
from kmm._memory cimport detach_page
from kmm._migrate cimport isolate_folio
from kmm._rmap cimport *
from kmm._types cimport *

cdef inline pfn_t size_at(const mem_t *mem, const folio_t *folio) noexcept nogil:
    if folio.huge:
        return <pfn_t> 1 << block_of(mem, folio.pfn).order
    return <pfn_t> 1 << (mem.states[folio.pfn] & STATE_ORDER)


def isolate_migratepages_range(MemMap memmap, pfn_t start, pfn_t end, int64_t want,
                               uint64_t[::1] out):
    """Isolate used pages that can move, upward, until there are as many as wanted.

    What cannot be isolated is passed over: whoever wants the range finds it in the way.  A huge
    page of a pool is left to the caller.

    :param want: pages; the last entry may bring more.  out: room for so many pfns.
    :return: (how many entries are isolated; of how many pages; the pfn to go on from; whether a
        huge page of a pool starts there).
    """
    cdef mem_t *mem = &memmap.mem
    cdef pfn_t pfn = start
    cdef int64_t n = 0, pages = 0
    cdef int order = 0
    cdef bint hugetlb = False
    cdef folio_t folio
    if out.shape[0] < want:
        raise ValueError(f"isolate_migratepages_range: room for {want} needed")
    with nogil:
        while pfn < end and pages < want:
            if is_free_head(mem, pfn, &order):
                pfn += <pfn_t> 1 << order
                continue
            if not read_folio(mem, pfn, &folio):
                pfn += 1
                continue
            if mem.users[folio.user].kind == USER_HUGETLB:
                hugetlb = True
                break
            if (folio.flags[0] & (PF_LRU | PF_MOVABLE_OPS)
                    and not folio.flags[0] & (PF_ISOLATED | PF_HWPOISON)):
                isolate_folio(mem, &folio)
                out[n] = pfn
                n += 1
                pages += <int64_t> size_at(mem, &folio)
            pfn += size_at(mem, &folio)
    return n, pages, min(pfn, end), hugetlb


def reclaim_clean_pages_from_list(PageAllocator m, const uint64_t[::1] pfns, uint8_t[::1] dropped,
                                  int cpu):
    """Drop the isolated pages of a list that only cache what a file has on its backing store.

    :param dropped: as long as the list, all zero; 1 is written for those that are gone.
    :return: pages freed.
    """
    cdef mem_t *mem = m.mem
    cdef int64_t i, freed = 0, pages
    cdef uint64_t j
    cdef int order
    cdef user_t *user
    cdef folio_t folio
    if dropped.shape[0] != pfns.shape[0]:
        raise ValueError("reclaim_clean_pages_from_list: arrays of different lengths")
    with nogil:
        for i in range(pfns.shape[0]):
            if not read_folio(mem, pfns[i], &folio):
                continue
            user = mem.users[folio.user]
            if user.kind != USER_FILE or folio.flags[0] & (
                    PF_DIRTY | PF_WRITEBACK | PF_MLOCKED | PF_PINNED | PF_HWPOISON):
                continue
            pages = <int64_t> size_at(mem, &folio)
            order = PAGEBLOCK_ORDER if folio.huge else mem.states[folio.pfn] & STATE_ORDER
            detach_page(mem, &folio)
            for j in range(<uint64_t> pages):
                user.slots[folio.index + j] = 0
            free_pages(mem, folio.pfn, order, cpu)
            dropped[i] = 1
            freed += pages
    return freed
