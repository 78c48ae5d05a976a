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


cdef int64_t fault_chunk(mem_t *mem, int number, int64_t at, int64_t end, uint32_t gfp,
                         turns_t *turns, uint64_t nodes, int cpu, uint16_t flags) noexcept nogil:
    """Give absent slots pages; the first slot that got none, or the end."""
    cdef user_t *user = mem.users[number]
    cdef int64_t nid, pfn
    cdef zone_t *zone
    while at < end:
        if user.slots[at]:
            if not user.slots[at] & SLOT_PRESENT:
                return at
            if turns.by_index:
                turns.next = (turns.next + 1) % turns.nr
            at += 1
            continue
        nid = turns.nodes[turns.next]
        pfn = alloc_pages(mem, gfp, user.order, <int> nid, nodes, cpu)
        if pfn < 0:
            return at
        turns.next = (turns.next + 1) % turns.nr
        attach_page(mem, number, at, <pfn_t> pfn, user.order >= PAGEBLOCK_ORDER, flags)
        zone = page_zone(mem, <pfn_t> pfn)
        if zone.nid == nid:
            turns.hits[zone.index] += 1
        at += 1
    return end


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
    cdef int64_t i
    user._check(start, n)
    if nodes.shape[0] < 1 or not 0 <= first < nodes.shape[0] or hits.shape[0] < mem.nr_zones:
        raise ValueError(f"fault_in_turn: first {first} of {nodes.shape[0]} nodes")
    for i in range(nodes.shape[0]):
        if not 0 <= nodes[i] < mem.nr_nodes:
            raise ValueError(f"fault_in_turn: node {nodes[i]}")
    turns.nodes, turns.nr, turns.next, turns.by_index = &nodes[0], nodes.shape[0], first, by_index
    turns.hits = &hits[0]
    while at < end:
        till = min(at + CHUNK, end)
        if lru_make_room(mem, nodes_of(mem), till - at):
            raise MemoryError("fault_in_turn: LRU lists")
        with nogil:
            at = fault_chunk(mem, user.number, at, till, gfp, &turns, mask, cpu, <uint16_t> flags)
        if at < till:
            break
    return at - start, turns.next
