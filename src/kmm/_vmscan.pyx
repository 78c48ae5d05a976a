"""Reclaim's work on a node's LRU lists (mm/vmscan.c)."""
from libc.string cimport memset

from kmm._allocator cimport PageAllocator
from kmm._filemap cimport folio_end_writeback, start_writeback
from kmm._free_pages cimport free_pages, free_pages_bulk
from kmm._gfp cimport *
from kmm._memmap cimport page_zone
from kmm._memory cimport detach_page, kswapd_pending, split_huge_page
from kmm._rmap cimport *
from kmm._swap cimport lru_add, lru_make_room, lru_pop_until
from kmm._swapfile cimport free_cluster, nr_swap_pages, swap_out
from kmm._types cimport *

cdef enum:
    ENOMEM = 12
    SWAP_CLUSTER_MAX = 32
    DEF_PRIORITY = 12
    PAGES_PER_GIB_SHIFT = 18
    # One batch's pages on a list: 31 small ones, and a block of order 9 that is split.
    ROOM_FOR_BATCH = 1024

# Which lists get_scan_count lets be scanned.
cdef enum:
    SCAN_EQUAL = 0
    SCAN_FRACT = 1
    SCAN_ANON = 2
    SCAN_FILE = 3

cdef enum:
    DEACTIVATE_ANON = 1
    DEACTIVATE_FILE = 2

# What a page's references say, and what becomes of it.
cdef enum:
    FOLIOREF_RECLAIM = 0
    FOLIOREF_RECLAIM_CLEAN = 1
    FOLIOREF_KEEP = 2
    FOLIOREF_ACTIVATE = 3

cdef enum:
    FOLIO_KEEP = 0
    FOLIO_ACTIVATE = 1
    FOLIO_FREE = 2                  # nobody's now, to be freed

# struct scan_control, and what is counted of one batch (struct reclaim_stat)
cdef struct scan_control_t:
    int nid
    int cpu
    int priority
    int reclaim_idx
    int kswapd
    uint32_t gfp
    int may_writepage
    int may_swap
    int may_deactivate
    int force_deactivate
    int skipped_deactivate
    int cache_trim_mode
    int file_is_tiny
    int wakeup_flushers
    int64_t swappiness
    int64_t nr_to_reclaim
    int64_t nr_scanned
    int64_t nr_reclaimed
    int64_t dirty
    int64_t unqueued_dirty
    int64_t congested
    int64_t writeback
    int64_t immediate
    int64_t taken
    int64_t file_taken
    int64_t batch_unqueued_dirty
    int64_t batch_pageout
    int64_t batch_reclaimed
    int64_t nr_free                 # of the next
    uint64_t to_free[PAGEBLOCK_PAGES]


# -- taking pages off a list ------------------------------------------------------------------------

cdef int isolate_lru_folios(mem_t *mem, scan_control_t *sc, int lru, int64_t nr_to_scan,
                            folio_t *out, int64_t *nr_scanned, int64_t *nr_taken) noexcept nogil:
    """Take the oldest pages of a list; how many blocks.  Those of too high zones go to its front."""
    cdef uint64_t end = mem.nodes[sc.nid].lru[lru].head
    cdef int64_t scan = 0, nr
    cdef int n = 0
    cdef zone_t *zone
    cdef folio_t *folio
    nr_scanned[0] = nr_taken[0] = 0
    while scan < nr_to_scan:
        folio = &out[n]
        if not lru_pop_until(mem, sc.nid, lru, end, folio):
            break
        nr = pages_of_use(folio)
        nr_scanned[0] += nr
        zone = page_zone(mem, folio.pfn)
        if zone.zone_idx > sc.reclaim_idx:
            mem.events[PGSKIP_DMA + zone.zone_idx] += nr
            lru_add(mem, zone, folio.pfn, mem.users[folio.user].kind, folio.huge, folio.flags)
            continue
        scan += nr
        nr_taken[0] += nr
        n += 1
    return n


cdef inline void putback(mem_t *mem, const folio_t *folio) noexcept nogil:
    lru_add(mem, page_zone(mem, folio.pfn), folio.pfn, mem.users[folio.user].kind, folio.huge,
            folio.flags)


cdef inline bint folio_young(const mem_t *mem, const folio_t *folio) noexcept nogil:
    """Whether page table entries say that a page was touched; they no longer do (folio_referenced)."""
    cdef user_t *user = mem.users[folio.user]
    if not user.slots[folio.index] & SLOT_YOUNG:
        return False
    user.slots[folio.index] &= ~SLOT_YOUNG
    return True


cdef bint mlock_folio(mem_t *mem, const folio_t *folio) noexcept nogil:
    """Find out that a page belongs to an mlocked area, as reclaim does; whether it does."""
    cdef int64_t nr = pages_of_use(folio)
    if not mem.users[folio.user].locked:
        return False
    folio.flags[0] = (folio.flags[0] & ~PF_ACTIVE) | PF_MLOCKED
    page_zone(mem, folio.pfn).stat[NR_MLOCK] += nr
    mem.events[UNEVICTABLE_PGS_MLOCKED] += nr
    mem.events[UNEVICTABLE_PGS_CULLED] += nr
    return True


cdef int64_t shrink_active_list(mem_t *mem, scan_control_t *sc, int lru,
                                int64_t nr_to_scan) noexcept nogil:
    cdef folio_t list[SWAP_CLUSTER_MAX]
    cdef int64_t nr_scanned, nr_taken, nr_deactivate = 0
    cdef int i, n
    if lru_make_room(mem, <uint64_t> 1 << sc.nid, ROOM_FOR_BATCH):
        return -ENOMEM
    n = isolate_lru_folios(mem, sc, lru, nr_to_scan, list, &nr_scanned, &nr_taken)
    mem.events[PGREFILL] += nr_scanned
    for i in range(n):
        if not mlock_folio(mem, &list[i]):
            folio_young(mem, &list[i])
            list[i].flags[0] &= ~PF_ACTIVE
            nr_deactivate += pages_of_use(&list[i])
        putback(mem, &list[i])
    mem.events[PGDEACTIVATE] += nr_deactivate
    return 0


# -- what becomes of an inactive page -----------------------------------------------------------------

cdef int folio_check_references(const mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef bint referenced = folio.flags[0] & PF_REFERENCED != 0
    folio.flags[0] &= ~PF_REFERENCED
    if folio_young(mem, folio):
        # Every mapped page begins as touched: only a second touch shows that it is needed.
        folio.flags[0] |= PF_REFERENCED
        return FOLIOREF_ACTIVATE if referenced else FOLIOREF_KEEP
    if referenced and not swap_backed(mem.users[folio.user].kind):
        return FOLIOREF_RECLAIM_CLEAN
    return FOLIOREF_RECLAIM


cdef inline void take_from_user(mem_t *mem, const folio_t *folio) noexcept nogil:
    detach_page(mem, folio)
    memset(&mem.users[folio.user].slots[folio.index], 0, pages_of_use(folio) * sizeof(uint64_t))


cdef int reclaim_file(mem_t *mem, scan_control_t *sc, const folio_t *folio,
                      int references) noexcept nogil:
    """Drop a file's page, which the backing store has to have before."""
    cdef user_t *user = mem.users[folio.user]
    cdef int64_t nr = pages_of_use(folio)
    if folio.flags[0] & PF_DIRTY:
        if (not sc.kswapd or not user.slots[folio.index] & SLOT_RECLAIM
                or not mem.nodes[sc.nid].reclaim_flags & PGDAT_DIRTY):
            # Whoever writes back does so for many pages at a time: it comes when that is done.
            node_stat_add(mem, page_zone(mem, folio.pfn), NR_VMSCAN_IMMEDIATE_RECLAIM, nr)
            user.slots[folio.index] |= SLOT_RECLAIM
            return FOLIO_ACTIVATE
        if (references == FOLIOREF_RECLAIM_CLEAN or not sc.gfp & GFP_BIT_FS or not sc.may_writepage
                or folio.flags[0] & PF_PINNED):
            return FOLIO_KEEP
        user.slots[folio.index] &= ~SLOT_RECLAIM
        start_writeback(mem, folio)
        folio_end_writeback(mem, folio)
        node_stat_add(mem, page_zone(mem, folio.pfn), NR_VMSCAN_WRITE, nr)
        sc.batch_pageout += nr
    if folio.flags[0] & PF_PINNED:
        return FOLIO_KEEP
    take_from_user(mem, folio)
    return FOLIO_FREE


cdef int reclaim_swap_backed(mem_t *mem, scan_control_t *sc, const folio_t *folio) noexcept nogil:
    """Put an anonymous or shmem page on the swap device."""
    cdef int64_t nr = pages_of_use(folio)
    cdef uint32_t needed = GFP_BIT_IO if mem.users[folio.user].kind == USER_ANON else GFP_BIT_FS
    if not sc.gfp & needed or folio.flags[0] & PF_PINNED or not sc.may_writepage:
        return FOLIO_KEEP
    if not swap_out(mem, folio):
        return FOLIO_ACTIVATE
    sc.batch_pageout += nr
    return FOLIO_FREE


cdef int check_writeback(mem_t *mem, scan_control_t *sc, const folio_t *folio) noexcept nogil:
    """Count what is dirty or being written; whether to leave a page to whoever writes it."""
    cdef user_t *user = mem.users[folio.user]
    cdef int64_t nr = pages_of_use(folio)
    cdef uint16_t flags = folio.flags[0]
    if user.kind != USER_FILE or not flags & (PF_DIRTY | PF_WRITEBACK):
        return False
    sc.dirty += nr
    if not flags & PF_WRITEBACK:
        sc.unqueued_dirty += nr
        sc.batch_unqueued_dirty += nr
        return False
    if user.slots[folio.index] & SLOT_RECLAIM:
        sc.congested += nr
        if sc.kswapd and mem.nodes[sc.nid].reclaim_flags & PGDAT_WRITEBACK:
            sc.immediate += nr
            return True
    user.slots[folio.index] |= SLOT_RECLAIM
    sc.writeback += nr
    return True


cdef inline bint has_to_split(const mem_t *mem, const scan_control_t *sc,
                              const folio_t *folio) noexcept nogil:
    """Whether a block of order 9 goes page by page."""
    if not folio.huge or not swap_backed(mem.users[folio.user].kind):
        return False
    if folio.flags[0] & PF_PINNED or not sc.gfp & GFP_BIT_IO:
        return False
    if mem.users[folio.user].kind == USER_SHMEM:
        return True
    return free_cluster(mem) < 0


cdef void flush_free(mem_t *mem, scan_control_t *sc) noexcept nogil:
    """Free what was taken, the last first, as the kernel's list of it has them."""
    cdef int64_t i, failed
    cdef uint64_t other
    for i in range(sc.nr_free / 2):
        other = sc.to_free[sc.nr_free - 1 - i]
        sc.to_free[sc.nr_free - 1 - i] = sc.to_free[i]
        sc.to_free[i] = other
    free_pages_bulk(mem, sc.to_free, sc.nr_free, 0, sc.cpu, &failed)
    sc.nr_free = 0


cdef void dispose(mem_t *mem, scan_control_t *sc, const folio_t *folio, int fate) noexcept nogil:
    cdef int64_t nr = pages_of_use(folio)
    if fate == FOLIO_FREE:
        sc.batch_reclaimed += nr
        if folio.huge:
            free_pages(mem, folio.pfn, PAGEBLOCK_ORDER, sc.cpu)
            return
        if sc.nr_free == PAGEBLOCK_PAGES:
            flush_free(mem, sc)
        sc.to_free[sc.nr_free] = folio.pfn
        sc.nr_free += 1
        return
    if fate == FOLIO_ACTIVATE and not folio.flags[0] & PF_MLOCKED:
        folio.flags[0] |= PF_ACTIVE
        mem.events[PGACTIVATE] += nr
    putback(mem, folio)


cdef int decide(mem_t *mem, scan_control_t *sc, folio_t *folio, bint *split) noexcept nogil:
    """Find out what becomes of a page, and do all of it but freeing it or putting it back."""
    cdef int references
    split[0] = False
    if folio.flags[0] & PF_HWPOISON:
        return FOLIO_KEEP
    if check_writeback(mem, sc, folio):
        return FOLIO_ACTIVATE
    if mlock_folio(mem, folio):
        return FOLIO_ACTIVATE
    references = folio_check_references(mem, folio)
    if references == FOLIOREF_ACTIVATE:
        return FOLIO_ACTIVATE
    if references == FOLIOREF_KEEP:
        return FOLIO_KEEP
    if has_to_split(mem, sc, folio):
        if mem.users[folio.user].kind == USER_ANON:
            mem.events[THP_SWPOUT_FALLBACK] += 1
        split_huge_page(mem, folio)
        sc.nr_scanned -= PAGEBLOCK_PAGES - 1
        split[0] = True
        read_folio(mem, folio.pfn, folio)
    if swap_backed(mem.users[folio.user].kind):
        return reclaim_swap_backed(mem, sc, folio)
    return reclaim_file(mem, sc, folio, references)


cdef void shrink_folio_list(mem_t *mem, scan_control_t *sc, folio_t *list, int n) noexcept nogil:
    cdef int i, k
    cdef bint split, again
    cdef folio_t part
    cdef pfn_t head
    sc.batch_unqueued_dirty = sc.batch_pageout = sc.batch_reclaimed = 0
    for i in range(n):
        sc.nr_scanned += pages_of_use(&list[i])
        head = list[i].pfn
        dispose(mem, sc, &list[i], decide(mem, sc, &list[i], &split))
        if not split:
            continue
        for k in range(1, PAGEBLOCK_PAGES):
            read_folio(mem, head + k, &part)
            sc.nr_scanned += 1
            dispose(mem, sc, &part, decide(mem, sc, &part, &again))
    flush_free(mem, sc)


# -- lists --------------------------------------------------------------------------------------------

cdef void lru_note_cost(node_t *node, bint file, int64_t nr_pages) noexcept nogil:
    cdef int64_t size = (node.stat[NR_INACTIVE_ANON] + node.stat[NR_ACTIVE_ANON]
                         + node.stat[NR_INACTIVE_FILE] + node.stat[NR_ACTIVE_FILE])
    if file:
        node.file_cost += nr_pages
    else:
        node.anon_cost += nr_pages
    if node.file_cost + node.anon_cost > size / 4:
        node.file_cost /= 2
        node.anon_cost /= 2


cdef bint too_many_isolated(const node_t *node, const scan_control_t *sc, bint file) noexcept nogil:
    cdef int64_t inactive = node.stat[NR_INACTIVE_FILE if file else NR_INACTIVE_ANON]
    if sc.kswapd:
        return False
    if sc.gfp & (GFP_BIT_IO | GFP_BIT_FS) == (GFP_BIT_IO | GFP_BIT_FS):
        inactive >>= 3
    return node.stat[NR_ISOLATED_FILE if file else NR_ISOLATED_ANON] > inactive


cdef int64_t shrink_inactive_list(mem_t *mem, scan_control_t *sc, int lru,
                                  int64_t nr_to_scan) noexcept nogil:
    """Look at the oldest pages of a list; how many were reclaimed, or -ENOMEM."""
    cdef folio_t list[SWAP_CLUSTER_MAX]
    cdef bint file = lru == LRU_INACTIVE_FILE
    cdef int64_t nr_scanned, nr_taken
    cdef int n
    if too_many_isolated(&mem.nodes[sc.nid], sc, file):
        return 0
    if lru_make_room(mem, <uint64_t> 1 << sc.nid, ROOM_FOR_BATCH):
        return -ENOMEM
    n = isolate_lru_folios(mem, sc, lru, nr_to_scan, list, &nr_scanned, &nr_taken)
    mem.events[PGSCAN_KSWAPD if sc.kswapd else PGSCAN_DIRECT] += nr_scanned
    mem.events[PGSCAN_ANON + file] += nr_scanned
    if n == 0:
        return 0
    shrink_folio_list(mem, sc, list, n)
    mem.events[PGSTEAL_KSWAPD if sc.kswapd else PGSTEAL_DIRECT] += sc.batch_reclaimed
    mem.events[PGSTEAL_ANON + file] += sc.batch_reclaimed
    lru_note_cost(&mem.nodes[sc.nid], file, sc.batch_pageout)
    if sc.batch_unqueued_dirty == nr_taken:
        sc.wakeup_flushers = True
    sc.taken += nr_taken
    if file:
        sc.file_taken += nr_taken
    return sc.batch_reclaimed


cdef bint inactive_is_low(const node_t *node, int inactive_lru) noexcept nogil:
    cdef int64_t inactive = node.stat[NR_INACTIVE_ANON + inactive_lru]
    cdef int64_t active = node.stat[NR_INACTIVE_ANON + inactive_lru + 1]
    cdef int64_t gb = (inactive + active) >> PAGES_PER_GIB_SHIFT, ratio = 1
    if gb:
        while (ratio + 1) * (ratio + 1) <= 10 * gb:
            ratio += 1
    return inactive * ratio < active


cdef bint can_reclaim_anon_pages(const mem_t *mem) noexcept nogil:
    return nr_swap_pages(mem) > 0


cdef void prepare_scan_count(mem_t *mem, scan_control_t *sc) noexcept nogil:
    cdef node_t *node = &mem.nodes[sc.nid]
    cdef int64_t free = 0, high = 0, file
    cdef int i
    cdef zone_t *zone
    sc.may_deactivate = DEACTIVATE_ANON | DEACTIVATE_FILE
    if not sc.force_deactivate:
        if not inactive_is_low(node, LRU_INACTIVE_ANON):
            sc.may_deactivate &= ~DEACTIVATE_ANON
        if not inactive_is_low(node, LRU_INACTIVE_FILE):
            sc.may_deactivate &= ~DEACTIVATE_FILE
    file = node.stat[NR_INACTIVE_FILE]
    sc.cache_trim_mode = file >> sc.priority and not sc.may_deactivate & DEACTIVATE_FILE
    for i in range(NR_ZONES):
        zone = mem.zones[sc.nid * NR_ZONES + i]
        if zone.managed_pages:
            free += zone.nr_free_pages
            high += zone.watermark_high + zone.watermark_boost
    file += node.stat[NR_ACTIVE_FILE]
    sc.file_is_tiny = (file + free <= high and not sc.may_deactivate & DEACTIVATE_ANON
                       and node.stat[NR_INACTIVE_ANON] >> sc.priority)


cdef int scan_balance(const mem_t *mem, const scan_control_t *sc) noexcept nogil:
    if not sc.may_swap or not can_reclaim_anon_pages(mem):
        return SCAN_FILE
    if not sc.priority and sc.swappiness:
        return SCAN_EQUAL
    if sc.file_is_tiny:
        return SCAN_ANON
    if sc.cache_trim_mode:
        return SCAN_FILE
    return SCAN_FRACT


cdef void get_scan_count(mem_t *mem, const scan_control_t *sc, int64_t *nr) noexcept nogil:
    cdef node_t *node = &mem.nodes[sc.nid]
    cdef int balance = scan_balance(mem, sc), lru, i
    cdef int64_t cost = node.anon_cost + node.file_cost
    cdef int64_t anon_cost = cost + node.anon_cost, file_cost = cost + node.file_cost
    cdef int64_t size, total = anon_cost + file_cost + 1
    cdef int64_t[2] fraction
    cdef bint file
    fraction[0] = sc.swappiness * total / (anon_cost + 1)
    fraction[1] = (200 - sc.swappiness) * total / (file_cost + 1)
    for lru in range(NR_LRU_LISTS):
        file = lru >= LRU_INACTIVE_FILE
        size = 0
        for i in range(sc.reclaim_idx + 1):
            if mem.zones[sc.nid * NR_ZONES + i].managed_pages:
                size += mem.zones[sc.nid * NR_ZONES + i].stat[NR_ZONE_INACTIVE_ANON + lru]
        size >>= sc.priority
        if balance == SCAN_FRACT:
            size = size * fraction[file] / (fraction[0] + fraction[1])
        elif balance != SCAN_EQUAL and (balance == SCAN_FILE) != file:
            size = 0
        nr[lru] = size


cdef int64_t shrink_list(mem_t *mem, scan_control_t *sc, int lru, int64_t nr_to_scan) noexcept nogil:
    if lru == LRU_ACTIVE_ANON or lru == LRU_ACTIVE_FILE:
        if sc.may_deactivate & (DEACTIVATE_ANON if lru == LRU_ACTIVE_ANON else DEACTIVATE_FILE):
            return shrink_active_list(mem, sc, lru, nr_to_scan)
        sc.skipped_deactivate = True
        return 0
    return shrink_inactive_list(mem, sc, lru, nr_to_scan)


cdef inline int64_t rest_of(int64_t target, int64_t left, int64_t percentage) noexcept nogil:
    """What is left to scan of a list when the other sort was scanned to a percentage."""
    cdef int64_t rest = target * (100 - percentage) / 100
    return rest - min(rest, target - left)


cdef bint go_on_with_larger(int64_t *nr, const int64_t *targets) noexcept nogil:
    """Enough is reclaimed: drop the smaller sort and scan the larger to the same part of its
    target; False if nothing is left of one."""
    cdef int64_t anon = nr[LRU_INACTIVE_ANON] + nr[LRU_ACTIVE_ANON]
    cdef int64_t file = nr[LRU_INACTIVE_FILE] + nr[LRU_ACTIVE_FILE], percentage
    cdef int small = LRU_INACTIVE_ANON if file > anon else LRU_INACTIVE_FILE
    cdef int large = LRU_INACTIVE_FILE if file > anon else LRU_INACTIVE_ANON
    if not anon or not file:
        return False
    percentage = min(anon, file) * 100 / (targets[small] + targets[small + 1] + 1)
    nr[small] = nr[small + 1] = 0
    nr[large] = rest_of(targets[large], nr[large], percentage)
    nr[large + 1] = rest_of(targets[large + 1], nr[large + 1], percentage)
    return True


cdef int shrink_lruvec(mem_t *mem, scan_control_t *sc) noexcept nogil:
    cdef int64_t[NR_LRU_LISTS] nr, targets
    cdef int64_t reclaimed = 0, got, step
    cdef int lru
    # Light pressure from one request: there is no need to be even-handed early.
    cdef bint proportional = not sc.kswapd and sc.priority == DEF_PRIORITY
    get_scan_count(mem, sc, nr)
    for lru in range(NR_LRU_LISTS):
        targets[lru] = nr[lru]
    while nr[LRU_INACTIVE_ANON] or nr[LRU_ACTIVE_FILE] or nr[LRU_INACTIVE_FILE]:
        for lru in range(NR_LRU_LISTS):
            if nr[lru]:
                step = min(nr[lru], <int64_t> SWAP_CLUSTER_MAX)
                nr[lru] -= step
                got = shrink_list(mem, sc, lru, step)
                if got < 0:
                    return <int> got
                reclaimed += got
        if reclaimed >= sc.nr_to_reclaim and not proportional and not go_on_with_larger(nr, targets):
            break
    sc.nr_reclaimed += reclaimed
    return age_anon(mem, sc)


cdef int age_anon(mem_t *mem, scan_control_t *sc) noexcept nogil:
    """Give active anonymous pages a chance to show that they are needed."""
    if mem.swap.nr_slots and inactive_is_low(&mem.nodes[sc.nid], LRU_INACTIVE_ANON):
        return <int> shrink_active_list(mem, sc, LRU_ACTIVE_ANON, SWAP_CLUSTER_MAX)
    return 0


# -- for Python ---------------------------------------------------------------------------------------

cdef int fill(scan_control_t *sc, object control, int nid) except -1:
    memset(sc, 0, sizeof(scan_control_t))
    sc.nid, sc.cpu, sc.gfp = nid, control.cpu, control.gfp
    sc.priority, sc.reclaim_idx, sc.kswapd = control.priority, control.reclaim_idx, control.kswapd
    sc.may_writepage, sc.may_swap = control.may_writepage, control.may_swap
    sc.force_deactivate, sc.swappiness = control.force_deactivate, control.swappiness
    sc.nr_to_reclaim = control.nr_to_reclaim
    if not 0 <= sc.priority <= DEF_PRIORITY or not 0 <= sc.reclaim_idx < NR_ZONES:
        raise ValueError(f"ScanControl: priority {sc.priority}, reclaim_idx {sc.reclaim_idx}")
    return 0


def shrink_lists(PageAllocator m, int nid, control):
    """Scan a node's lists once at a priority; what came of it is added to the ScanControl.

    Runs without the GIL.
    """
    cdef scan_control_t sc
    cdef int rc
    if m.mem.journal != NULL:
        raise ValueError("shrink_lists: pages of users do not change inside a chain of records")
    fill(&sc, control, nid)
    with nogil:
        prepare_scan_count(m.mem, &sc)
        rc = shrink_lruvec(m.mem, &sc)
    if rc:
        raise MemoryError("shrink_lists: LRU lists")
    control.nr_scanned += sc.nr_scanned
    control.nr_reclaimed += sc.nr_reclaimed
    control.skipped_deactivate |= sc.skipped_deactivate
    control.wakeup_flushers |= sc.wakeup_flushers
    for name, value in (("dirty", sc.dirty), ("unqueued_dirty", sc.unqueued_dirty),
                        ("congested", sc.congested), ("writeback", sc.writeback),
                        ("immediate", sc.immediate), ("taken", sc.taken),
                        ("file_taken", sc.file_taken)):
        control.nr[name] = value


def age_active_anon(PageAllocator m, int nid, control):
    """Move the oldest active anonymous pages of a node on, if too few are inactive."""
    cdef scan_control_t sc
    fill(&sc, control, nid)
    if age_anon(m.mem, &sc):
        raise MemoryError("age_active_anon: LRU lists")


def reclaim_state(PageAllocator m, int nid):
    """(kswapd_failures, PGDAT_* flags, anon_cost, file_cost) of a node."""
    cdef node_t *node = &m.mem.nodes[nid]
    return node.kswapd_failures, node.reclaim_flags, node.anon_cost, node.file_cost


def set_reclaim_state(PageAllocator m, int nid, int failures, int flags):
    """Set a node's kswapd_failures and PGDAT_* flags."""
    m.mem.nodes[nid].kswapd_failures = failures
    m.mem.nodes[nid].reclaim_flags = flags


def kswapd_request(PageAllocator m, int nid):
    """What a node's kswapd was woken for, which is forgotten: (order, highest zone index).

    None if nobody woke it since this was asked last.
    """
    cdef node_t *node = &m.mem.nodes[nid]
    if not node.kswapd_pending:
        return None
    heard = max(node.kswapd_order, 0), node.kswapd_highest_zoneidx
    node.kswapd_pending = 0
    node.kswapd_order, node.kswapd_highest_zoneidx = -1, 0
    return heard


def any_kswapd_request(PageAllocator m):
    """Whether somebody woke a kswapd that has not looked since."""
    return bool(kswapd_pending(m.mem))


def set_reclaim_active(PageAllocator m, int nid, int highest_zoneidx, bint active):
    """Let CPUs keep fewer free pages of a node's zones while kswapd works for them."""
    cdef int i, cpu
    cdef zone_t *zone
    for i in range(highest_zoneidx + 1):
        zone = m.mem.zones[nid * NR_ZONES + i]
        if not zone.managed_pages or zone.reclaim_active == active:
            continue
        zone.reclaim_active = active
        if active:
            zone.high_when_idle = zone.pcp[0].high
        for cpu in range(zone.nr_cpus):
            zone.pcp[cpu].high = (min(zone.pcp[cpu].batch << 2, zone.high_when_idle) if active
                                  else zone.high_when_idle)


def zone_reclaimable_pages(PageAllocator m, int zone_index):
    """How many pages of a zone reclaim could free; its free pages if there are none."""
    cdef zone_t *zone = m.mem.zones[zone_index]
    cdef int64_t nr = zone.stat[NR_ZONE_INACTIVE_FILE] + zone.stat[NR_ZONE_ACTIVE_FILE]
    if can_reclaim_anon_pages(m.mem):
        nr += zone.stat[NR_ZONE_INACTIVE_ANON] + zone.stat[NR_ZONE_ACTIVE_ANON]
    return nr if nr else zone.nr_free_pages
