"""One run of compaction over a zone: when it may begin, its rounds, and when it ends.

Models compact_zone of mm/compaction.c; the scanners are in ``_compaction_scan``.  A run needs no
memory of its own: what it has isolated is in its compact_control_t.
"""
from libc.string cimport memset

from kmm._allocator cimport PageAllocator
from kmm._buddy cimport BuddyZone
from kmm._compaction_scan cimport *
from kmm._fallback cimport can_steal_fallback, suitable_fallback
from kmm._free_pages cimport free_pages_bulk
from kmm._freelist cimport is_free_head
from kmm._memmap cimport get_pageblock_migratetype
from kmm._migrate cimport move_folio, putback_folio
from kmm._pcp cimport drain_pages
from kmm._rmap cimport *
from kmm._swap cimport lru_make_room
from kmm._watermarks cimport wmark_pages, zone_watermark_ok

cdef enum:
    ENOMEM = 12
    HPAGE_ORDER = 9                 # COMPACTION_HPAGE_ORDER
    COMPACT_MAX_DEFER_SHIFT = 6


# -- how fragmented a zone is ---------------------------------------------------------------------

# struct contig_page_info
cdef struct contig_page_info_t:
    int64_t free_pages
    int64_t free_blocks_total
    int64_t free_blocks_suitable


cdef void fill_contig_page_info(const zone_t *zone, int suitable_order,
                                contig_page_info_t *info) noexcept nogil:
    cdef int order, mt
    cdef int64_t blocks
    info.free_pages = info.free_blocks_total = info.free_blocks_suitable = 0
    for order in range(MAX_ORDER):
        blocks = 0
        for mt in range(MIGRATE_TYPES):
            blocks += <int64_t> zone.free_area[mt][order].count
        info.free_blocks_total += blocks
        info.free_pages += blocks << order
        if order >= suitable_order:
            info.free_blocks_suitable += blocks << (order - suitable_order)


cdef int64_t fragmentation_index_of(const zone_t *zone, int order) noexcept nogil:
    cdef contig_page_info_t info
    fill_contig_page_info(zone, order, &info)
    if not info.free_blocks_total:
        return 0
    if info.free_blocks_suitable:
        return -1000
    return 1000 - ((1000 + info.free_pages * 1000 / (<int64_t> 1 << order))
                   / info.free_blocks_total)


cdef int64_t unusable_share(const zone_t *zone, int order, int64_t scale) noexcept nogil:
    """Of each `scale` free pages, how many lie in blocks below an order; 0 of no free pages."""
    cdef contig_page_info_t info
    fill_contig_page_info(zone, order, &info)
    if not info.free_pages:
        return 0
    return ((info.free_pages - (info.free_blocks_suitable << order)) * scale
            / info.free_pages)


# -- may it begin, is it done ---------------------------------------------------------------------

cdef int suitable(const zone_t *zone, int order, int alloc_flags, int highest,
                  int extfrag_threshold, int64_t spare) noexcept nogil:
    """SUCCESS, SKIPPED, NOT_SUITABLE_ZONE or CONTINUE, had the zone `spare` more free pages."""
    cdef int64_t mark, index
    if order < 0:
        return COMPACT_CONTINUE
    if zone_watermark_ok(zone, order, wmark_pages(zone, alloc_flags) - spare, highest,
                         alloc_flags):
        return COMPACT_OK
    mark = wmark_pages(zone, WMARK_LOW if order > COSTLY_ORDER else WMARK_MIN)
    if not zone_watermark_ok(zone, 0, mark + (<int64_t> 2 << order) - spare, highest, 0):
        return COMPACT_SKIPPED
    if order > COSTLY_ORDER:
        index = fragmentation_index_of(zone, order)
        if 0 <= index <= extfrag_threshold:
            return COMPACT_NOT_SUITABLE_ZONE
    return COMPACT_CONTINUE


cdef bint page_is_free(const mem_t *mem, const zone_t *zone, int order, int mt) noexcept nogil:
    """Whether a request could have a block, or claim one of another type for good."""
    cdef int o
    for o in range(order, MAX_ORDER):
        if zone.free_mask[mt] >> o & 1:
            return True
        if can_steal_fallback(mem, o, mt) and suitable_fallback(zone, o, mt) >= 0:
            return True
    return False


cdef int finished(const mem_t *mem, compact_control_t *cc) noexcept nogil:
    """What __compact_finished says, before the caller goes on."""
    cdef zone_t *zone = cc.zone
    cdef int ret = COMPACT_NO_SUITABLE_PAGE
    if compact_scanners_met(cc):
        zone.compact.cached_migrate_pfn[0] = zone.compact.cached_migrate_pfn[1] = (
            zone.zone_start_pfn)
        zone.compact.cached_free_pfn = pageblock_start_pfn(zone_end_pfn(zone) - 1)
        if cc.flags & CC_DIRECT:
            zone.compact.blockskip_flush = 1
        return COMPACT_COMPLETE if cc.whole_zone else COMPACT_PARTIAL_SKIPPED
    if cc.flags & CC_PROACTIVE:
        ret = (COMPACT_CONTINUE if unusable_share(zone, HPAGE_ORDER, 100) > cc.proactive_low
               else COMPACT_OK)
    elif cc.order < 0 or pageblock_start_pfn(cc.migrate_pfn) != cc.migrate_pfn:
        return COMPACT_CONTINUE
    elif page_is_free(mem, zone, cc.order, cc.migratetype):
        return COMPACT_OK
    if cc.contended or cc.flags & CC_SIGNAL:
        ret = COMPACT_CONTENDED
    return ret


# -- pageblocks that are to be passed over --------------------------------------------------------

cdef bint reset_isolation_pfn(mem_t *mem, const zone_t *zone, pfn_t pfn, bint source,
                              bint target) noexcept nogil:
    """Look at a pageblock again if a sample of it has something to move, or room."""
    cdef pfn_t start = max(pageblock_start_pfn(pfn), zone.zone_start_pfn), at = start
    cdef pfn_t end = min(pageblock_end_pfn(pfn), zone_end_pfn(zone))
    cdef int order = 0
    if not pageblock_in_zone(mem, start, end, zone) or skip_persistent(mem, pfn):
        return False
    if source and target and not get_pageblock_skip(mem, pfn):
        return True
    if not source and target and get_pageblock_migratetype(mem, pfn) != MIGRATE_MOVABLE:
        return False
    while at < end:
        if (source and mem.pages[at].flags & PF_LRU) or (target and is_free_head(mem, at, &order)):
            set_pageblock_skip(mem, at, False)
            return True
        at += 1 << COSTLY_ORDER
    return False


cdef void reset_isolation_suitable(mem_t *mem, zone_t *zone) noexcept nogil:
    """Forget which pageblocks to pass over, and begin where there is something to do."""
    cdef compact_t *compact = &zone.compact
    cdef pfn_t migrate_pfn = zone.zone_start_pfn, free_pfn = zone_end_pfn(zone) - 1
    cdef pfn_t reset_migrate = free_pfn, reset_free = migrate_pfn
    cdef bint source_set = False, free_set = False
    if not compact.blockskip_flush:
        return
    compact.blockskip_flush = 0
    while migrate_pfn < free_pfn:
        if (reset_isolation_pfn(mem, zone, migrate_pfn, True, source_set)
                and migrate_pfn < reset_migrate):
            source_set = True
            reset_migrate = compact.init_migrate_pfn = migrate_pfn
            compact.cached_migrate_pfn[0] = compact.cached_migrate_pfn[1] = migrate_pfn
        if (reset_isolation_pfn(mem, zone, free_pfn, free_set, True)
                and free_pfn > reset_free):
            free_set = True
            reset_free = compact.init_free_pfn = compact.cached_free_pfn = free_pfn
        migrate_pfn += PAGEBLOCK_PAGES
        free_pfn -= PAGEBLOCK_PAGES
    if reset_migrate >= reset_free:
        compact.cached_migrate_pfn[0] = compact.cached_migrate_pfn[1] = migrate_pfn
        compact.cached_free_pfn = free_pfn


# -- a run ----------------------------------------------------------------------------------------

cdef inline bint held(const compact_control_t *cc, const folio_t *folio) noexcept nogil:
    """Whether a page cannot be moved now, however often it is tried."""
    if folio.flags[0] & PF_PINNED:
        return True
    return folio.flags[0] & PF_WRITEBACK and cc.mode != MIGRATE_SYNC


cdef inline bint has_target(mem_t *mem, compact_control_t *cc, const uint64_t *sources,
                            int64_t *moved) noexcept nogil:
    """Whether there is a target for one more page (compaction_alloc).

    Pages that were left so far are freed before the free lists are looked at.
    """
    cdef int64_t failed = 0
    if cc.nr_freepages == 0:
        free_pages_bulk(mem, sources, moved[0], 0, cc.cpu, &failed)
        mem.events[PGMIGRATE_SUCCESS] += moved[0]
        moved[0] = 0
        isolate_freepages(mem, cc)
    return cc.nr_freepages != 0


cdef int64_t migrate_round(mem_t *mem, compact_control_t *cc) noexcept nogil:
    """Move what is isolated; how many pages stay where they are, or -ENOMEM (migrate_pages)."""
    cdef uint64_t sources[MIGRATE_ROOM]
    cdef uint64_t stay[MIGRATE_ROOM]
    cdef int64_t left = cc.nr_migratepages, moved = 0, kept = 0, failed = 0, i
    cdef folio_t folio
    cdef bint out_of_targets = False
    # The list's first page is the one that was isolated last.
    while left and not out_of_targets:
        if not has_target(mem, cc, sources, &moved):
            out_of_targets = True
            break
        left -= 1
        read_folio(mem, cc.migratepages[left], &folio)
        if held(cc, &folio):
            stay[kept] = folio.pfn
            kept += 1
            continue
        cc.nr_freepages -= 1
        move_folio(mem, &folio, cc.freepages[cc.nr_freepages])
        sources[moved] = folio.pfn
        moved += 1
    # Those that are held are tried again, each with a target that comes back.
    if kept and not out_of_targets:
        out_of_targets = not has_target(mem, cc, sources, &moved)
    free_pages_bulk(mem, sources, moved, 0, cc.cpu, &failed)
    mem.events[PGMIGRATE_SUCCESS] += moved
    mem.events[PGMIGRATE_FAIL] += kept + (out_of_targets and left > 0)
    for i in range(kept):
        read_folio(mem, stay[i], &folio)
        putback_folio(mem, &folio)
    cc.nr_migratepages = left
    putback_migratepages(mem, cc)
    return -ENOMEM if out_of_targets else kept


cdef void release_freepages(mem_t *mem, compact_control_t *cc) noexcept nogil:
    """Give isolated free pages back; the free scanner begins anew at the highest of them."""
    cdef uint64_t pfns[FREE_ROOM]
    cdef int64_t n = cc.nr_freepages, i, failed = 0
    cdef pfn_t highest = 0
    if n == 0:
        return
    for i in range(n):
        pfns[i] = cc.freepages[n - 1 - i]
        highest = max(highest, pfns[i])
    free_pages_bulk(mem, pfns, n, 0, cc.cpu, &failed)
    cc.nr_freepages = 0
    highest = pageblock_start_pfn(highest)
    if highest > cc.zone.compact.cached_free_pfn:
        cc.zone.compact.cached_free_pfn = highest


cdef void begin_run(compact_control_t *cc) noexcept nogil:
    """Set the scanners where the last run left them, or at the ends of the zone."""
    cdef zone_t *zone = cc.zone
    cdef compact_t *compact = &zone.compact
    cdef pfn_t start = zone.zone_start_pfn, end = zone_end_pfn(zone)
    cc.whole_zone = cc.flags & CC_WHOLE_ZONE != 0
    if cc.whole_zone:
        cc.migrate_pfn = start
        cc.free_pfn = pageblock_start_pfn(end - 1)
        return
    cc.migrate_pfn = compact.cached_migrate_pfn[cc.mode != MIGRATE_ASYNC]
    cc.free_pfn = compact.cached_free_pfn
    if not start <= cc.free_pfn < end:
        cc.free_pfn = compact.cached_free_pfn = pageblock_start_pfn(end - 1)
    if not start <= cc.migrate_pfn < end:
        cc.migrate_pfn = start
        compact.cached_migrate_pfn[0] = compact.cached_migrate_pfn[1] = start
    if cc.migrate_pfn <= compact.init_migrate_pfn:
        cc.whole_zone = True


cdef bint after_failure(compact_control_t *cc, int64_t err, pfn_t *last_migrated) noexcept nogil:
    """What a round that left pages behind means; whether the run ends."""
    if err == -ENOMEM and not compact_scanners_met(cc):
        return True
    if direct_async(cc):
        cc.migrate_pfn = block_end_pfn(cc.migrate_pfn - 1, cc.order)
        last_migrated[0] = 0
    return False


cdef int run_rounds(mem_t *mem, compact_control_t *cc) noexcept nogil:
    cdef compact_t *compact = &cc.zone.compact
    cdef pfn_t last_migrated = 0, begin
    cdef bint update_cached = (cc.mode == MIGRATE_ASYNC and compact.cached_migrate_pfn[0]
                               == compact.cached_migrate_pfn[1])
    cdef int ret, what
    cdef int64_t err
    while True:
        ret = finished(mem, cc)
        if ret != COMPACT_CONTINUE and ret != COMPACT_NO_SUITABLE_PAGE:
            return ret
        # Each page that moves or goes back gets an entry, and leaves a stale one behind.
        if lru_make_room(mem, <uint64_t> 1 << cc.zone.nid, MIGRATE_ROOM):
            return COMPACT_CONTENDED
        begin = cc.migrate_pfn
        cc.rescan = pageblock_start_pfn(last_migrated) == pageblock_start_pfn(begin)
        what = isolate_migratepages(mem, cc)
        if what == ISOLATE_ABORT:
            putback_migratepages(mem, cc)
            return COMPACT_CONTENDED
        if what == ISOLATE_NONE:
            if update_cached:
                compact.cached_migrate_pfn[1] = compact.cached_migrate_pfn[0]
        else:
            update_cached = False
            last_migrated = begin
            err = migrate_round(mem, cc)
            if err and after_failure(cc, err, &last_migrated):
                return COMPACT_CONTENDED
        if (cc.order > 0 and last_migrated
                and last_migrated < cc.migrate_pfn & ~((<pfn_t> 1 << cc.order) - 1)):
            drain_pages(mem, cc.zone, cc.cpu)
            last_migrated = 0
        if mem.capture != NULL and mem.capture.pfn >= 0:
            return COMPACT_OK


cdef bint compaction_restarting(const zone_t *zone, int order) noexcept nogil:
    if order < zone.compact.order_failed:
        return False
    return (zone.compact.defer_shift == COMPACT_MAX_DEFER_SHIFT
            and zone.compact.considered >= 1 << COMPACT_MAX_DEFER_SHIFT)


cdef int compact(mem_t *mem, compact_control_t *cc) noexcept nogil:
    cdef int ret = suitable(cc.zone, cc.order, cc.alloc_flags, cc.highest_zoneidx,
                            cc.extfrag_threshold, 0)
    if ret == COMPACT_NOT_SUITABLE_ZONE:
        ret = COMPACT_SKIPPED
    if ret != COMPACT_CONTINUE:
        return ret
    if compaction_restarting(cc.zone, cc.order):
        reset_isolation_suitable(mem, cc.zone)
    begin_run(cc)
    ret = run_rounds(mem, cc)
    release_freepages(mem, cc)
    mem.events[COMPACT_MIGRATE_SCANNED] += cc.migrate_scanned
    mem.events[COMPACT_FREE_SCANNED] += cc.free_scanned
    mem.events[COMPACT_ISOLATED] += cc.isolated
    return ret


# -- for Python -----------------------------------------------------------------------------------

def compact_zone(PageAllocator m, BuddyZone zone, int order, int migratetype, int mode, int flags,
                 int alloc_flags, int highest_zoneidx, int extfrag_threshold, int proactive_low,
                 int cpu, bint capture):
    """Move used pages of a zone upward and free ones downward until a block of an order is free.

    Runs without the GIL.

    :param order: what is wanted; -1 for all that can be had.
    :param migratetype: of the request; mode: MIGRATE_ASYNC, _SYNC_LIGHT or _SYNC; flags: CC_*.
    :param alloc_flags: which watermark the request has to pass; highest_zoneidx: its zones.
    :param extfrag_threshold: vm.extfrag_threshold; proactive_low: the score that ends a proactive
        run; cpu: whose lists freed pages pass.
    :param capture: whether the block is kept for the caller as soon as it is there.
    :return: a COMPACT_* result; the pfn of the block kept, or -1; pages that each scanner looked
        at.
    """
    cdef mem_t *mem = m.mem
    cdef compact_control_t cc
    cdef capture_t keep
    cdef int ret
    if not -1 <= order < MAX_ORDER or not 0 <= migratetype <= MIGRATE_RECLAIMABLE:
        raise ValueError(f"compact_zone: order {order}, migratetype {migratetype}")
    if not 0 <= highest_zoneidx < NR_ZONES or not 0 <= cpu < zone.z.nr_cpus:
        raise ValueError(f"compact_zone: highest_zoneidx {highest_zoneidx}, CPU {cpu}")
    if mem.journal != NULL:
        raise ValueError("compact_zone: pages of users do not change inside a chain of records")
    memset(&cc, 0, sizeof(cc))
    cc.zone, cc.order, cc.search_order, cc.migratetype = &zone.z, order, order, migratetype
    cc.mode, cc.flags, cc.alloc_flags, cc.cpu = mode, flags, alloc_flags, cpu
    cc.highest_zoneidx, cc.extfrag_threshold = highest_zoneidx, extfrag_threshold
    cc.proactive_low = proactive_low
    keep.zone, keep.order, keep.pfn = &zone.z, order, -1
    if capture and order > 0:
        mem.capture = &keep
    with nogil:
        ret = compact(mem, &cc)
    mem.capture = NULL
    return (COMPACT_OK if keep.pfn >= 0 else ret), keep.pfn, cc.migrate_scanned, cc.free_scanned


def compaction_suitable(BuddyZone zone, int order, int alloc_flags, int highest_zoneidx,
                        int extfrag_threshold, int64_t free):
    """Whether to compact a zone: SUCCESS, SKIPPED, NOT_SUITABLE_ZONE or CONTINUE of COMPACT_*."""
    return suitable(&zone.z, order, alloc_flags, highest_zoneidx, extfrag_threshold,
                    free - zone.z.nr_free_pages)


def fragmentation_index(BuddyZone zone, int order):
    """Why a request of an order fails: -1000 it does not, 0 want of memory, 1000 fragmentation."""
    return fragmentation_index_of(&zone.z, order)


def unusable_free_index(BuddyZone zone, int order):
    """Of 1000 free pages, how many lie in blocks below an order; 1000 where none is free."""
    return unusable_share(&zone.z, order, 1000) if zone.z.nr_free_pages else 1000


def extfrag_for_order(BuddyZone zone, int order):
    """Of 100 free pages, how many lie in blocks below an order; 0 where none is free."""
    return unusable_share(&zone.z, order, 100)


def reset_skip_bits(PageAllocator m, BuddyZone zone):
    """Look at a zone's pageblocks again, if a full run has ended (__reset_isolation_suitable)."""
    reset_isolation_suitable(m.mem, &zone.z)


def pageblock_skip(PageAllocator m, pfn_t pfn):
    """Whether compaction passes a pageblock over."""
    return bool(get_pageblock_skip(m.mem, pfn))


def compact_state(BuddyZone zone):
    """What a zone remembers of compaction, by the names of struct zone without compact_."""
    return dict(zone.z.compact)


def set_compact_state(BuddyZone zone, **values):
    """Change what a zone remembers of compaction.

    :param values: some of the names that compact_state has.
    :raises KeyError: for another name.
    """
    state = dict(zone.z.compact)
    for name, value in values.items():
        if name not in state:
            raise KeyError(name)
        state[name] = value
    zone.z.compact = state
