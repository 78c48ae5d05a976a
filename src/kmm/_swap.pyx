"""LRU lists: rings of entries, of which those count whose tag their page bears (mm/swap.c)."""
from libc.stdlib cimport realloc

from kmm._freelist cimport prefetch

cdef enum:
    ENOMEM = 12
    AHEAD = 16                      # entries whose records are fetched before they are needed
    SMALLEST_ROOM = 1024
    MOST_ENTRIES = 1 << 30          # on one list: as many as there are tags

cdef uint64_t PFN_MASK = (<uint64_t> 1 << (64 - LRU_TAG_BITS)) - 1


cdef inline bint entry_counts(mem_t *mem, int nid, int lru, uint64_t entry,
                              folio_t *folio) noexcept nogil:
    """Whether the page of an entry is still on this list by it."""
    if not read_folio(mem, entry & PFN_MASK, folio) or not folio.flags[0] & PF_LRU:
        return False
    return (folio_tag(mem, folio) == entry >> (64 - LRU_TAG_BITS)
            and lru_of(mem.users[folio.user].kind, folio.flags[0]) == lru
            and page_zone(mem, folio.pfn).nid == nid)


cdef void drop_stale(mem_t *mem, int nid, int lru) noexcept nogil:
    """Close the gaps that pages have left, and give all entries new tags in their order."""
    cdef lru_list_t *lst = &mem.nodes[nid].lru[lru]
    cdef uint64_t at, to = lst.tail, entry
    cdef uint32_t tag
    cdef folio_t folio
    for at in range(lst.tail, lst.head):
        entry = lst.ring[at & (lst.room - 1)]
        if not entry_counts(mem, nid, lru, entry, &folio):
            continue
        tag = <uint32_t> to & ((<uint32_t> 1 << LRU_TAG_BITS) - 1)
        lst.ring[to & (lst.room - 1)] = folio.pfn | <uint64_t> tag << (64 - LRU_TAG_BITS)
        if folio.huge:
            set_block_tag(block_of(mem, folio.pfn), tag)
        else:
            set_page_tag(&mem.pages[folio.pfn], tag)
        to += 1
    lst.head = to


cdef int grow(lru_list_t *lst, uint64_t room) noexcept nogil:
    """Enlarge a ring to a larger power of two; a large one is moved by the host, not copied."""
    cdef uint64_t *ring = <uint64_t *> realloc(lst.ring, room * sizeof(uint64_t))
    cdef uint64_t at
    if ring == NULL:
        return -ENOMEM
    # Entries of later rounds lay where those of earlier ones were.
    for at in range(lst.tail, lst.head):
        if at & (room - 1) != at & (lst.room - 1):
            ring[at & (room - 1)] = ring[at & (lst.room - 1)]
    lst.ring, lst.room = ring, room
    return 0


cdef int lru_make_room(mem_t *mem, uint64_t nodes, int64_t n) noexcept nogil:
    cdef int nid, lru, rc
    cdef uint64_t room
    cdef lru_list_t *lst
    if n >= MOST_ENTRIES:
        return -ENOMEM
    for nid in range(mem.nr_nodes):
        if not nodes >> nid & 1:
            continue
        for lru in range(NR_LRU_LISTS):
            lst = &mem.nodes[nid].lru[lru]
            if lst.head - lst.tail + n <= lst.room:
                continue
            # Half of what is there has left: closing the gaps is cheaper than more memory.
            if (lst.head - lst.tail > 2 * lst.nr_live
                    or lst.head - lst.tail + n > MOST_ENTRIES):
                drop_stale(mem, nid, lru)
            room = lst.room or SMALLEST_ROOM
            # A tag must not come round while an entry is there that bears it.
            if lst.head - lst.tail + n > MOST_ENTRIES:
                return -ENOMEM
            while lst.head - lst.tail + n > room:
                room *= 2
            if room > lst.room:
                rc = grow(lst, room)
                if rc:
                    return rc
    return 0


cdef bint lru_pop_until(mem_t *mem, int nid, int lru, uint64_t end, folio_t *folio) noexcept nogil:
    cdef lru_list_t *lst = &mem.nodes[nid].lru[lru]
    cdef uint64_t entry
    while lst.tail < end:
        if lst.tail + AHEAD < lst.head:
            prefetch(&mem.pages[lst.ring[(lst.tail + AHEAD) & (lst.room - 1)] & PFN_MASK])
        entry = lst.ring[lst.tail & (lst.room - 1)]
        lst.tail += 1
        if entry_counts(mem, nid, lru, entry, folio):
            lru_del(mem, page_zone(mem, folio.pfn), mem.users[folio.user].kind, folio.huge,
                    folio.flags)
            return True
    return False


cdef bint lru_pop(mem_t *mem, int nid, int lru, folio_t *folio) noexcept nogil:
    return lru_pop_until(mem, nid, lru, mem.nodes[nid].lru[lru].head, folio)


# -- pages that change their place ----------------------------------------------------------------

cdef void lru_add_tail(mem_t *mem, zone_t *zone, const folio_t *folio, int kind) noexcept nogil:
    """Put a page where the next one is taken; it has to be evictable."""
    cdef int lru = lru_of(kind, folio.flags[0])
    cdef lru_list_t *lst = &mem.nodes[zone.nid].lru[lru]
    cdef uint32_t tag
    if lst.tail == 0:
        # Nothing was ever taken from this list.
        lru_add(mem, zone, folio.pfn, kind, folio.huge, folio.flags)
        return
    lst.tail -= 1
    tag = <uint32_t> lst.tail & ((<uint32_t> 1 << LRU_TAG_BITS) - 1)
    lst.ring[lst.tail & (lst.room - 1)] = folio.pfn | <uint64_t> tag << (64 - LRU_TAG_BITS)
    lst.nr_live += 1
    folio.flags[0] |= PF_LRU
    lru_size_add(mem, zone, lru, pages_of_use(folio))
    if folio.huge:
        set_block_tag(block_of(mem, folio.pfn), tag)
    else:
        set_page_tag(&mem.pages[folio.pfn], tag)


cdef void mark_page_accessed(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef uint16_t *flags = folio.flags
    cdef int kind = mem.users[folio.user].kind
    cdef zone_t *zone
    if not flags[0] & PF_REFERENCED:
        flags[0] |= PF_REFERENCED
    elif not flags[0] & (PF_ACTIVE | PF_MLOCKED):
        flags[0] &= ~PF_REFERENCED
        if flags[0] & PF_LRU:
            zone = page_zone(mem, folio.pfn)
            lru_del(mem, zone, kind, folio.huge, flags)
            flags[0] |= PF_ACTIVE
            lru_add(mem, zone, folio.pfn, kind, folio.huge, flags)
            mem.events[PGACTIVATE] += pages_of_use(folio)


cdef void folio_rotate_reclaimable(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef int kind = mem.users[folio.user].kind
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    if folio.flags[0] & (PF_LRU | PF_DIRTY | PF_MLOCKED) != PF_LRU:
        return
    lru_del(mem, zone, kind, folio.huge, folio.flags)
    folio.flags[0] &= ~PF_ACTIVE
    lru_add_tail(mem, zone, folio, kind)
    mem.events[PGROTATED] += pages_of_use(folio)


cdef void deactivate_file_folio(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    cdef uint16_t *flags = folio.flags
    if flags[0] & (PF_LRU | PF_MLOCKED) != PF_LRU or user.mapped:
        return
    lru_del(mem, zone, user.kind, folio.huge, flags)
    if flags[0] & PF_ACTIVE:
        mem.events[PGDEACTIVATE] += pages_of_use(folio)
    flags[0] &= ~(PF_ACTIVE | PF_REFERENCED)
    if flags[0] & (PF_DIRTY | PF_WRITEBACK):
        lru_add(mem, zone, folio.pfn, user.kind, folio.huge, flags)
        user.slots[folio.index] |= SLOT_RECLAIM
    else:
        lru_add_tail(mem, zone, folio, user.kind)
        mem.events[PGROTATED] += pages_of_use(folio)
