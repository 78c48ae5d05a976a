"""Allocating and freeing: zonelists, watermarks, the slow path's order (mm/page_alloc.c)."""
from kmm._fallback cimport (is_bad, reserve_highatomic_pageblock, rmqueue_buddy,
                            unreserve_highatomic_pageblock)
from kmm._freelist cimport mark_allocated, page_next, prefetch, rmqueue_smallest
from kmm._gfp cimport *
from kmm._memmap cimport wakeup_kswapd
from kmm._pcp cimport pcp_allowed_order, rmqueue_pcplist, take_batches, take_from_pcp
from kmm._watermarks cimport pages_above, wmark_pages, zone_watermark_ok

cdef enum:
    ENOMEM = 12

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
    cdef int64_t pfn
    while True:
        pfn = -1
        if flags & ALLOC_HIGHATOMIC:
            pfn = rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn < 0:
            pfn = rmqueue_buddy(mem, zone, order, mt, flags)
        if pfn < 0 and flags & (ALLOC_OOM | ALLOC_NON_BLOCK):
            pfn = rmqueue_smallest(mem, zone, order, MIGRATE_HIGHATOMIC)
        if pfn < 0:
            return -1
        zone.nr_free_pages -= <int64_t> 1 << order
        if not is_bad(mem, <pfn_t> pfn, order):
            break
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


cdef int64_t alloc_slowpath(mem_t *mem, const request_t *r) noexcept nogil:
    """What can be had without waiting for anybody: reserves as the request's rights go."""
    cdef int flags = slowpath_flags(r.gfp, r.order)
    cdef request_t unmasked
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
    if flags & ALLOC_CPUSET:
        return get_page_from_freelist(mem, r, flags)
    prepare_request(mem, &unmasked, r.gfp, r.order, r.nid, ALL_NODES, r.cpu)
    return get_page_from_freelist(mem, &unmasked, flags)


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


# -- for those who have waited --------------------------------------------------------------------

cdef int64_t alloc_pages_flags(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes,
                               int cpu, int flags) noexcept nogil:
    cdef request_t r
    cdef int64_t pfn = -1
    prepare_request(mem, &r, gfp, order, nid, nodes, cpu)
    if r.preferred != NULL:
        pfn = get_page_from_freelist(mem, &r, flags)
    return pfn if pfn >= 0 else -ENOMEM


cdef void wake_kswapds(mem_t *mem, uint32_t gfp, int order, int nid, uint64_t nodes) noexcept nogil:
    cdef request_t r
    prepare_request(mem, &r, gfp, order, nid, nodes, 0)
    wake_all_kswapds(mem, &r)


cdef bint would_serve(mem_t *mem, const zone_t *zone, uint32_t gfp, int order, int flags,
                      int64_t free) noexcept nogil:
    cdef zone_t as_if = zone[0]
    as_if.nr_free_pages = free
    return zone_watermark_ok(&as_if, order, wmark_pages(zone, flags), gfp_zone(gfp), flags)


cdef bint unreserve_highatomic(mem_t *mem, uint32_t gfp, int nid, uint64_t nodes) noexcept nogil:
    cdef request_t r
    cdef int i
    prepare_request(mem, &r, gfp, 0, nid, nodes, 0)
    for i in range(r.zonelist.nr):
        if (zone_allowed(&r, r.zonelist.zones[i])
                and unreserve_highatomic_pageblock(mem, r.zonelist.zones[i], r.mt, True)):
            return True
    return False
