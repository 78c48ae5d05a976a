"""Allocating and freeing: zonelists, watermarks, the slow path's order (mm/page_alloc.c)."""
from kmm._fallback cimport (reserve_highatomic_pageblock, rmqueue_buddy,
                            unreserve_highatomic_pageblock)
from kmm._freelist cimport (block_of, clear_block_record, mark_allocated, mark_dirty, page_next,
                            pcp_state, prefetch, rmqueue_smallest, set_page_next, set_page_prev,
                            set_state)
from kmm._memmap cimport get_pageblock_migratetype, page_zone, section_online, wakeup_kswapd
from kmm._pcp cimport free_unref_pages, pcp_overflow, take_batches, take_from_pcp

import numpy as np

from kmm.errors import check_number, kernel_error

cdef enum:
    EFAULT = 14
    ENOMEM = 12
    EINVAL = 22
    EEXIST = 17
    LARGE_REQUEST = 1 << 17         # pages whose records fill a huge page of the host
    GROUP = 64                      # records that a bulk call fetches ahead

cdef uint64_t ALL_NODES = <uint64_t> -1


# -- what a request asks for ------------------------------------------------------------------

# The highest zone that a request may use, by the low bits of its gfp flags: DMA, HIGHMEM, DMA32,
# MOVABLE.  MOVABLE counts only with HIGHMEM; of contradicting bits the lower zone wins.
cdef int8_t[16] GFP_ZONE = [2, 0, 2, 0, 1, 0, 1, 0, 2, 0, 3, 0, 1, 0, 1, 0]


cdef inline int gfp_zone(uint32_t gfp) noexcept nogil:
    return GFP_ZONE[gfp & 0xF]


cdef inline int gfp_migratetype(const mem_t *mem, uint32_t gfp) noexcept nogil:
    return MIGRATE_UNMOVABLE if mem.grouping_disabled else (gfp >> 3) & 3


cdef struct request_t:
    uint32_t gfp
    int order
    int mt
    int highest                     # zone index
    int cpu
    int nid
    uint64_t nodes
    const zonelist_t *zonelist
    zone_t *preferred               # the first zone that may serve


cdef inline bint zone_allowed(const request_t *r, const zone_t *zone) noexcept nogil:
    return zone.zone_idx <= r.highest and r.nodes >> zone.nid & 1


cdef inline void prepare_request(mem_t *mem, request_t *r, uint32_t gfp, int order, int nid,
                                 uint64_t nodes, int cpu) noexcept nogil:
    cdef int i
    r.gfp, r.order, r.nid, r.nodes, r.cpu = gfp, order, nid, nodes, cpu
    r.mt = gfp_migratetype(mem, gfp)
    r.highest = gfp_zone(gfp)
    r.zonelist = (&mem.nodes[nid].nofallback if gfp & GFP_BIT_THISNODE
                  else &mem.nodes[nid].fallback)
    r.preferred = NULL
    for i in range(r.zonelist.nr):
        if zone_allowed(r, r.zonelist.zones[i]):
            r.preferred = r.zonelist.zones[i]
            break


cdef inline int alloc_flags_nofragment(const mem_t *mem, const request_t *r) noexcept nogil:
    """Keep a Normal zone's pageblocks pure while the same node has DMA32 to fall back to."""
    cdef int flags = ALLOC_KSWAPD if r.gfp & GFP_BIT_KSWAPD_RECLAIM else 0
    cdef const zone_t *below
    if r.preferred == NULL or r.preferred.zone_idx != 2:
        return flags
    below = mem.zones[r.preferred.index - 1]
    if mem.nr_online_nodes > 1 and not below.present_pages:
        return flags
    return flags | ALLOC_NOFRAGMENT


cdef int slowpath_flags(uint32_t gfp, int order) noexcept nogil:
    cdef int flags = WMARK_MIN | ALLOC_CPUSET
    if gfp & GFP_BIT_HIGH:
        flags |= ALLOC_MIN_RESERVE
    if gfp & GFP_BIT_KSWAPD_RECLAIM:
        flags |= ALLOC_KSWAPD
    if not gfp & GFP_BIT_DIRECT_RECLAIM and not gfp & GFP_BIT_NOMEMALLOC:
        flags |= ALLOC_NON_BLOCK
        if order > 0 and gfp & GFP_BIT_HIGH:
            flags |= ALLOC_HIGHATOMIC
    if not gfp & GFP_BIT_DIRECT_RECLAIM and gfp & GFP_BIT_HIGH:
        flags &= ~ALLOC_CPUSET
    return flags


# -- watermarks -------------------------------------------------------------------------------

cdef inline int64_t wmark_pages(const zone_t *zone, int flags) noexcept nogil:
    cdef int which = flags & ALLOC_WMARK_MASK
    if which == WMARK_MIN:
        return zone.watermark_min + zone.watermark_boost
    if which == WMARK_LOW:
        return zone.watermark_low + zone.watermark_boost
    return zone.watermark_high + zone.watermark_boost


cdef inline int64_t pages_above(const zone_t *zone, int order, int64_t mark, int highest,
                                int flags) noexcept nogil:
    """How many pages a zone has above a mark and its reserve, once 2^order are gone."""
    cdef int64_t free = zone.nr_free_pages - ((<int64_t> 1 << order) - 1)
    if not flags & ALLOC_RESERVES:
        free -= zone.nr_reserved_highatomic
    if flags & ALLOC_MIN_RESERVE:
        mark -= mark / 2
        if flags & ALLOC_NON_BLOCK:
            mark -= mark / 4
    if flags & ALLOC_OOM:
        mark -= mark / 2
    return free - mark - zone.lowmem_reserve[highest]


cdef inline bint zone_watermark_ok(const zone_t *zone, int order, int64_t mark, int highest,
                                   int flags) noexcept nogil:
    cdef uint32_t lists
    if pages_above(zone, order, mark, highest, flags) <= 0:
        return False
    if order == 0:
        return True
    lists = zone.free_mask[0] | zone.free_mask[1] | zone.free_mask[2]
    if flags & (ALLOC_HIGHATOMIC | ALLOC_OOM):
        lists |= zone.free_mask[MIGRATE_HIGHATOMIC]
    return lists >> order != 0


cdef inline bint zone_watermark_fast(const zone_t *zone, const request_t *r,
                                     int flags) noexcept nogil:
    if flags & ALLOC_NO_WATERMARKS:
        return True
    if zone_watermark_ok(zone, r.order, wmark_pages(zone, flags), r.highest, flags):
        return True
    # What a boost keeps for kswapd's work is there for atomic requests.
    return (r.order == 0 and r.gfp & GFP_BIT_ATOMIC and zone.watermark_boost
            and (flags & ALLOC_WMARK_MASK) == WMARK_MIN
            and zone_watermark_ok(zone, 0, zone.watermark_min, r.highest, flags))


# -- taking a page ----------------------------------------------------------------------------

cdef inline void zone_statistics(const mem_t *mem, const request_t *r, zone_t *zone,
                                 int64_t times) noexcept nogil:
    if zone.nid == r.preferred.nid:
        zone.numa_hit += times
    else:
        zone.numa_miss += times
        r.preferred.numa_foreign += times
    if zone.nid == mem.node_of_cpu[r.cpu]:
        zone.numa_local += times
    else:
        zone.numa_other += times
    zone.pgalloc += times << r.order


cdef int64_t rmqueue_direct(mem_t *mem, zone_t *zone, int order, int mt, int flags) noexcept nogil:
    """Take a block past the per-CPU lists; -1 if there is none (rmqueue_buddy)."""
    cdef int64_t pfn = -1
    if flags & ALLOC_HIGHATOMIC:
        pfn = rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
    if pfn < 0:
        pfn = rmqueue_buddy(mem, zone, order, mt, flags)
    if pfn < 0 and flags & (ALLOC_OOM | ALLOC_NON_BLOCK):
        pfn = rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
    if pfn >= 0:
        zone.nr_free_pages -= <int64_t> 1 << order
        mark_allocated(mem, <pfn_t> pfn, order)
    return pfn


cdef int64_t rmqueue(mem_t *mem, zone_t *zone, int order, int mt, int flags, int cpu) noexcept nogil:
    cdef int64_t pfn = -1
    if pcp_allowed_order(order):
        pfn = rmqueue_pcplist(mem, zone, order, mt, flags, cpu)
    if pfn < 0:
        pfn = rmqueue_direct(mem, zone, order, mt, flags)
    if zone.boosted:
        zone.boosted = 0
        wakeup_kswapd(mem, zone, 0, zone.zone_idx)
    return pfn


cdef inline int64_t get_page_from_freelist(mem_t *mem, const request_t *r, int flags) noexcept nogil:
    """Take a block from the first zone that has room above its mark; -1 if none has."""
    cdef int i
    cdef int64_t pfn
    cdef zone_t *zone
    while True:
        for i in range(r.zonelist.nr):
            zone = r.zonelist.zones[i]
            if not zone_allowed(r, zone):
                continue
            if (flags & ALLOC_NOFRAGMENT and mem.nr_online_nodes > 1
                    and zone.nid != r.preferred.nid):
                break
            if not zone_watermark_fast(zone, r, flags):
                continue
            pfn = rmqueue(mem, zone, r.order, r.mt, flags, r.cpu)
            if pfn >= 0:
                if r.order and flags & ALLOC_HIGHATOMIC:
                    reserve_highatomic_pageblock(mem, zone, <pfn_t> pfn)
                zone_statistics(mem, r, zone, 1)
                return pfn
        if not flags & ALLOC_NOFRAGMENT:
            return -1
        # Local pages of a mixed pageblock are better than remote ones.
        flags &= ~ALLOC_NOFRAGMENT


# -- the slow path ------------------------------------------------------------------------------

cdef void wake_all_kswapds(mem_t *mem, const request_t *r) noexcept nogil:
    cdef int i, last = -1
    for i in range(r.zonelist.nr):
        if zone_allowed(r, r.zonelist.zones[i]) and r.zonelist.zones[i].nid != last:
            last = r.zonelist.zones[i].nid
            wakeup_kswapd(mem, r.zonelist.zones[i], r.order, r.highest)


cdef int64_t alloc_slowpath(mem_t *mem, request_t *r) noexcept nogil:
    """What can be had without waiting for anybody: reserves as the request's rights go."""
    cdef int flags = slowpath_flags(r.gfp, r.order)
    cdef int64_t pfn
    if flags & ALLOC_KSWAPD:
        wake_all_kswapds(mem, r)
    pfn = get_page_from_freelist(mem, r, flags)
    if pfn >= 0:
        return pfn
    # The kernel wakes it again in case that it has just gone to sleep.
    if flags & ALLOC_KSWAPD:
        wake_all_kswapds(mem, r)
    if r.gfp & GFP_BIT_MEMALLOC and not r.gfp & GFP_BIT_NOMEMALLOC:
        flags = ALLOC_NO_WATERMARKS | (flags & ALLOC_KSWAPD)
    if not flags & ALLOC_CPUSET:
        prepare_request(mem, r, r.gfp, r.order, r.nid, ALL_NODES, r.cpu)
    return get_page_from_freelist(mem, r, flags)


cdef inline int64_t alloc_from_pcp(mem_t *mem, uint32_t gfp, int order, int nid,
                                   int cpu) noexcept nogil:
    """What nearly every request comes down to: its first zone has room, and its CPU a page; -1."""
    cdef int highest = gfp_zone(gfp)
    cdef const zonelist_t *zonelist = (&mem.nodes[nid].nofallback if gfp & GFP_BIT_THISNODE
                                       else &mem.nodes[nid].fallback)
    cdef zone_t *zone
    cdef per_cpu_pages_t *pcp
    cdef free_list_t *lst
    cdef page_t *pages
    cdef pfn_t pfn, head
    if zonelist.first[highest] == zonelist.nr:
        return -1
    zone = zonelist.zones[zonelist.first[highest]]
    pcp = &zone.pcp[cpu]
    lst = &pcp.lists[3 * order + gfp_migratetype(mem, gfp)]
    if lst.count == 0 or mem.journal != NULL or not zone_watermark_ok(
            zone, order, zone.watermark_low + zone.watermark_boost, highest, 0):
        return -1
    if pcp.free_factor:
        pcp.free_factor >>= 1
    pcp.count -= 1 << order
    pcp.allocs[order] += 1
    pfn = lst.head
    pages = mem.pages
    head = page_next(&pages[pfn])
    prefetch(&pages[head])
    lst.head = head
    lst.count -= 1
    mem.states[pfn] = STATE_ALLOCATED | order
    return <int64_t> pfn


cdef int64_t alloc_pages(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                         int cpu) noexcept nogil:
    cdef int64_t pfn
    if nodes == ALL_NODES and order <= 3:
        if order == 0:
            pfn = alloc_from_pcp(mem, gfp, 0, nid, cpu)
        else:
            pfn = alloc_from_pcp(mem, gfp, order, nid, cpu)
        if pfn >= 0:
            return pfn
    return alloc_pages_any(mem, gfp, order, nid, nodes, cpu)


cdef int64_t alloc_pages_any(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                             int cpu) noexcept nogil:
    cdef request_t r
    cdef int64_t pfn
    prepare_request(mem, &r, gfp, order, nid, nodes, cpu)
    if r.preferred == NULL:
        return -ENOMEM
    pfn = get_page_from_freelist(mem, &r, WMARK_LOW | alloc_flags_nofragment(mem, &r))
    if pfn < 0:
        pfn = alloc_slowpath(mem, &r)
    return pfn if pfn >= 0 else -ENOMEM


# -- many at once -------------------------------------------------------------------------------

cdef int64_t bulk_from_zone(mem_t *mem, zone_t *zone, const request_t *r, int flags,
                            uint64_t *out, int64_t n) noexcept nogil:
    """Take what a zone gives through a CPU's list before its watermark stops it."""
    cdef int64_t done = 0, got, above
    while done < n and zone_watermark_fast(zone, r, flags):
        got = take_from_pcp(mem, zone, r.order, r.mt, r.cpu, &out[done], n - done)
        if got == 0:
            above = pages_above(zone, r.order, wmark_pages(zone, flags), r.highest, flags)
            got = take_batches(mem, zone, r.order, r.mt, r.cpu, &out[done], n - done, above - 1)
        if got == 0:
            # Near a mark, or another type's pageblock has to be claimed.
            got = <int64_t> rmqueue(mem, zone, r.order, r.mt, flags, r.cpu)
            if got < 0:
                break
            out[done] = <uint64_t> got
            got = 1
        done += got
    if done:
        zone_statistics(mem, r, zone, done)
    return done


cdef int64_t bulk_pass(mem_t *mem, const request_t *r, int flags, uint64_t *out,
                       int64_t n) noexcept nogil:
    cdef int i
    cdef int64_t done = 0
    cdef zone_t *zone
    for i in range(r.zonelist.nr):
        zone = r.zonelist.zones[i]
        if not zone_allowed(r, zone):
            continue
        if flags & ALLOC_NOFRAGMENT and mem.nr_online_nodes > 1 and zone.nid != r.preferred.nid:
            break
        done += bulk_from_zone(mem, zone, r, flags, &out[done], n - done)
        if done == n:
            break
    return done


cdef int64_t alloc_pages_bulk(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                              int cpu, uint64_t *out, int64_t n) noexcept nogil:
    cdef request_t r
    cdef int64_t done = 0, pfn
    cdef int flags
    prepare_request(mem, &r, gfp, order, nid, nodes, cpu)
    if r.preferred == NULL:
        return 0
    flags = WMARK_LOW | alloc_flags_nofragment(mem, &r)
    while done < n:
        if pcp_allowed_order(order):
            done += bulk_pass(mem, &r, flags, &out[done], n - done)
            if done == n:
                break
        # No zone serves the next block at once; it goes the long way, and may open a way.
        pfn = get_page_from_freelist(mem, &r, flags)
        if pfn < 0:
            pfn = alloc_slowpath(mem, &r)
        if pfn < 0:
            break
        out[done] = <uint64_t> pfn
        done += 1
    return done


# -- freeing --------------------------------------------------------------------------------------

cdef int why_not_allocated(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    if pfn >= mem.nr_pages or page_zone(mem, pfn) == NULL or not section_online(mem, pfn):
        return -EFAULT
    if pfn & ((<pfn_t> 1 << order) - 1):
        return -EINVAL
    if order >= PAGEBLOCK_ORDER:
        return -EINVAL if block_of(mem, pfn).kind == KIND_ALLOCATED else -EEXIST
    return -EINVAL if is_allocated_state(mem.states[pfn]) else -EEXIST


cdef inline bint is_allocated_state(uint8_t state) noexcept nogil:
    return state & ~(STATE_MARKED | STATE_ORDER) == STATE_ALLOCATED


cdef inline bint is_allocated(const mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Whether a block of this order was handed out at pfn."""
    if pfn >= mem.nr_pages:
        return False
    if order >= PAGEBLOCK_ORDER:
        return (block_of(mem, pfn).kind == KIND_ALLOCATED and block_of(mem, pfn).order == order
                and (pfn & (PAGEBLOCK_PAGES - 1)) == 0)
    return mem.states[pfn] & ~STATE_MARKED == STATE_ALLOCATED | order


cdef inline bint free_to_pcp(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    """Free what has been handed out and has no mark to a CPU's list that has pages; whether so."""
    cdef page_t *pages = mem.pages
    cdef zone_t *zone
    cdef per_cpu_pages_t *pcp
    cdef free_list_t *lst
    cdef pfn_t head
    cdef int mt
    if (pfn >= mem.nr_pages or mem.journal != NULL
            or mem.states[pfn] != STATE_ALLOCATED | order):
        return False
    mt = get_pageblock_migratetype(mem, pfn)
    zone = page_zone(mem, pfn)
    pcp = &zone.pcp[cpu]
    lst = &pcp.lists[3 * order + mt]
    if mt >= MIGRATE_HIGHATOMIC or lst.count == 0:
        return False
    head = lst.head
    mem.states[pfn] = <uint8_t> pcp_state(order, mt)
    set_page_next(pages, NULL, pfn, head)
    set_page_prev(pages, NULL, head, pfn)
    lst.head = pfn
    lst.count += 1
    pcp.frees[order] += 1
    pcp.count += 1 << order
    if pcp.count >= pcp.high or (order and pcp.free_factor):
        pcp_overflow(mem, zone, order, 3 * order + mt, cpu)
    return True


cdef int free_pages(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    if order == 0:
        if free_to_pcp(mem, pfn, 0, cpu):
            return 0
    elif order <= 3 and free_to_pcp(mem, pfn, order, cpu):
        return 0
    return free_pages_any(mem, pfn, order, cpu)


cdef int free_pages_any(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    if not is_allocated(mem, pfn, order):
        return why_not_allocated(mem, pfn, order)
    let_go(mem, pfn, order)
    free_let_go(mem, pfn, order, cpu)
    return 0


cdef inline void let_go(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Take the mark of an allocation off a block, so that it cannot be freed twice."""
    if order >= PAGEBLOCK_ORDER:
        clear_block_record(mem, pfn)
    else:
        set_state(mem.states, mem.journal, pfn, STATE_NONE)


cdef void free_let_go(mem_t *mem, pfn_t pfn, int order, int cpu) noexcept nogil:
    # A poisoned page that is freed by itself is kept out of everybody's hands.
    if order == 0 and mem.pages[pfn].flags & PF_HWPOISON:
        mem.pages[pfn].flags |= PF_TAKEN
        return
    free_unref_page(mem, page_zone(mem, pfn), pfn, order, cpu)


cdef int64_t claim_plain(uint8_t *states, uint64_t nr_pages, const uint64_t *pfns, int64_t n,
                         int order) noexcept nogil:
    """Let go of blocks below order 9 that are handed out and have no mark; how many.

    Stops at the first block that is something else.
    """
    cdef int64_t i = 0
    cdef pfn_t pfn
    while i < n:
        if i + GROUP < n:
            prefetch(&states[pfns[i + GROUP]])
        pfn = pfns[i]
        if pfn >= nr_pages or states[pfn] != STATE_ALLOCATED | order:
            break
        states[pfn] = STATE_NONE
        i += 1
    return i


cdef void take_back(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    """Undo let_go."""
    mark_allocated(mem, pfn, order)
    if order < PAGEBLOCK_ORDER and mem.pages[pfn].flags:
        set_state(mem.states, mem.journal, pfn, STATE_ALLOCATED | STATE_MARKED | order)


cdef int free_pages_bulk(mem_t *mem, const uint64_t *pfns, int64_t n, int order, int cpu,
                         int64_t *failed) noexcept nogil:
    cdef int64_t plain = 0, i
    cdef int rc
    if order < PAGEBLOCK_ORDER and mem.journal == NULL:
        plain = claim_plain(mem.states, mem.nr_pages, pfns, n, order)
    for i in range(plain, n):
        if is_allocated(mem, pfns[i], order):
            let_go(mem, pfns[i], order)
            continue
        rc = why_not_allocated(mem, pfns[i], order)
        failed[0] = i
        while i:
            i -= 1
            take_back(mem, pfns[i], order)
        return rc
    if plain == n or order:
        if n:
            free_unref_pages(mem, pfns, n, order, cpu)
    else:
        for i in range(n):
            free_let_go(mem, pfns[i], order, cpu)
    return 0


cdef int split_page(mem_t *mem, pfn_t pfn, int order) noexcept nogil:
    cdef pfn_t p
    if not is_allocated(mem, pfn, order):
        return why_not_allocated(mem, pfn, order)
    if order >= PAGEBLOCK_ORDER:
        clear_block_record(mem, pfn)
        for p in range(pfn, pfn + (<pfn_t> 1 << order), 512):
            mark_dirty(mem, p)
    for p in range(pfn, pfn + (<pfn_t> 1 << order)):
        mark_allocated(mem, p, 0)
    return 0


# -- the calls, for Python ------------------------------------------------------------------------

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

DEF_GFP = 0xCC0                     # GFP_KERNEL


cdef inline int64_t number(object value, str name, int64_t low, int64_t high) except? -1:
    """An argument that has to be a whole number between two limits; errors name it."""
    cdef int overflow = 0
    cdef int64_t out
    if type(value) is int:
        out = PyLong_AsLongLongAndOverflow(value, &overflow)
        if not overflow and low <= out <= high:
            return out
    return check_number(name, value, low, high)


cdef class PageAllocator:
    """Hands out a machine's pages and takes them back."""

    def _attach(self, MemMap memmap, int records_kept):
        """Work on a machine's records.

        :param records_kept: free pageblocks of a zone whose page records the host may keep.
        """
        self.memmap_engine_ = memmap
        self.mem = &memmap.mem
        self.default_cpu = 0
        self.records_kept = records_kept

    @property
    def kprobes(self):
        """The recorder of calls and orders to fail, None while nobody watches."""
        return self.probes

    @kprobes.setter
    def kprobes(self, value):
        self.probes = value
        self.watched = value is not None

    @property
    def free_records_kept(self):
        """Free pageblocks of a zone whose page records the host may keep."""
        return self.records_kept

    @property
    def this_cpu(self):
        """The CPU that kernel code and requests without ``cpu`` run on."""
        return self.default_cpu

    @this_cpu.setter
    def this_cpu(self, value):
        self.default_cpu = number(value, "this_cpu", 0, self.mem.nr_cpus - 1)

    cdef int _cpu(self, object cpu) except -1:
        if cpu is None:
            return self.default_cpu
        return number(cpu, "cpu", 0, self.mem.nr_cpus - 1)

    cdef int _nid(self, object nid, int cpu) except -1:
        if nid is None:
            return self.mem.node_of_cpu[cpu]
        return number(nid, "nid", 0, self.mem.nr_nodes - 1)

    cdef uint32_t _gfp(self, object gfp) except? 0xFFFFFFFF:
        cdef uint32_t flags = number(gfp, "gfp", 0, 0xFFFFFFF)
        if (flags & (GFP_BIT_MOVABLE | GFP_BIT_RECLAIMABLE)) == (
                GFP_BIT_MOVABLE | GFP_BIT_RECLAIMABLE):
            raise kernel_error(-EINVAL, f"gfp: {flags:#x}; allowed: movable or reclaimable, not both")
        return flags

    cdef int _after_free(self, zone_t *zone) except -1:
        if zone.nr_dirty_free > self.records_kept and zone.nr_dirty_free > zone.dirty_free_limit:
            self.give_back_records()
        return 0

    def alloc_pages(self, order=0, gfp=DEF_GFP, nid=None, cpu=None):
        """Allocate a block of 2^order pages.

        :param order: 0 to 10; gfp: __GFP_* flags; nid: node whose zonelist is used, that of the
            CPU if None; cpu: whose lists serve, ``this_cpu`` if None.
        :return: the pfn of the first page.
        :raises OutOfMemory: if no zone may give one; InvalidArgument: naming the argument.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef uint32_t flags = self._gfp(gfp)
        cdef int c = self._cpu(cpu)
        cdef int n = self._nid(nid, c)
        cdef int64_t pfn
        if self.watched:
            return self._alloc_slowly(o, flags, n, c)
        pfn = alloc_pages(self.mem, flags, o, n, ALL_NODES, c)
        if pfn < 0:
            return self._alloc_slowly(o, flags, n, c)
        return pfn

    def free_pages(self, pfn, order=0, cpu=None):
        """Free a block of 2^order pages.

        :raises KernelError: EFAULT where there is no online page, EINVAL for another order than
            it was allocated with, EEXIST if it is free already or inside a larger block.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef int c = self._cpu(cpu)
        cdef pfn_t page = <pfn_t> number(pfn, "pfn", 0, <int64_t> ((<uint64_t> 1 << 63) - 1))
        cdef int rc
        if self.watched:
            self._free_slowly(page, o, c)
            return
        rc = free_pages(self.mem, page, o, c)
        if rc:
            self._refuse_free(rc, page, o)
        self._after_free(page_zone(self.mem, page))

    def alloc_pages_bulk(self, n, order=0, gfp=DEF_GFP, nid=None, out=None, cpu=None):
        """Allocate up to n blocks, as single calls would one after the other.

        Runs without the GIL.

        :param n: blocks; order, gfp, nid, cpu: as for alloc_pages.
        :param out: a uint64 array of at least n to fill; a part of it is returned.
        :return: a uint64 array of the pfns of those there were.
        :raises InvalidArgument: naming the argument.
        """
        cdef int64_t want = number(n, "n", 0, <int64_t> self.mem.nr_pages), done
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef uint32_t flags = self._gfp(gfp)
        cdef int c = self._cpu(cpu)
        cdef int node = self._nid(nid, c)
        cdef uint64_t[::1] room
        if out is None:
            out = np.empty(want, dtype=np.uint64)
        try:
            room = out
        except (ValueError, TypeError, BufferError):
            room = None
        if room is None or room.shape[0] < want:
            raise kernel_error(-EINVAL, f"out: allowed: a writable uint64 array of at least {want}")
        if want == 0:
            return out[:0]
        if want << o >= LARGE_REQUEST:
            self._before_large_request(want << o, flags, node)
        with nogil:
            done = alloc_pages_bulk(self.mem, flags, o, node, ALL_NODES, c, &room[0], want)
        while done < want:
            # Each further block needs what only the long way can bring.
            more = self._alloc_more(o, flags, node, c)
            if more is None:
                break
            room[done] = more
            done += 1
            with nogil:
                done += alloc_pages_bulk(self.mem, flags, o, node, ALL_NODES, c, &room[done],
                                         want - done)
        return out if done == len(out) else out[:done]

    def free_pages_bulk(self, pfns, order=0, cpu=None):
        """Free many blocks of one order; if one of them cannot be freed, none is.

        Runs without the GIL.

        :param pfns: a uint64 array, or anything that can become one.
        :raises KernelError: naming the first pfn that cannot be freed.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef int c = self._cpu(cpu)
        cdef int64_t n, failed = -1
        cdef int rc
        cdef const uint64_t[::1] array
        try:
            array = pfns
        except (ValueError, TypeError, BufferError):
            array = self._as_pfns(pfns)
        n = array.shape[0]
        if n == 0:
            return
        with nogil:
            rc = free_pages_bulk(self.mem, &array[0], n, o, c, &failed)
        if rc:
            raise kernel_error(
                rc, f"free of pfn {array[failed]:#x} (index {failed}), order {o}")
        self._after_free(page_zone(self.mem, array[0]))

    def split_page(self, pfn, order):
        """Turn a block of 2^order pages into single pages, each to be freed by itself.

        :raises KernelError: as free_pages.
        """
        cdef int o = number(order, "order", 0, MAX_ORDER - 1)
        cdef pfn_t page = check_number("pfn", pfn, 0, (1 << 64) - 1)
        cdef int rc = split_page(self.mem, page, o)
        if rc:
            self._refuse_free(rc, page, o)

    def _refuse_free(self, int rc, pfn_t pfn, int order):
        raise kernel_error(rc, f"free of pfn {pfn:#x}, order {order}")

    def _request(self, int gfp, int order, int nid, uint64_t nodes, int cpu):
        """One request without what waits for others; a pfn, or -ENOMEM (__alloc_pages)."""
        return alloc_pages(self.mem, gfp, order, nid, nodes, cpu)

    def _request_reserve(self, int gfp, int order, int nid, uint64_t nodes, int cpu):
        """The last resort of a request that must not fail: half of the min mark; or -ENOMEM."""
        cdef request_t r
        cdef int64_t pfn = -1
        prepare_request(self.mem, &r, gfp, order, nid, nodes, cpu)
        if r.preferred != NULL:
            pfn = get_page_from_freelist(self.mem, &r, WMARK_MIN | ALLOC_MIN_RESERVE)
        return pfn if pfn >= 0 else -ENOMEM

    def _unreserve_highatomic(self, int gfp, int nid, uint64_t nodes):
        """Open one pageblock kept for atomic requests, in a zone that may serve a request.

        :return: whether there was one.
        """
        cdef request_t r
        cdef int i
        prepare_request(self.mem, &r, gfp, 0, nid, nodes, 0)
        for i in range(r.zonelist.nr):
            if (zone_allowed(&r, r.zonelist.zones[i]) and unreserve_highatomic_pageblock(
                    self.mem, r.zonelist.zones[i], r.mt, True)):
                return True
        return False

    def _release(self, pfn_t pfn, int order, int cpu):
        """One free; 0 or a negative errno (__free_pages)."""
        return free_pages(self.mem, pfn, order, cpu)
