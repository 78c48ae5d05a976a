"""The fragmenter's engine: free blocks become pages of users, and chosen pages go again."""
from kmm._allocator cimport PageAllocator
from kmm._buddy cimport BuddyZone
from kmm._free_pages cimport free_pages_bulk
from kmm._freelist cimport (add_to_free_list, block_mt, block_of, del_page_from_free_list,
                            is_free_head, mark_allocated, mark_dirty, prefetch)
from kmm._memmap cimport section_online
from kmm._memory cimport PageUser, attach_page, detach_page, nodes_of
from kmm._rmap cimport *
from kmm._swap cimport lru_make_room
from kmm._types cimport *

cdef enum:
    CHUNK = 512
    AHEAD = 16


cdef mem_t *changeable(PageAllocator m) except NULL:
    if m.mem.journal != NULL:
        raise ValueError("fragment: pages of users do not change inside a chain of records")
    return m.mem


def take_free(PageAllocator m, BuddyZone zone, const uint64_t[::1] heads, uint64_t[::1] out):
    """Hand out free blocks, whatever the zone's watermarks say, page by page.

    :param heads: where free blocks start; out: room for all their pages.
    :return: how many pages there were.
    """
    cdef mem_t *mem = changeable(m)
    cdef int64_t i, n = 0
    cdef int order = 0
    cdef pfn_t pfn, head
    for i in range(heads.shape[0]):
        head = heads[i]
        if not is_free_head(mem, head, &order) or n + (1 << order) > out.shape[0]:
            raise ValueError(f"take_free: pfn {head:#x}")
        if block_mt(mem, head, order) != MIGRATE_ISOLATE:
            zone.z.nr_free_pages -= <int64_t> 1 << order
        del_page_from_free_list(mem, &zone.z, head, order)
        for pfn in range(head, head + (<pfn_t> 1 << order)):
            mark_dirty(mem, pfn)
            mark_allocated(mem, pfn, 0)
            out[n] = pfn
            n += 1
    return n


def split_free(PageAllocator m, BuddyZone zone, const uint64_t[::1] heads):
    """Split free blocks of order 10 in two, so that one of each can be taken."""
    cdef mem_t *mem = changeable(m)
    cdef int64_t i
    cdef int order = 0, mt
    for i in range(heads.shape[0]):
        if not is_free_head(mem, heads[i], &order) or order != MAX_ORDER - 1:
            raise ValueError(f"split_free: pfn {heads[i]:#x}")
        mt = block_mt(mem, heads[i], order)
        del_page_from_free_list(mem, &zone.z, heads[i], order)
        add_to_free_list(mem, &zone.z, heads[i] + PAGEBLOCK_PAGES, PAGEBLOCK_ORDER, mt, False)
        add_to_free_list(mem, &zone.z, heads[i], PAGEBLOCK_ORDER, mt, False)


def attach_many(PageAllocator m, PageUser user, int64_t start, const uint64_t[::1] pfns,
                int flags=0):
    """Make pages that were handed out those of absent slots from start on."""
    cdef mem_t *mem = changeable(m)
    cdef int64_t i, n = pfns.shape[0]
    user._check(start, n)
    if user.slots[start:start + n].any() or user.user.order:
        raise ValueError(f"attach_many: slots {start}+{n}")
    if lru_make_room(mem, nodes_of(mem), n):
        raise MemoryError("attach_many: LRU lists")
    with nogil:
        for i in range(n):
            if i + AHEAD < n:
                prefetch(&mem.pages[pfns[i + AHEAD]])
            attach_page(mem, user.number, start + i, pfns[i], False, <uint16_t> flags)


cdef inline bint is_small(const user_t *user, int64_t index) noexcept nogil:
    return (0 <= index < <int64_t> user.nr_slots and user.slots[index] & SLOT_PRESENT
            and not user.slots[index] & SLOT_HUGE)


def release_slots(PageAllocator m, PageUser user, const int64_t[::1] indices, int cpu):
    """Free the pages of chosen slots, in the order given.

    :return: pages freed.
    """
    cdef mem_t *mem = changeable(m)
    cdef int64_t i, n = 0, failed = 0
    cdef uint64_t pfns[CHUNK]
    cdef folio_t folio
    for i in range(indices.shape[0]):
        if not is_small(&user.user, indices[i]):
            raise ValueError(f"release_slots: slot {indices[i]}")
    with nogil:
        for i in range(indices.shape[0]):
            if i + AHEAD < indices.shape[0]:
                prefetch(&mem.pages[user.user.slots[indices[i + AHEAD]] & SLOT_PFN])
            read_folio(mem, user.user.slots[indices[i]] & SLOT_PFN, &folio)
            detach_page(mem, &folio)
            user.user.slots[indices[i]] = 0
            forget_written(&user.user, indices[i], 1)
            pfns[n] = folio.pfn
            n += 1
            if n == CHUNK:
                free_pages_bulk(mem, pfns, n, 0, cpu, &failed)
                n = 0
        free_pages_bulk(mem, pfns, n, 0, cpu, &failed)
    return indices.shape[0]


def hand_over(PageAllocator m, PageUser user, const int64_t[::1] indices, PageUser other,
              int64_t start):
    """Make the pages of chosen slots another user's, from its slot start on."""
    cdef mem_t *mem = changeable(m)
    cdef int64_t i, n = indices.shape[0]
    cdef folio_t folio
    other._check(start, n)
    for i in range(n):
        if not is_small(&user.user, indices[i]) or other.user.slots[start + i]:
            raise ValueError(f"hand_over: slot {indices[i]} to {start + i}")
    if lru_make_room(mem, nodes_of(mem), n):
        raise MemoryError("hand_over: LRU lists")
    for i in range(n):
        read_folio(mem, user.user.slots[indices[i]] & SLOT_PFN, &folio)
        detach_page(mem, &folio)
        user.user.slots[indices[i]] = 0
        forget_written(&user.user, indices[i], 1)
        attach_page(mem, other.number, start + i, folio.pfn, False, 0)


# -- measuring --------------------------------------------------------------------------------

cdef bint holds_unmovable(const mem_t *mem, pfn_t start) noexcept nogil:
    """Whether some page of a pageblock is used and can neither be moved nor reclaimed."""
    cdef const pageblock_t *block = block_of(mem, start)
    cdef int fill = block.state & BLOCK_FILL, order = 0
    cdef uint8_t state
    cdef pfn_t pfn = start, end = start + PAGEBLOCK_PAGES
    if block.kind == KIND_ALLOCATED:
        return not block.flags & (PF_LRU | PF_MOVABLE_OPS)
    if block.kind != KIND_NONE:
        return False
    if not block.state & BLOCK_DIRTY:
        if start & PAGEBLOCK_PAGES and block_of(mem, start - PAGEBLOCK_PAGES).order > PAGEBLOCK_ORDER:
            block = block_of(mem, start - PAGEBLOCK_PAGES)
            return (block.kind == KIND_ALLOCATED
                    and not block.flags & (PF_LRU | PF_MOVABLE_OPS))
        return fill != FILL_NONE
    while pfn < end:
        state = mem.states[pfn]
        if is_free_head(mem, pfn, &order):
            pfn += <pfn_t> 1 << order
            continue
        if state & STATE_PCP:
            pfn += <pfn_t> 1 << (state & 3)
            continue
        if mem.pages[pfn].flags & PF_RESERVED:
            return True
        if state & STATE_ALLOCATED:
            if not mem.pages[pfn].flags & (PF_LRU | PF_MOVABLE_OPS):
                return True
            pfn += <pfn_t> 1 << (state & STATE_ORDER)
            continue
        if fill != FILL_NONE and mem.pages[pfn].flags == 0:
            return True
        pfn += 1
    return False


def unmovable_pageblocks(PageAllocator m, BuddyZone zone):
    """Return how many pageblocks of a zone hold an unmovable page, and how many it has."""
    cdef const mem_t *mem = m.mem
    cdef pfn_t pfn = zone.z.zone_start_pfn & ~<pfn_t> (PAGEBLOCK_PAGES - 1)
    cdef pfn_t end = zone.z.zone_start_pfn + zone.z.spanned_pages
    cdef int64_t held = 0, total = 0
    with nogil:
        while pfn < end:
            if section_online(mem, pfn) and block_of(mem, pfn).zone == zone.z.index + 1:
                total += 1
                held += holds_unmovable(mem, pfn)
            pfn += PAGEBLOCK_PAGES
    return held, total
