"""Pages that are read and written: page cache, its writeback and its dropping.

Models mm/filemap.c, mm/page-writeback.c and mm/truncate.c; shmem and anonymous pages are touched
here too, as what the swap device has of them comes back in the same way.
"""
from libc.string cimport memcpy, memset

from kmm._allocator cimport PageAllocator
from kmm._free_pages cimport free_pages, free_pages_bulk
from kmm._memmap cimport page_zone
from kmm._memory cimport (PageUser, attach_page, detach_page, kswapd_pending, nodes_of,
                          sow_tokens, split_huge_page)
from kmm._page_alloc cimport alloc_pages_bulk
from kmm._swap cimport (deactivate_file_folio, folio_rotate_reclaimable, lru_make_room,
                        mark_page_accessed)
from kmm._swapfile cimport swap_in

cdef enum:
    ENOMEM = 12
    CHUNK = 512
    KIB_PER_PAGE = 4                # pgpgin and pgpgout are shown in KiB


cdef inline bint has_page_table_entries(const user_t *user) noexcept nogil:
    return user.kind == USER_ANON or user.mapped


cdef inline void read_slot(mem_t *mem, const user_t *user, int64_t at, folio_t *folio) noexcept nogil:
    """What holds the page of a slot that has one."""
    cdef pfn_t pfn = user.slots[at] & SLOT_PFN
    if user.slots[at] & SLOT_HUGE:
        pfn &= ~<pfn_t> (PAGEBLOCK_PAGES - 1)
    read_folio(mem, pfn, folio)


# -- writing back -----------------------------------------------------------------------------------

cdef inline void count_writeback(mem_t *mem, zone_t *zone, int64_t pages) noexcept nogil:
    node_stat_add(mem, zone, NR_WRITEBACK, pages)
    zone.stat[NR_ZONE_WRITE_PENDING] += pages


cdef void start_writeback(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    cdef int64_t n = pages_of_use(folio)
    folio.flags[0] = (folio.flags[0] & ~PF_DIRTY) | PF_WRITEBACK
    count_dirty(mem, zone, user, -n)
    count_writeback(mem, zone, n)
    if user.store != NULL:
        memcpy(&user.store[folio.index], &mem.tokens[folio.pfn], n * sizeof(uint64_t))
    mem.events[PGPGOUT] += KIB_PER_PAGE * n


cdef void folio_end_writeback(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    folio.flags[0] &= ~PF_WRITEBACK
    count_writeback(mem, zone, -pages_of_use(folio))
    node_stat_add(mem, zone, NR_WRITTEN, pages_of_use(folio))
    if user.slots[folio.index] & SLOT_RECLAIM:
        user.slots[folio.index] &= ~SLOT_RECLAIM
        folio_rotate_reclaimable(mem, folio)


cdef int64_t write_range(mem_t *mem, int number, int64_t start, int64_t end, int64_t limit,
                         bint waits, int64_t *written) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef int64_t at = start
    cdef folio_t folio
    while at < end and written[0] < limit and user.nr_dirty:
        if not user.slots[at] & SLOT_PRESENT:
            at += 1
            continue
        if (at & (CHUNK - 1)) == 0 or at == start:
            if lru_make_room(mem, nodes_of(mem), CHUNK):
                return -ENOMEM
        read_slot(mem, user, at, &folio)
        if folio.flags[0] & (PF_DIRTY | PF_WRITEBACK) == PF_DIRTY:
            start_writeback(mem, &folio)
            if waits:
                folio_end_writeback(mem, &folio)
            written[0] += pages_of_use(&folio)
        at = <int64_t> folio.index + pages_of_use(&folio)
    return min(at, end) if user.nr_dirty else end


def write_cache_pages(PageUser user, PageAllocator m, int64_t start, int64_t n,
                      int64_t nr_to_write, bint waits):
    """Write dirty pages of a range of a file to its backing store, upward.

    :param start: first index; n: pages; nr_to_write: stop after so many.
    :param waits: whether the store has them when this returns; else they are under writeback.
    :return: (pages written, the index to go on from).
    """
    cdef mem_t *mem = user._mem(m)
    cdef int64_t written = 0, at
    user._check(start, n)
    with nogil:
        at = write_range(mem, user.number, start, start + n, nr_to_write, waits, &written)
    if at < 0:
        raise MemoryError("write_cache_pages: LRU lists")
    return written, at


def end_writeback(PageUser user, PageAllocator m, int64_t start, int64_t n):
    """Let the backing store have what is under writeback in a range; pages that were."""
    cdef mem_t *mem = user._mem(m)
    cdef int64_t at = start, done = 0
    cdef folio_t folio
    user._check(start, n)
    while at < start + n:
        if not user.user.slots[at] & SLOT_PRESENT:
            at += 1
            continue
        read_slot(mem, &user.user, at, &folio)
        if folio.flags[0] & PF_WRITEBACK:
            if lru_make_room(mem, nodes_of(mem), 1):
                raise MemoryError("end_writeback: LRU lists")
            folio_end_writeback(mem, &folio)
            done += pages_of_use(&folio)
        at = <int64_t> folio.index + pages_of_use(&folio)
    return done


# -- reading and writing ----------------------------------------------------------------------------

cdef void touch_present(mem_t *mem, user_t *user, int64_t at, bint write) noexcept nogil:
    cdef folio_t folio
    read_slot(mem, user, at, &folio)
    if has_page_table_entries(user):
        user.slots[folio.index] |= SLOT_YOUNG
    elif not write or user.kind == USER_SHMEM:
        # Who only writes a file does not show that anybody wants to read it.
        mark_page_accessed(mem, &folio)
    if write and user.kind != USER_ANON:
        set_page_dirty(mem, &folio)
    if write and user.seed:
        sow_tokens(mem, user, folio.index, folio.pfn, pages_of_use(&folio))


cdef uint16_t new_flags(const user_t *user, bint write) noexcept nogil:
    """The marks of a page that comes because it is read or written."""
    cdef uint16_t flags = 0
    if user.kind == USER_SHMEM or (write and user.kind == USER_FILE):
        flags |= PF_DIRTY
    if not has_page_table_entries(user) and (not write or user.kind == USER_SHMEM):
        flags |= PF_REFERENCED
    return flags


cdef void bring_one(mem_t *mem, int number, int64_t at, pfn_t pfn, bint write) noexcept nogil:
    cdef user_t *user = mem.users[number]
    if user.slots[at] & SLOT_SWAPPED:
        swap_in(mem, number, at, pfn, new_flags(user, write))
        return
    attach_page(mem, number, at, pfn, False, new_flags(user, write))
    if user.kind == USER_FILE and not write:
        mem.events[PGPGIN] += KIB_PER_PAGE
        if user.mapped:
            mem.events[PGFAULT] += 1
            mem.events[PGMAJFAULT] += 1


cdef inline bint stays_absent(const user_t *user, int64_t at, bint write) noexcept nogil:
    """Whether a page that has no content needs no memory: it is read as zeros."""
    return not write and user.kind != USER_FILE and not user.slots[at]


cdef int64_t touch_range(mem_t *mem, int number, int64_t start, int64_t end, bint write,
                         uint32_t gfp, int nid, uint64_t nodes, int cpu) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef int64_t at = start, run, got, i
    cdef uint64_t pfns[CHUNK]
    while at < end:
        if lru_make_room(mem, nodes_of(mem), CHUNK):
            return -ENOMEM
        run = 0
        while at < end and run < CHUNK and (user.slots[at] & SLOT_PRESENT
                                            or stays_absent(user, at, write)):
            if user.slots[at] & SLOT_HUGE:
                touch_present(mem, user, at, write)
                at = (at | (PAGEBLOCK_PAGES - 1)) + 1
            else:
                if user.slots[at]:
                    touch_present(mem, user, at, write)
                at += 1
            run += 1
        if at >= end:
            break
        if run:
            continue
        while (run < CHUNK and at + run < end and not user.slots[at + run] & SLOT_PRESENT
               and not stays_absent(user, at + run, write)):
            run += 1
        got = alloc_pages_bulk(mem, gfp, 0, nid, nodes, cpu, pfns, run)
        for i in range(got):
            bring_one(mem, number, at + i, pfns[i], write)
        at += got
        if got < run or kswapd_pending(mem):
            break
    return min(at, end) - start


def touch(PageUser user, PageAllocator m, int64_t start, int64_t n, bint write, uint32_t gfp,
          int nid, uint64_t nodes, int cpu):
    """Read or write pages of a range, upward; those not in memory come from where they are.

    Runs without the GIL.

    :param gfp, nid, nodes, cpu: as for PageUser.fault_in.
    :return: slots passed: n, or fewer if there was no memory for the next, or a kswapd was woken,
        who should do its work now.
    """
    cdef mem_t *mem = user._mem(m)
    cdef int64_t done
    user._check(start, n)
    if not on_lru_kind(user.user.kind):
        raise ValueError("touch: pages of this user are not read and written")
    with nogil:
        done = touch_range(mem, user.number, start, start + n, write, gfp, nid, nodes, cpu)
    if done < 0:
        raise MemoryError("touch: LRU lists")
    return done


def bring_in(PageUser user, PageAllocator m, int64_t index, pfn_t pfn, bint write):
    """Make a page that was handed out the page of a slot that is read or written."""
    cdef mem_t *mem = user._mem(m)
    user._check(index, 1)
    if user.user.slots[index] & SLOT_PRESENT or not m.memmap_engine_.is_allocated(pfn, 0):
        raise ValueError(f"bring_in: slot {index}, pfn {pfn:#x}")
    if lru_make_room(mem, nodes_of(mem), 1):
        raise MemoryError("bring_in: LRU lists")
    bring_one(mem, user.number, index, pfn, write)


def write_present(PageUser user, PageAllocator m, int64_t start, int64_t n):
    """Write those pages of a range of a file that are in memory.

    Runs without the GIL.
    """
    cdef mem_t *mem = user._mem(m)
    cdef int64_t at = start
    cdef folio_t folio
    user._check(start, n)
    if user.user.kind != USER_FILE:
        raise ValueError("write_present: not of a file")
    with nogil:
        while at < start + n:
            if not user.user.slots[at] & SLOT_PRESENT:
                at += 1
                continue
            touch_present(mem, &user.user, at, True)
            read_slot(mem, &user.user, at, &folio)
            at = <int64_t> folio.index + pages_of_use(&folio)


# -- dropping ---------------------------------------------------------------------------------------

cdef int64_t invalidate(mem_t *mem, int number, int64_t start, int64_t end, int cpu) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef int64_t at = start, freed = 0, n = 0, failed
    cdef uint64_t pfns[CHUNK]
    cdef folio_t folio
    while at < end:
        if not user.slots[at] & SLOT_PRESENT:
            at += 1
            continue
        read_slot(mem, user, at, &folio)
        if folio.huge and (at & (PAGEBLOCK_PAGES - 1) or at + PAGEBLOCK_PAGES > end):
            if lru_make_room(mem, nodes_of(mem), PAGEBLOCK_PAGES + 1):
                break
            split_huge_page(mem, &folio)
            continue
        at += pages_of_use(&folio)
        if (folio.flags[0] & (PF_DIRTY | PF_WRITEBACK | PF_PINNED | PF_MLOCKED | PF_HWPOISON
                              | PF_ISOLATED) or user.mapped or user.kind == USER_SHMEM):
            if lru_make_room(mem, nodes_of(mem), 1):
                break
            deactivate_file_folio(mem, &folio)
            continue
        detach_page(mem, &folio)
        memset(&user.slots[folio.index], 0, pages_of_use(&folio) * sizeof(uint64_t))
        freed += pages_of_use(&folio)
        if folio.huge:
            free_pages(mem, folio.pfn, PAGEBLOCK_ORDER, cpu)
            continue
        pfns[n] = folio.pfn
        n += 1
        if n == CHUNK:
            free_pages_bulk(mem, pfns, n, 0, cpu, &failed)
            n = 0
    free_pages_bulk(mem, pfns, n, 0, cpu, &failed)
    return freed


def invalidate_mapping_pages(PageUser user, PageAllocator m, int64_t start, int64_t n, int cpu):
    """Drop pages of a file that its backing store has too; the others become inactive.

    Pages that are dirty, under writeback, mapped or held stay.

    :return: pages dropped.
    """
    cdef mem_t *mem = user._mem(m)
    cdef int64_t freed
    user._check(start, n)
    if user.user.kind != USER_FILE and user.user.kind != USER_SHMEM:
        raise ValueError("invalidate_mapping_pages: not of a file")
    with nogil:
        freed = invalidate(mem, user.number, start, start + n, cpu)
    return freed
