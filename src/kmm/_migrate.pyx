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
    NR_MAX_BATCHED_MIGRATION = 512  # base pages

# What became of each entry of a list; params.py has the same numbers.
cdef enum:
    MIGRATE_PENDING = 0
    MIGRATE_DONE = 1
    MIGRATE_AGAIN = 2               # held by somebody for the moment, or pinned
    MIGRATE_FAILED = 3
    MIGRATE_GONE = 4                # freed meanwhile

# How long a migration may wait; params.py has the same numbers.
cdef enum:
    MIGRATE_ASYNC = 0
    MIGRATE_SYNC_LIGHT = 1
    MIGRATE_SYNC = 2

# How pages are given targets, and how many of a list were tried in vain.
cdef struct migrate_control_t:
    uint32_t gfp
    int nid
    uint64_t nodes
    int cpu
    int mode
    bint force
    int64_t nr_left


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
            if is_orphaned(flags_of(mem, pfn)[0]):
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


cdef inline bint is_isolated(mem_t *mem, pfn_t pfn, folio_t *folio) noexcept nogil:
    """Whether an entry of a list is still somebody's, and isolated; it is read then."""
    return read_folio(mem, pfn, folio) and folio.flags[0] & PF_ISOLATED


cdef inline bint is_held(const folio_t *folio) noexcept nogil:
    """Whether a page has references beyond its user's, or is being written."""
    return folio.flags[0] & (PF_PINNED | PF_WRITEBACK) != 0


cdef inline bint keeps_apart(const mem_t *mem, pfn_t pfn, uint64_t nodes) noexcept nogil:
    """Whether a page that is freed cannot serve the next one's request: it lies on another node, or
    in a pageblock that nobody gets pages of."""
    return (not nodes >> page_zone(mem, pfn).nid & 1
            or get_pageblock_migratetype(mem, pfn) == MIGRATE_ISOLATE)


cdef int64_t migrate_small(mem_t *mem, const migrate_control_t *mc, const uint64_t *list,
                           uint8_t *status, int64_t n, uint64_t *to) noexcept nogil:
    """Move small pages, which come one after the other, as far as targets reach; entries done."""
    cdef uint64_t pfns[NR_MAX_BATCHED_MIGRATION]
    cdef folio_t folios[NR_MAX_BATCHED_MIGRATION]
    cdef int64_t k = 0, got, i, failed = 0
    while k < n and k < NR_MAX_BATCHED_MIGRATION and status[k] == MIGRATE_PENDING:
        if not is_isolated(mem, list[k], &folios[k]) or is_held(&folios[k]) or folios[k].huge:
            break
        k += 1
        # The kernel frees each page before it looks for the next one's place.
        if not keeps_apart(mem, list[k - 1], mc.nodes):
            break
    got = alloc_pages_bulk(mem, mc.gfp, 0, mc.nid, mc.nodes, mc.cpu, to, k)
    for i in range(got):
        prefetch(&mem.pages[to[i]])
    for i in range(got):
        move_folio(mem, &folios[i], to[i])
        status[i] = MIGRATE_DONE
        pfns[i] = list[i]
    free_pages_bulk(mem, pfns, got, 0, mc.cpu, &failed)
    mem.events[PGMIGRATE_SUCCESS] += got
    return got


cdef inline int64_t alloc_target(mem_t *mem, const migrate_control_t *mc, bint huge) noexcept nogil:
    """A page or a huge one to move to, if there is one at once (alloc_migration_target)."""
    if huge:
        return alloc_pages(mem, (mc.gfp & ~<uint32_t> GFP_BIT_RECLAIM) | GFP_TRANSHUGE,
                           PAGEBLOCK_ORDER, mc.nid, mc.nodes, mc.cpu)
    return alloc_pages(mem, mc.gfp, 0, mc.nid, mc.nodes, mc.cpu)


cdef bint migrate_huge(mem_t *mem, const migrate_control_t *mc, const folio_t *folio,
                       uint64_t *to) noexcept nogil:
    """Move a block of order 9 to one elsewhere; whether there was one."""
    cdef int64_t target = alloc_target(mem, mc, True)
    if target < 0:
        return False
    move_folio(mem, folio, <pfn_t> target)
    free_pages(mem, folio.pfn, PAGEBLOCK_ORDER, mc.cpu)
    to[0] = <uint64_t> target
    mem.events[PGMIGRATE_SUCCESS] += PAGEBLOCK_PAGES
    mem.events[THP_MIGRATION_SUCCESS] += 1
    return True


cdef bint try_held(mem_t *mem, const migrate_control_t *mc, const folio_t *folio,
                   uint8_t *status) noexcept nogil:
    """Try a page that cannot be moved now: its target is had, and given back; whether it was."""
    cdef int64_t target = alloc_target(mem, mc, folio.huge)
    if target < 0:
        return False
    free_pages(mem, <pfn_t> target, PAGEBLOCK_ORDER if folio.huge else 0, mc.cpu)
    status[0] = MIGRATE_AGAIN
    # Who may not wait for a writeback does not try again either.
    if folio.flags[0] & PF_WRITEBACK and mc.mode != MIGRATE_SYNC:
        status[0] = MIGRATE_FAILED
    return True


cdef int64_t migrate_list(mem_t *mem, migrate_control_t *mc, const uint64_t *list,
                          uint8_t *status, int64_t n, uint64_t *to) noexcept nogil:
    """Try pending entries once each; where no target was to be had or it is to wait, or n."""
    cdef int64_t i = 0, got
    cdef folio_t folio
    while i < n:
        if status[i] != MIGRATE_PENDING:
            i += 1
            continue
        if not is_isolated(mem, list[i], &folio):
            # A page that was let go meanwhile need not move: that is as good.
            status[i] = MIGRATE_GONE
            mem.events[PGMIGRATE_SUCCESS] += 1
            i += 1
            continue
        if is_held(&folio):
            if mc.force and mc.mode == MIGRATE_SYNC and folio.flags[0] & PF_WRITEBACK:
                return i
            if not try_held(mem, mc, &folio, &status[i]):
                return i
            mc.nr_left += 1
            i += 1
            continue
        if folio.huge:
            if not migrate_huge(mem, mc, &folio, &to[i]):
                return i
            status[i] = MIGRATE_DONE
            i += 1
            continue
        got = migrate_small(mem, mc, &list[i], &status[i], n - i, &to[i])
        if got == 0:
            return i
        i += got
    return n


cdef int64_t batch_end(const mem_t *mem, const uint64_t *list, int64_t i, int64_t n) noexcept nogil:
    """Where the batch that begins at an entry ends: before the one that would be too much."""
    cdef int64_t pages = 0
    while i < n:
        pages += PAGEBLOCK_PAGES if is_block_in_use(mem, list[i]) else 1
        if pages > NR_MAX_BATCHED_MIGRATION:
            break
        i += 1
    return i


cdef int set_up(migrate_control_t *mc, PageAllocator m, uint32_t gfp, int nid, uint64_t nodes,
                int cpu, int mode, bint force, int64_t n) except -1:
    mc.gfp, mc.nid, mc.nodes, mc.cpu = gfp, nid, nodes, cpu
    mc.mode, mc.force, mc.nr_left = mode, force, 0
    if lru_make_room(m.mem, nodes_of(m.mem), n):
        raise MemoryError("migrate_pages: LRU lists")
    return 0


def migrate_batches(PageAllocator m, const uint64_t[::1] pfns, uint8_t[::1] status, int64_t at,
                    uint32_t gfp, int nid, uint64_t nodes, int cpu, int mode, uint64_t[::1] to):
    """Try the pages of a list once each, batch after batch, up to a batch that needs more.

    :param pfns: isolated pages; status: a MIGRATE_* each; at: where the first batch begins.
    :param gfp: of the targets; nid, nodes: whose zonelist and which nodes may give them.
    :param mode: MIGRATE_ASYNC, _SYNC_LIGHT or _SYNC.
    :param to: where the pages went.
    :return: where that batch begins, where it ends, and the index of the page that no target was
        to be had for, or the batch's end; three times the list's length if no batch needs more.
    """
    cdef mem_t *mem = m.mem
    cdef int64_t n = pfns.shape[0], end = n, stopped = n
    cdef migrate_control_t mc
    if status.shape[0] != n or to.shape[0] != n or not 0 <= at <= n:
        raise ValueError("migrate_batches: arrays of different lengths")
    set_up(&mc, m, gfp, nid, nodes, cpu, mode, False, n - at)
    with nogil:
        while at < n:
            end = batch_end(mem, &pfns[0], at, n)
            stopped = at + migrate_list(mem, &mc, &pfns[at], &status[at], end - at, &to[at])
            if stopped < end or mc.nr_left:
                break
            at = end
    return at, end, stopped


def migrate_pages_once(PageAllocator m, const uint64_t[::1] pfns, uint8_t[::1] status, int64_t at,
                       int64_t end, uint32_t gfp, int nid, uint64_t nodes, int cpu, int mode,
                       bint force, uint64_t[::1] to):
    """Try to move the pending pages of a batch, from one of them on, once each.

    :param at, end: where to begin, and where the batch ends; the others as for migrate_batches.
    :param force: whether to stop at a page whose writeback may be waited for.
    :return: the index of that page or of one that no target was to be had for, or the end.
    """
    cdef int64_t n = pfns.shape[0], stopped
    cdef migrate_control_t mc
    if status.shape[0] != n or to.shape[0] != n or not 0 <= at <= end <= n:
        raise ValueError("migrate_pages_once: arrays of different lengths")
    if at == end:
        return end
    set_up(&mc, m, gfp, nid, nodes, cpu, mode, force, end - at)
    with nogil:
        stopped = at + migrate_list(m.mem, &mc, &pfns[at], &status[at], end - at, &to[at])
    return stopped


def count_moved(MemMap memmap, const uint8_t[::1] status, const uint64_t[::1] to):
    """Count what left a list: (base pages moved or let go meanwhile, huge ones moved)."""
    cdef mem_t *mem = &memmap.mem
    cdef int64_t i, moved = 0, huge = 0
    for i in range(status.shape[0]):
        if status[i] == MIGRATE_DONE and is_block_in_use(mem, to[i]):
            huge += 1
            moved += <int64_t> 1 << block_of(mem, to[i]).order
        elif status[i] == MIGRATE_DONE or status[i] == MIGRATE_GONE:
            moved += 1
    return moved, huge


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
