"""The swap device: slots for the content of pages that are not in memory (mm/swapfile.c).

It answers at once, as one of persistent memory does: a page that comes back gives its slot back,
and nothing stays in the swap cache.
"""
import numpy as np

from kmm._memmap cimport MemMap, page_zone
from kmm._memory cimport attach_page, detach_page

cdef enum:
    OWNER_SHIFT = 40


cdef int64_t free_cluster(const mem_t *mem) noexcept nogil:
    cdef const swap_t *swap = &mem.swap
    cdef int64_t n = (swap.nr_slots + 1) / SWAPFILE_CLUSTER, i
    cdef int64_t at = swap.cursor / SWAPFILE_CLUSTER
    for i in range(n):
        at = at + 1 if at + 1 < n else 0
        if swap.cluster[at] == 0:
            return at * SWAPFILE_CLUSTER
    return -1


cdef int64_t free_slot(mem_t *mem) noexcept nogil:
    """A free slot, from the cursor on; there has to be one."""
    cdef swap_t *swap = &mem.swap
    cdef int64_t at = swap.cursor
    while True:
        if at > swap.nr_slots:
            at = 1
        # What the device does not have counts as in use.
        if swap.cluster[at / SWAPFILE_CLUSTER] == SWAPFILE_CLUSTER:
            at = (at | (SWAPFILE_CLUSTER - 1)) + 1
            continue
        if not swap.owner[at]:
            swap.cursor = at + 1
            return at
        at += 1


cdef inline void take_slot(mem_t *mem, int64_t slot, int user, uint64_t index,
                           pfn_t pfn) noexcept nogil:
    cdef swap_t *swap = &mem.swap
    swap.owner[slot] = (<uint64_t> user << OWNER_SHIFT | index) + 1
    swap.cluster[slot / SWAPFILE_CLUSTER] += 1
    swap.nr_used += 1
    if mem.users[user].tokens:
        swap.tokens[slot] = mem.tokens[pfn]


cdef bint swap_out(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    cdef int64_t n = PAGEBLOCK_PAGES if folio.huge else 1, slot, i
    if nr_swap_pages(mem) < n:
        return False
    slot = free_cluster(mem) if folio.huge else free_slot(mem)
    if slot < 0:
        return False
    for i in range(n):
        take_slot(mem, slot + i, folio.user, folio.index + i, folio.pfn + i)
    detach_page(mem, folio)
    for i in range(n):
        user.slots[folio.index + i] = SLOT_SWAPPED | <uint64_t> (slot + i)
    user.nr_swapped += n
    node_stat_add(mem, zone, NR_VMSCAN_WRITE, n)
    node_stat_add(mem, zone, NR_WRITTEN, n)
    mem.events[PSWPOUT] += n
    if folio.huge:
        mem.events[THP_SPLIT_PMD] += 1
        mem.events[THP_SWPOUT] += 1
        mem.swap.cursor = slot
    return True


cdef void swap_in(mem_t *mem, int number, uint64_t index, pfn_t pfn, uint16_t flags) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef uint64_t slot = user.slots[index] & SLOT_PFN
    # The slot goes, so memory alone has it now.
    attach_page(mem, number, index, pfn, False, flags)
    if user.tokens:
        mem.tokens[pfn] = mem.swap.tokens[slot]
    swap_free(mem, slot)
    user.nr_swapped -= 1
    mem.events[PSWPIN] += 1
    if user.kind == USER_ANON or user.mapped:
        mem.events[PGFAULT] += 1
        mem.events[PGMAJFAULT] += 1


cdef class SwapDevice:
    """The machine's swap device.

    :param nr_pages: of the whole device; the first holds its header.
    """
    cdef MemMap memmap
    cdef readonly object owner      # uint64 array by slot: user << 40 | index, plus one; 0 if free
    cdef readonly object tokens
    cdef readonly object cluster

    def __init__(self, MemMap memmap, int64_t nr_pages):
        cdef uint64_t[::1] owner, tokens
        cdef uint16_t[::1] cluster
        if nr_pages < 2 or memmap.mem.swap.nr_slots:
            raise ValueError(f"SwapDevice: nr_pages {nr_pages}, or there is one already")
        nr_clusters = (nr_pages + SWAPFILE_CLUSTER - 1) // SWAPFILE_CLUSTER
        self.owner = np.zeros(nr_clusters * SWAPFILE_CLUSTER, dtype=np.uint64)
        self.tokens = np.zeros(nr_clusters * SWAPFILE_CLUSTER, dtype=np.uint64)
        self.cluster = np.zeros(nr_clusters, dtype=np.uint16)
        self.cluster[0] = 1
        self.cluster[nr_clusters - 1] += nr_clusters * SWAPFILE_CLUSTER - nr_pages
        owner, tokens, cluster = self.owner, self.tokens, self.cluster
        self.memmap = memmap
        memmap.mem.swap.owner, memmap.mem.swap.tokens = &owner[0], &tokens[0]
        memmap.mem.swap.cluster = &cluster[0]
        memmap.mem.swap.nr_slots, memmap.mem.swap.cursor = nr_pages - 1, 1

    @property
    def nr_slots(self):
        """How many pages it can hold."""
        return self.memmap.mem.swap.nr_slots

    @property
    def nr_used(self):
        """How many it holds."""
        return self.memmap.mem.swap.nr_used
