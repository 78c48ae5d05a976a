"""Finding used pages that can move, and moving them (mm/migrate.c, mm/memory_hotplug.c)."""
import numpy as np

from libc.string cimport memcpy, memset

from kmm._allocator cimport PageAllocator
from kmm._free_pages cimport free_pages, free_pages_bulk
from kmm._freelist cimport is_free_head, prefetch
from kmm._gfp cimport *
from kmm._memmap cimport MemMap, get_pageblock_migratetype
from kmm._memory cimport nodes_of, split_huge_page
from kmm._page_alloc cimport alloc_pages, alloc_pages_bulk
from kmm._page_owner cimport in_use_t, next_in_use
from kmm._swap cimport lru_add, lru_del, lru_make_room

cdef enum:
    EBUSY = 16
    ENOMEM = 12
    GROUP = 512                     # small pages that are given targets at once

# What became of each entry of a list; params.py has the same numbers.
cdef enum:
    MIGRATE_PENDING = 0
    MIGRATE_DONE = 1
    MIGRATE_AGAIN = 2               # held by somebody for the moment, or pinned
    MIGRATE_FAILED = 3
    MIGRATE_GONE = 4                # freed meanwhile


# -- which pages can move -----------------------------------------------------------------------

cdef inline bint can_move(const mem_t *mem, const folio_t *folio) noexcept nogil:
    """Whether what starts here is on an LRU list, a driver's to move, or hugetlb in use."""
    if folio.flags[0] & (PF_LRU | PF_MOVABLE_OPS):
        return True
    return (mem.users[folio.user].kind == USER_HUGETLB and folio.flags[0] & PF_ACTIVE != 0)


cdef inline bint skip_unused(const mem_t *mem, pfn_t *pfn) noexcept nogil:
    """Step over what is free or was never written to; whether there was something."""
    cdef int order = 0
    cdef const pageblock_t *block = block_of(mem, pfn[0])
    if is_free_head(mem, pfn[0], &order):
        pfn[0] += <pfn_t> 1 << order
        return True
    if (pfn[0] & (PAGEBLOCK_PAGES - 1)) == 0 and block.kind == KIND_PCP:
        pfn[0] += PAGEBLOCK_PAGES
        return True
    if block.kind != KIND_ALLOCATED and not block.state & BLOCK_DIRTY:
        pfn[0] = (pfn[0] | (PAGEBLOCK_PAGES - 1)) + 1
        return True
    return False


cdef int64_t scan_movable(mem_t *mem, pfn_t start, pfn_t end, pfn_t *blocked) noexcept nogil:
    cdef pfn_t pfn = start
    cdef folio_t folio
    while pfn < end:
        if skip_unused(mem, &pfn):
            continue
        if not read_folio(mem, pfn, &folio):
            if is_orphan(flags_of(mem, pfn)[0]):
                return <int64_t> pfn
            pfn += 1
            continue
        if can_move(mem, &folio):
            return <int64_t> pfn
        # A driver that dropped its reference to an offline page lets it go.
        if folio.flags[0] & PF_OFFLINE and (folio.huge or mem.states[pfn] & STATE_ALLOCATED):
            blocked[0] = pfn
            return -EBUSY
        pfn += <pfn_t> folio_nr_pages(mem, &folio)
    return -1


def scan_movable_pages(MemMap memmap, pfn_t start, pfn_t end):
    """Find the first page of a range that can be moved.

    :return: (its pfn, or -1 if there is none, or -16 if a driver holds an offline page;
        the pfn of that page).
    """
    cdef pfn_t blocked = 0
    cdef int64_t found
    with nogil:
        found = scan_movable(&memmap.mem, start, end, &blocked)
    return found, blocked


# -- isolating ----------------------------------------------------------------------------------

cdef void isolate_folio(mem_t *mem, const folio_t *folio) noexcept nogil:
    if folio.flags[0] & PF_LRU:
        lru_del(mem, page_zone(mem, folio.pfn), mem.users[folio.user].kind, folio.huge, folio.flags)
    folio.flags[0] |= PF_ISOLATED
    # The kernel counts one for a huge page too and takes 512 back when it is done, which leaves the
    # counter below 0; what it then shows is 0, as here.
    count_isolated(mem, folio, folio_nr_pages(mem, folio))


cdef void putback_folio(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef int kind = mem.users[folio.user].kind
    folio.flags[0] &= ~PF_ISOLATED
    count_isolated(mem, folio, -folio_nr_pages(mem, folio))
    if on_lru_kind(kind):
        lru_add(mem, page_zone(mem, folio.pfn), folio.pfn, kind, folio.huge, folio.flags)


def isolate_range(MemMap memmap, pfn_t start, pfn_t end, uint64_t[::1] out,
                  uint64_t[::1] refused):
    """Isolate all pages of a range that can move (the first half of do_migrate_range).

    :param out: room for the pfns of the isolated ones, in their order.
    :param refused: room for some pfns of used pages that cannot be isolated.
    :return: how many are isolated, and how many are refused.
    """
    cdef mem_t *mem = &memmap.mem
    cdef pfn_t pfn = start
    cdef int64_t n = 0, k = 0
    cdef folio_t folio
    cdef in_use_t row
    with nogil:
        while pfn < end and n < out.shape[0]:
            if skip_unused(mem, &pfn):
                continue
            if not read_folio(mem, pfn, &folio):
                pfn = next_in_use(mem, pfn, &row)
                if row.nr_pages and row.held and not row.flags & PF_HWPOISON:
                    if k < refused.shape[0]:
                        refused[k] = row.pfn
                    k += 1
                continue
            if folio.flags[0] & PF_HWPOISON:
                pass
            elif can_move(mem, &folio) and not folio.flags[0] & PF_ISOLATED:
                isolate_folio(mem, &folio)
                out[n] = pfn
                n += 1
            elif mem.users[folio.user].kind != USER_HUGETLB:
                if k < refused.shape[0]:
                    refused[k] = pfn
                k += 1
            pfn += <pfn_t> folio_nr_pages(mem, &folio)
    return n, k


def putback_movable_pages(MemMap memmap, const uint64_t[::1] pfns):
    """Give isolated pages back to their lists, first to last."""
    cdef int64_t i
    cdef folio_t folio
    if lru_make_room(&memmap.mem, nodes_of(&memmap.mem), pfns.shape[0]):
        raise MemoryError("putback_movable_pages: LRU lists")
    for i in range(pfns.shape[0]):
        if read_folio(&memmap.mem, pfns[i], &folio) and folio.flags[0] & PF_ISOLATED:
            putback_folio(&memmap.mem, &folio)


# -- moving -------------------------------------------------------------------------------------

cdef void move_folio(mem_t *mem, const folio_t *folio, pfn_t to) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    cdef zone_t *other = page_zone(mem, to)
    cdef uint16_t flags = folio.flags[0] & ~(PF_ISOLATED | PF_LRU)
    cdef uint16_t *where = &mem.blocks[to >> PAGEBLOCK_ORDER].flags
    cdef int64_t pages = folio_nr_pages(mem, folio)
    cdef int64_t i
    cdef uint64_t slot
    count_isolated(mem, folio, -pages)
    if user.kind == USER_ANON:
        # What the page table says of a page is lost with its entry, so the page says it itself.
        flags |= PF_DIRTY
    if folio.huge:
        block_of(mem, to).next = block_of(mem, to).prev = 0
        set_block_user(mem, block_of(mem, to), folio.user, folio.index)
    else:
        where = &mem.pages[to].flags
        set_page_user(&mem.pages[to], folio.user, folio.index)
        mem.states[to] |= STATE_MARKED
        mem.states[folio.pfn] &= <uint8_t> ~STATE_MARKED
    folio.flags[0] = 0
    where[0] = flags
    if zone != other:
        account_use(mem, zone, user, folio.huge, flags, -pages)
        account_use(mem, other, user, folio.huge, flags, pages)
    slot = (user.slots[folio.index] & ~SLOT_PFN) | to
    user.slots[folio.index] = slot
    if folio.huge and user.order == 0:
        for i in range(1, PAGEBLOCK_PAGES):
            user.slots[folio.index + i] = (user.slots[folio.index + i] & ~SLOT_PFN) | (to + i)
    if user.tokens:
        if pages == 1:
            mem.tokens[to] = mem.tokens[folio.pfn]
        else:
            memcpy(&mem.tokens[to], &mem.tokens[folio.pfn], pages * sizeof(uint64_t))
    if on_lru_kind(user.kind):
        lru_add(mem, other, to, user.kind, folio.huge, where)


cdef inline bint movable_now(mem_t *mem, pfn_t pfn, folio_t *folio, uint8_t *status) noexcept nogil:
    """Whether an entry of a list can be given a target; its status otherwise says why not."""
    if not read_folio(mem, pfn, folio) or not folio.flags[0] & PF_ISOLATED:
        status[0] = MIGRATE_GONE
        return False
    if folio.flags[0] & PF_PINNED:
        status[0] = MIGRATE_AGAIN
        return False
    return True


cdef inline bint keeps_apart(const mem_t *mem, pfn_t pfn, uint64_t nodes) noexcept nogil:
    """Whether a page that is freed cannot serve the next one's request: it lies on another node, or
    in a pageblock that nobody gets pages of."""
    return (not nodes >> page_zone(mem, pfn).nid & 1
            or get_pageblock_migratetype(mem, pfn) == MIGRATE_ISOLATE)


cdef int64_t migrate_small(mem_t *mem, const uint64_t *list, uint8_t *status, int64_t n,
                           uint32_t gfp, int nid, uint64_t nodes, int cpu,
                           uint64_t *to) noexcept nogil:
    """Move small pages, which come one after the other, as far as targets reach; entries done."""
    cdef uint64_t pfns[GROUP]
    cdef folio_t folios[GROUP]
    cdef int64_t k = 0, got, i, failed = 0
    while k < n and k < GROUP:
        if not movable_now(mem, list[k], &folios[k], &status[k]) or folios[k].huge:
            break
        k += 1
        # The kernel frees each page before it looks for the next one's place.
        if not keeps_apart(mem, list[k - 1], nodes):
            break
    if k == 0:
        return 0
    got = alloc_pages_bulk(mem, gfp, 0, nid, nodes, cpu, to, k)
    for i in range(got):
        prefetch(&mem.pages[to[i]])
    for i in range(got):
        move_folio(mem, &folios[i], to[i])
        status[i] = MIGRATE_DONE
        pfns[i] = list[i]
    free_pages_bulk(mem, pfns, got, 0, cpu, &failed)
    mem.events[PGMIGRATE_SUCCESS] += got
    return got


cdef bint migrate_huge(mem_t *mem, const folio_t *folio, uint32_t gfp, int nid, uint64_t nodes,
                       int cpu, uint64_t *to) noexcept nogil:
    """Move a block of order 9 to one elsewhere; whether there was one."""
    cdef int64_t target = alloc_pages(mem, (gfp & ~<uint32_t> GFP_BIT_RECLAIM) | GFP_TRANSHUGE,
                                      PAGEBLOCK_ORDER, nid, nodes, cpu)
    if target < 0:
        return False
    move_folio(mem, folio, <pfn_t> target)
    free_pages(mem, folio.pfn, PAGEBLOCK_ORDER, cpu)
    to[0] = <uint64_t> target
    mem.events[PGMIGRATE_SUCCESS] += PAGEBLOCK_PAGES
    mem.events[THP_MIGRATION_SUCCESS] += 1
    return True


cdef int64_t migrate_list(mem_t *mem, const uint64_t *list, uint8_t *status, int64_t n,
                          uint32_t gfp, int nid, uint64_t nodes, int cpu,
                          uint64_t *to) noexcept nogil:
    """Move pending entries of a list; the index where no target was to be had, or n."""
    cdef int64_t i = 0, run, got
    cdef folio_t folio
    while i < n:
        if status[i] != MIGRATE_PENDING or not movable_now(mem, list[i], &folio, &status[i]):
            i += 1
            continue
        if folio.huge:
            if not migrate_huge(mem, &folio, gfp, nid, nodes, cpu, &to[i]):
                return i
            status[i] = MIGRATE_DONE
            i += 1
            continue
        run = i + 1
        while run < n and run - i < GROUP and status[run] == MIGRATE_PENDING:
            run += 1
        got = migrate_small(mem, &list[i], &status[i], run - i, gfp, nid, nodes, cpu, &to[i])
        if got == 0:
            return i
        i += got
    return n


def migrate_pages_once(PageAllocator m, const uint64_t[::1] pfns, uint8_t[::1] status, int64_t at,
                       uint32_t gfp, int nid, uint64_t nodes, int cpu, uint64_t[::1] to):
    """Try to move the pending pages of a list, from one of them on, once each.

    :param pfns: isolated pages; status: a MIGRATE_* each; at: where to begin.
    :param gfp: of the targets; nid, nodes: whose zonelist and which nodes may give them.
    :param to: where the pages went.
    :return: the index of the page that no target was to be had for, or the list's length.
    """
    cdef mem_t *mem = m.mem
    cdef int64_t n = pfns.shape[0], stopped
    if status.shape[0] != n or to.shape[0] != n or not 0 <= at <= n:
        raise ValueError("migrate_pages_once: arrays of different lengths")
    if at == n:
        return n
    if lru_make_room(mem, nodes_of(mem), n - at):
        raise MemoryError("migrate_pages_once: LRU lists")
    with nogil:
        stopped = at + migrate_list(mem, &pfns[at], &status[at], n - at, gfp, nid, nodes, cpu,
                                    &to[at])
    return stopped


def count_outcome(MemMap memmap, const uint64_t[::1] pfns, const uint8_t[::1] status,
                  const uint64_t[::1] to):
    """Count what became of a list: (base pages moved, huge ones moved, base pages left, huge ones
    left, entries left)."""
    cdef mem_t *mem = &memmap.mem
    cdef int64_t i, moved = 0, huge = 0, failed = 0, huge_failed = 0, left = 0
    cdef int order
    for i in range(pfns.shape[0]):
        order = 0
        if status[i] == MIGRATE_DONE:
            if is_block_in_use(mem, to[i]):
                order = block_of(mem, to[i]).order
                huge += 1
            moved += <int64_t> 1 << order
        elif status[i] != MIGRATE_GONE:
            if is_block_in_use(mem, pfns[i]):
                order = block_of(mem, pfns[i]).order
                huge_failed += 1
            failed += <int64_t> 1 << order
            left += 1
    return moved, huge, failed, huge_failed, left


def migrate_to(PageAllocator m, pfn_t pfn, pfn_t to, int cpu, bint poison=False):
    """Move one isolated page to a block of its size that was handed out, and free it.

    :param poison: mark what is freed as broken, so that nobody gets it; of single pages.
    :return: whether it did; False if the page was let go meanwhile, so that ``to`` is not needed.
    """
    cdef folio_t folio, other
    cdef int order
    if lru_make_room(m.mem, nodes_of(m.mem), 1):
        raise MemoryError("migrate_to: LRU lists")
    if not read_folio(m.mem, pfn, &folio) or not folio.flags[0] & PF_ISOLATED:
        return False
    order = block_of(m.mem, pfn).order if folio.huge else m.mem.states[pfn] & STATE_ORDER
    if not m.memmap_engine_.is_allocated(to, order) or read_folio(m.mem, to, &other):
        raise ValueError(f"migrate_to: pfn {to:#x} is no unused block of order {order}")
    move_folio(m.mem, &folio, to)
    if poison:
        m.mem.pages[pfn].flags |= PF_HWPOISON
        m.mem.states[pfn] |= STATE_MARKED
    free_pages(m.mem, pfn, order, cpu)
    m.mem.events[PGMIGRATE_SUCCESS] += <int64_t> 1 << order
    if folio.huge:
        m.mem.events[THP_MIGRATION_SUCCESS] += 1
    return True


def split_isolated(PageAllocator m, pfn_t pfn):
    """Split an isolated block of order 9; its 512 pages are isolated then."""
    cdef folio_t folio
    if (not read_folio(m.mem, pfn, &folio) or not folio.huge
            or m.mem.users[folio.user].order):
        raise ValueError(f"split_isolated: pfn {pfn:#x} is no block of order 9")
    split_huge_page(m.mem, &folio)
