"""Pages that nodes give in turn (mm/mempolicy.c)."""
from kmm._allocator cimport PageAllocator
from kmm._memmap cimport page_zone
from kmm._memory cimport PageUser, attach_page, nodes_of
from kmm._page_alloc cimport alloc_pages
from kmm._rmap cimport *
from kmm._swap cimport lru_make_room
from kmm._types cimport *

cdef enum:
    CHUNK = 512                     # pages touched before the lists are made longer


cdef struct turns_t:
    const int64_t *nodes
    int64_t nr
    int64_t next                    # whose turn it is
    bint by_index                   # pages that are there already have had theirs
    int64_t *hits                   # by zone: requests that the node whose turn it was served


cdef bint fault_one(mem_t *mem, int number, int64_t at, uint32_t gfp, turns_t *turns,
                    uint64_t nodes, int cpu, uint16_t flags) noexcept nogil:
    """Give an absent slot a page of the node whose turn it is; whether there was one at once."""
    cdef user_t *user = mem.users[number]
    cdef int64_t nid = turns.nodes[turns.next]
    cdef int64_t pfn = alloc_pages(mem, gfp, user.order, <int> nid, nodes, cpu)
    cdef zone_t *zone
    if pfn < 0:
        return False
    turns.next = (turns.next + 1) % turns.nr
    attach_page(mem, number, at, <pfn_t> pfn, user.order >= PAGEBLOCK_ORDER, flags)
    zone = page_zone(mem, <pfn_t> pfn)
    if zone.nid == nid:
        turns.hits[zone.index] += 1
    return True


cdef int64_t fault_chunk(mem_t *mem, int number, int64_t at, int64_t end, uint32_t gfp,
                         turns_t *turns, uint64_t nodes, int cpu, uint16_t flags) noexcept nogil:
    """Give absent slots pages; the first slot that got none, or the end."""
    cdef user_t *user = mem.users[number]
    while at < end:
        if user.slots[at]:
            if not user.slots[at] & SLOT_PRESENT:
                return at
            if turns.by_index:
                turns.next = (turns.next + 1) % turns.nr
        elif not fault_one(mem, number, at, gfp, turns, nodes, cpu, flags):
            return at
        at += 1
    return end


cdef int64_t touch_chunk(mem_t *mem, int number, const int64_t *slots, int64_t n, int64_t offset,
                         uint32_t gfp, turns_t *turns, uint64_t nodes, int cpu) noexcept nogil:
    """Touch slots until one cannot be served at once; how many were passed."""
    cdef user_t *user = mem.users[number]
    cdef int64_t i
    for i in range(n):
        if user.slots[slots[i]] & SLOT_PRESENT:
            user.slots[slots[i]] |= SLOT_YOUNG
            continue
        if turns.by_index:
            turns.next = (slots[i] + offset) % turns.nr
        if user.slots[slots[i]] or not fault_one(mem, number, slots[i], gfp, turns, nodes, cpu, 0):
            return i
    return n


cdef int fill_turns(const mem_t *mem, turns_t *turns, const int64_t[::1] nodes, int64_t first,
                    bint by_index, int64_t[::1] hits) except -1:
    cdef int64_t i
    if nodes.shape[0] < 1 or not 0 <= first < nodes.shape[0] or hits.shape[0] < mem.nr_zones:
        raise ValueError(f"in_turn: first {first} of {nodes.shape[0]} nodes")
    for i in range(nodes.shape[0]):
        if not 0 <= nodes[i] < mem.nr_nodes:
            raise ValueError(f"in_turn: node {nodes[i]}")
    turns.nodes, turns.nr, turns.next, turns.by_index = &nodes[0], nodes.shape[0], first, by_index
    turns.hits = &hits[0]
    return 0


def fault_in_turn(PageUser user, PageAllocator m, int64_t start, int64_t n, uint32_t gfp,
                  const int64_t[::1] nodes, int64_t first, bint by_index, uint64_t mask, int cpu,
                  int flags, int64_t[::1] hits):
    """Give absent slots pages, upward, each from the next node of a circle.

    Runs without the GIL.

    :param start: first slot; n: how many; gfp, cpu: as for alloc_pages; mask: bit k lets node k
        give, which all need not.
    :param nodes: the circle; first: where in it to begin; by_index: whether slots that have a page
        take their turn too.
    :param flags: marks that the pages bear.
    :param hits: by zone; requests that were served where they should are added.
    :return: (slots passed, where in the circle to go on).
    """
    cdef mem_t *mem = user._mem(m)
    cdef turns_t turns
    cdef int64_t at = start, end = start + n, till
    user._check(start, n)
    fill_turns(mem, &turns, nodes, first, by_index, hits)
    while at < end:
        till = min(at + CHUNK, end)
        if lru_make_room(mem, nodes_of(mem), till - at):
            raise MemoryError("fault_in_turn: LRU lists")
        with nogil:
            at = fault_chunk(mem, user.number, at, till, gfp, &turns, mask, cpu, <uint16_t> flags)
        if at < till:
            break
    return at - start, turns.next


def touch_in_turn(PageUser user, PageAllocator m, const int64_t[::1] slots, uint32_t gfp,
                  const int64_t[::1] nodes, int64_t first, bint by_index, uint64_t mask, int cpu,
                  int64_t[::1] hits):
    """Touch slots in the order given: those with a page become young, absent ones get a page.

    Runs without the GIL.

    :param slots: their numbers; gfp, nodes, mask, cpu, hits: as for fault_in_turn.
    :param first: where in the circle to begin; by_index: slot 0 does, and each other where its
        number says.
    :return: (slots passed, where in the circle to go on); the next needs a page that cannot be had
        at once.
    """
    cdef mem_t *mem = user._mem(m)
    cdef turns_t turns
    cdef int64_t at = 0, n = slots.shape[0], some, got, i
    fill_turns(mem, &turns, nodes, first, by_index, hits)
    while at < n:
        some = min(n - at, <int64_t> CHUNK)
        # No more than are touched now: whoever waits for single pages comes back for each.
        for i in range(at, at + some):
            user._check(slots[i], 1)
        if lru_make_room(mem, nodes_of(mem), some):
            raise MemoryError("touch_in_turn: LRU lists")
        with nogil:
            got = touch_chunk(mem, user.number, &slots[at], some, first, gfp, &turns, mask, cpu)
        at += got
        if got < some:
            break
    return at, turns.next
