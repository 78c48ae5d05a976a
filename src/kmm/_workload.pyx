"""What workloads do to single pages of a user, many at a time."""
from kmm._allocator cimport PageAllocator
from kmm._free_pages cimport free_pages
from kmm._memory cimport PageUser, attach_page, detach_page, nodes_of
from kmm._page_alloc cimport alloc_pages
from kmm._rmap cimport *
from kmm._swap cimport lru_make_room
from kmm._types cimport *

cdef enum:
    CHUNK = 512                     # slots looked after before the lists are made longer


cdef struct request_t:
    uint32_t gfp
    int nid
    uint64_t nodes
    int cpu
    uint16_t flags


cdef int64_t touch_chunk(mem_t *mem, int number, const int64_t *slots, int64_t n,
                         const request_t *r) noexcept nogil:
    """Touch slots until one cannot be served at once; how many were passed."""
    cdef user_t *user = mem.users[number]
    cdef int64_t i, pfn
    for i in range(n):
        if user.slots[slots[i]] & SLOT_PRESENT:
            user.slots[slots[i]] |= SLOT_YOUNG
            continue
        if user.slots[slots[i]]:
            return i
        pfn = alloc_pages(mem, r.gfp, user.order, r.nid, r.nodes, r.cpu)
        if pfn < 0:
            return i
        attach_page(mem, number, slots[i], <pfn_t> pfn, user.order >= PAGEBLOCK_ORDER, r.flags)
    return n


def touch_slots(PageUser user, PageAllocator m, const int64_t[::1] slots, uint32_t gfp, int nid,
                uint64_t nodes, int cpu, int flags=0):
    """Touch slots in the order given: those with a page become young, absent ones get a page.

    Runs without the GIL.

    :param slots: their numbers; gfp, nid, nodes, cpu: as for fault_in.
    :param flags: marks that new pages bear.
    :return: how many were passed; the next needs a page that cannot be had at once.
    """
    cdef mem_t *mem = user._mem(m)
    cdef request_t r
    cdef int64_t n = slots.shape[0], at = 0, got, some, i
    r.gfp, r.nid, r.nodes, r.cpu, r.flags = gfp, nid, nodes, cpu, <uint16_t> flags
    while at < n:
        some = min(n - at, <int64_t> CHUNK)
        # No more than are touched now: whoever waits for single pages comes back for each.
        for i in range(at, at + some):
            user._check(slots[i], 1)
        if lru_make_room(mem, nodes_of(mem), some):
            raise MemoryError("touch_slots: LRU lists")
        with nogil:
            got = touch_chunk(mem, user.number, &slots[at], some, &r)
        at += got
        if got < some:
            break
    return at


cdef int64_t churn(mem_t *mem, int number, const int64_t *slots, int64_t n, const request_t *r,
                   int64_t *came, int64_t *went) noexcept nogil:
    """Free what a slot has, or give it a block; stops where none is to be had."""
    cdef user_t *user = mem.users[number]
    cdef int64_t i, pfn
    cdef folio_t folio
    cdef uint64_t slot
    for i in range(n):
        slot = user.slots[slots[i]]
        if slot & SLOT_PRESENT:
            read_folio(mem, slot & SLOT_PFN, &folio)
            if folio.flags[0] & PF_PINNED:
                continue
            detach_page(mem, &folio)
            user.slots[slots[i]] = 0
            free_pages(mem, folio.pfn, user.order, r.cpu)
            went[0] += 1
            continue
        pfn = alloc_pages(mem, r.gfp, user.order, r.nid, r.nodes, r.cpu)
        if pfn < 0:
            return i
        attach_page(mem, number, slots[i], <pfn_t> pfn, user.order >= PAGEBLOCK_ORDER, r.flags)
        came[0] += 1
    return n


def churn_slots(PageUser user, PageAllocator m, const int64_t[::1] slots, uint32_t gfp, int nid,
                uint64_t nodes, int cpu):
    """Turn slots over, in the order given: what has a block loses it, what has none gets one.

    Runs without the GIL; for kinds that are on no LRU list.

    :param slots: their numbers, which may come more than once; gfp, nid, nodes, cpu: as for
        fault_in.
    :return: (how many were passed, blocks that came, blocks that went).
    """
    cdef mem_t *mem = user._mem(m)
    cdef request_t r
    cdef int64_t n = slots.shape[0], done = 0, came = 0, went = 0, i
    if on_lru_kind(user.user.kind):
        raise ValueError(f"churn_slots: kind {user.user.kind}")
    for i in range(n):
        user._check(slots[i], 1)
    r.gfp, r.nid, r.nodes, r.cpu, r.flags = gfp, nid, nodes, cpu, 0
    if n:
        with nogil:
            done = churn(mem, user.number, &slots[0], n, &r, &came, &went)
    return done, came, went
