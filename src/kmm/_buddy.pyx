"""One zone's counters, free lists and per-CPU lists (struct zone), and what is done to ranges.

The rules of splitting and merging are in ``_freelist.pxd``, of other types' pageblocks in
``_fallback``, of per-CPU lists in ``_pcp``, of whole requests in ``_page_alloc``.  List ends
follow the kernel: onlined and moved blocks go to the tail, freed and split ones to the head,
and a block that is likely to merge soon to the tail.
"""
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kmm._freelist cimport (KMM_DEBUG, add_to_free_list, block_mt, block_of,
                            del_page_from_free_list, free_one_page, is_free_head, list_next,
                            mark_dirty)
from kmm._memmap cimport get_pageblock_migratetype, page_zone, section_online, state_order
from kmm._page_alloc cimport rmqueue
from kmm._page_owner cimport may_go_in_use
from kmm._pcp cimport drain_pages, free_pcppages_bulk, pindex_to_order
from kmm._vmstat cimport NR_ZONE_STATS

cdef enum:
    EBUSY = 16
    ENOMEM = 12


# -- the Python face --------------------------------------------------------------------

cdef int check_request(const zone_t *zone, int order, int mt, int cpu) except -1:
    if not 0 <= order < MAX_ORDER or not 0 <= mt <= MIGRATE_RECLAIMABLE or not 0 <= cpu < zone.nr_cpus:
        raise ValueError(f"rmqueue: order {order}, migratetype {mt} or CPU {cpu} out of range")
    return 0


cdef int check_index(str name, int64_t value, int64_t count) except -1:
    if not 0 <= value < count:
        raise ValueError(f"{name}: {value}; allowed: 0 to {count - 1}")
    return 0


cdef void fold_events(const mem_t *mem, zone_t *zone) noexcept nogil:
    """Add what the CPUs have counted to the zone's own counters."""
    cdef int cpu, order
    cdef int64_t hits
    cdef per_cpu_pages_t *pcp
    for cpu in range(zone.nr_cpus):
        pcp = &zone.pcp[cpu]
        for order in range(4):
            hits = pcp.allocs[order]
            zone.numa_hit += hits
            if mem.node_of_cpu[cpu] == zone.nid:
                zone.numa_local += hits
            else:
                zone.numa_other += hits
            zone.pgalloc += hits << order
            zone.pgfree += pcp.frees[order] << order
            pcp.allocs[order] = pcp.frees[order] = 0


cdef class BuddyZone:
    """The counters, free lists and per-CPU lists of one zone (struct zone)."""

    def __cinit__(self, MemMap memmap, int index, int zone_idx, int nr_cpus, int nid=0):
        cdef int cpu
        if not 0 <= index < memmap.mem.nr_zones or nr_cpus < 1:
            raise ValueError(f"BuddyZone: index {index} or nr_cpus {nr_cpus} out of range")
        memset(&self.z, 0, sizeof(zone_t))
        self.memmap = memmap
        self.z.index, self.z.zone_idx, self.z.nid, self.z.nr_cpus = index, zone_idx, nid, nr_cpus
        self.z.boost_factor = 15000
        self.z.pcp = <per_cpu_pages_t *> calloc(nr_cpus, sizeof(per_cpu_pages_t))
        if self.z.pcp == NULL:
            raise MemoryError("BuddyZone: per-CPU lists")
        for cpu in range(nr_cpus):
            self.z.pcp[cpu].batch = 1
        memmap.set_zone(index, &self.z)

    def __dealloc__(self):
        if self.memmap is not None:
            self.memmap.set_zone(self.z.index, NULL)
        free(self.z.pcp)

    def save(self):
        """The zone's counters, list ends and per-CPU lists as bytes, for restore()."""
        return ((<char *> &self.z)[:sizeof(zone_t)],
                (<char *> self.z.pcp)[:self.z.nr_cpus * sizeof(per_cpu_pages_t)])

    def stat(self):
        """What was counted of each item of vmstat.ZONE_STAT_ITEMS since the machine began."""
        return [self.z.stat[i] for i in range(NR_ZONE_STATS)]

    def restore(self, saved):
        """Put back what save() returned; the records themselves come from the journal."""
        cdef bytes zone = saved[0], pcp = saved[1]
        if (<size_t> len(zone) != sizeof(zone_t)
                or <size_t> len(pcp) != self.z.nr_cpus * sizeof(per_cpu_pages_t)):
            raise ValueError("restore: not what save() returned")
        cdef per_cpu_pages_t *lists = self.z.pcp
        memcpy(&self.z, <char *> zone, sizeof(zone_t))
        self.z.pcp = lists
        memcpy(lists, <char *> pcp, len(pcp))

    # Counters are plain attributes: the chains read and write them as the kernel does.
    @property
    def index(self): return self.z.index
    @property
    def zone_idx(self): return self.z.zone_idx
    @property
    def nr_cpus(self): return self.z.nr_cpus
    @property
    def zone_start_pfn(self): return self.z.zone_start_pfn
    @zone_start_pfn.setter
    def zone_start_pfn(self, uint64_t v): self.z.zone_start_pfn = v
    @property
    def spanned_pages(self): return self.z.spanned_pages
    @spanned_pages.setter
    def spanned_pages(self, uint64_t v): self.z.spanned_pages = v
    @property
    def present_pages(self): return self.z.present_pages
    @present_pages.setter
    def present_pages(self, int64_t v): self.z.present_pages = v
    @property
    def present_early_pages(self): return self.z.present_early_pages
    @present_early_pages.setter
    def present_early_pages(self, int64_t v): self.z.present_early_pages = v
    @property
    def managed_pages(self): return self.z.managed_pages
    @managed_pages.setter
    def managed_pages(self, int64_t v): self.z.managed_pages = v
    @property
    def nr_free_pages(self): return self.z.nr_free_pages
    @nr_free_pages.setter
    def nr_free_pages(self, int64_t v): self.z.nr_free_pages = v
    @property
    def nr_isolate_pageblock(self): return self.z.nr_isolate_pageblock
    @nr_isolate_pageblock.setter
    def nr_isolate_pageblock(self, int64_t v): self.z.nr_isolate_pageblock = v
    @property
    def nr_reserved_highatomic(self): return self.z.nr_reserved_highatomic
    @nr_reserved_highatomic.setter
    def nr_reserved_highatomic(self, int64_t v): self.z.nr_reserved_highatomic = v
    @property
    def watermark_min(self): return self.z.watermark_min
    @watermark_min.setter
    def watermark_min(self, int64_t v): self.z.watermark_min = v
    @property
    def watermark_low(self): return self.z.watermark_low
    @watermark_low.setter
    def watermark_low(self, int64_t v): self.z.watermark_low = v
    @property
    def watermark_high(self): return self.z.watermark_high
    @watermark_high.setter
    def watermark_high(self, int64_t v): self.z.watermark_high = v
    @property
    def watermark_boost(self): return self.z.watermark_boost
    @watermark_boost.setter
    def watermark_boost(self, int64_t v): self.z.watermark_boost = v
    @property
    def boost_factor(self): return self.z.boost_factor
    @boost_factor.setter
    def boost_factor(self, int32_t v): self.z.boost_factor = v
    @property
    def pageset_high(self): return self.z.pageset_high
    @property
    def pageset_batch(self): return self.z.pageset_batch
    @property
    def stat_threshold(self): return self.z.stat_threshold
    @stat_threshold.setter
    def stat_threshold(self, int64_t v): self.z.stat_threshold = v

    @property
    def nr_dirty_free(self):
        """Free pageblocks whose page records the host still keeps."""
        return self.z.nr_dirty_free
    @property
    def vm_events(self):
        """Counts since boot: numa_hit, miss, foreign, local, other, pages allocated and freed."""
        fold_events(&self.memmap.mem, &self.z)
        return {"numa_hit": self.z.numa_hit, "numa_miss": self.z.numa_miss,
                "numa_foreign": self.z.numa_foreign, "numa_local": self.z.numa_local,
                "numa_other": self.z.numa_other, "pgalloc": self.z.pgalloc,
                "pgfree": self.z.pgfree}

    @vm_events.setter
    def vm_events(self, counts):
        """Let the named events count on from other values."""
        if unknown := set(counts) - set(self.vm_events):
            raise ValueError(f"vm_events: {unknown}")
        (self.z.numa_hit, self.z.numa_miss, self.z.numa_foreign, self.z.numa_local,
         self.z.numa_other, self.z.pgalloc, self.z.pgfree) = {**self.vm_events, **counts}.values()

    @property
    def lowmem_reserve(self):
        """Pages kept from allocations that could use a higher zone, one per zone index."""
        return tuple(self.z.lowmem_reserve[i] for i in range(NR_ZONES))

    @lowmem_reserve.setter
    def lowmem_reserve(self, values):
        for i in range(NR_ZONES):
            self.z.lowmem_reserve[i] = values[i]

    def nr_free(self):
        """Free blocks per order, as buddyinfo shows them (isolated ones included)."""
        return [sum([self.z.free_area[mt][o].count for mt in range(MIGRATE_TYPES)])
                for o in range(MAX_ORDER)]

    def free_head(self, int order, int mt):
        """Return the block that the next request of an order and type is served from, or -1."""
        check_index("order", order, MAX_ORDER)
        check_index("mt", mt, MIGRATE_TYPES)
        if self.z.free_area[mt][order].count == 0:
            return -1
        return self.z.free_area[mt][order].head

    def free_counts(self):
        """Blocks on each list: a list per migratetype of counts per order."""
        return [[self.z.free_area[mt][o].count for o in range(MAX_ORDER)]
                for mt in range(MIGRATE_TYPES)]

    def free_masks(self):
        """Per migratetype, the orders that have free blocks, as bits."""
        return [self.z.free_mask[mt] for mt in range(MIGRATE_TYPES)]

    def free_list(self, int order, int mt):
        """The pfns on one free list, head first."""
        check_index("order", order, MAX_ORDER)
        check_index("mt", mt, MIGRATE_TYPES)
        return self._walk(&self.z.free_area[mt][order], order)

    def pcp_list(self, int cpu, int pindex):
        """The pfns on one per-CPU list, head first."""
        check_index("cpu", cpu, self.z.nr_cpus)
        check_index("pindex", pindex, PCP_LISTS)
        return self._walk(&self.z.pcp[cpu].lists[pindex], pindex_to_order(pindex))

    cdef list _walk(self, free_list_t *lst, int order):
        cdef pfn_t pfn = lst.head
        cdef uint64_t i
        cdef list out = []
        for i in range(lst.count):
            out.append(pfn)
            pfn = list_next(&self.memmap.mem, pfn, order)
        return out

    def pcp_state(self, int cpu):
        """(count, high, batch, free_factor) of one CPU's lists; pages, pages, pages, steps."""
        cdef per_cpu_pages_t *pcp
        check_index("cpu", cpu, self.z.nr_cpus)
        pcp = &self.z.pcp[cpu]
        return pcp.count, pcp.high, pcp.batch, pcp.free_factor

    def pcp_pages(self):
        """Pages on all per-CPU lists."""
        cdef int cpu
        cdef int64_t n = 0
        for cpu in range(self.z.nr_cpus):
            n += self.z.pcp[cpu].count
        return n

    def init_free_lists(self):
        """Empty every free list (init_currently_empty_zone)."""
        memset(self.z.free_area, 0, sizeof(self.z.free_area))
        memset(self.z.free_mask, 0, sizeof(self.z.free_mask))
        self.z.nr_dirty_free = 0

    def pageset_update(self, int high, int batch, bint remember):
        """Set high and batch (pages) on every CPU; remember them as the zone's own."""
        cdef int cpu
        if remember:
            self.z.pageset_high, self.z.pageset_batch = high, batch
        for cpu in range(self.z.nr_cpus):
            self.z.pcp[cpu].high, self.z.pcp[cpu].batch = high, batch

    def pageset_reset(self):
        """Fall back to the boot pageset: high 0, batch 1, nothing cached."""
        cdef int cpu
        fold_events(&self.memmap.mem, &self.z)
        for cpu in range(self.z.nr_cpus):
            memset(&self.z.pcp[cpu], 0, sizeof(per_cpu_pages_t))
            self.z.pcp[cpu].batch = 1

    def drain(self, int cpu=-1, int64_t most=-1):
        """Give the pages of one CPU's lists, or of all (-1), back to the free lists.

        :param most: how many pages of each CPU, -1 for all.
        """
        cdef int c
        with nogil:
            for c in range(self.z.nr_cpus):
                if cpu < 0 or c == cpu:
                    if most < 0:
                        drain_pages(&self.memmap.mem, &self.z, c)
                    else:
                        free_pcppages_bulk(&self.memmap.mem, &self.z, &self.z.pcp[c], most, 0)

    def rmqueue(self, int order, int mt, int flags=0, int cpu=0):
        """Take one block of 2^order pages; return its pfn or -ENOMEM."""
        cdef int64_t pfn
        check_request(&self.z, order, mt, cpu)
        with nogil:
            pfn = rmqueue(&self.memmap.mem, &self.z, order, mt, flags, cpu)
        return pfn if pfn >= 0 else -ENOMEM

    def free_range_core(self, pfn_t start, pfn_t nr, int mt, int fpi):
        """Free the pages of a range in the largest aligned blocks (__free_pages_core).

        :param start: first pfn; nr: pages; mt: the list they go to; fpi: FPI_* flags.
        :return: the number of blocks freed.
        """
        cdef pfn_t pfn = start, end = start + nr
        cdef int order
        cdef uint64_t chunks = 0
        self.z.pgfree += <int64_t> nr
        with nogil:
            while pfn < end:
                order = MAX_ORDER - 1
                while order and (pfn & ((<pfn_t> 1 << order) - 1) or pfn + (<pfn_t> 1 << order) > end):
                    order -= 1
                free_one_page(&self.memmap.mem, &self.z, pfn, order, mt, fpi)
                pfn += <pfn_t> 1 << order
                chunks += 1
        return chunks

    def add_free_block(self, pfn_t pfn, int order, int mt):
        """Put a block on a free list as it is, without merging (rebuilding a recorded state)."""
        if order < PAGEBLOCK_ORDER:
            mark_dirty(&self.memmap.mem, pfn)
        add_to_free_list(&self.memmap.mem, &self.z, pfn, order, mt, True)
        if mt != MIGRATE_ISOLATE:
            self.z.nr_free_pages += <int64_t> 1 << order

    def offline_isolated_pages(self, pfn_t start, pfn_t end):
        """Take the free blocks of an isolated range off the lists (__offline_isolated_pages).

        :return: pages taken, or -EBUSY at the first page that is not free.
        """
        cdef pfn_t pfn = start
        cdef int order = 0
        with nogil:
            while pfn < end:
                if not is_free_head(&self.memmap.mem, pfn, &order):
                    if may_go_in_use(&self.memmap.mem, pfn):
                        pfn += 1
                        continue
                    break
                del_page_from_free_list(&self.memmap.mem, &self.z, pfn, order)
                pfn += <pfn_t> 1 << order
            if KMM_DEBUG and pfn >= end:
                junk_fill(&self.memmap.mem, start, end)
        return pfn - start if pfn >= end else -EBUSY

    def dirty_free(self, uint64_t[::1] out):
        """List free pageblocks whose page records the host still keeps.

        :param out: filled with the first pfns of at most so many of them.
        :return: how many there are in it.
        """
        cdef Py_ssize_t n = 0
        cdef int order, mt
        cdef pfn_t pfn, block
        cdef uint64_t i
        cdef mem_t *mem = &self.memmap.mem
        for order in (MAX_ORDER - 1, PAGEBLOCK_ORDER):
            for mt in range(MIGRATE_TYPES):
                pfn = self.z.free_area[mt][order].head
                for i in range(self.z.free_area[mt][order].count):
                    for block in range(pfn, pfn + (<pfn_t> 1 << order), 512):
                        if n == out.shape[0] or n == self.z.nr_dirty_free:
                            return n
                        if block_of(mem, block).state & BLOCK_DIRTY:
                            out[n] = block
                            n += 1
                    pfn = list_next(mem, pfn, order)
        return n

    def forget_dirty(self, const uint64_t[::1] blocks, int64_t kept):
        """Call some of them clean; the caller gives their records' memory back to the host.

        :param blocks: first pfns; kept: so many more may come before it is worth another look.
        """
        cdef Py_ssize_t i
        for i in range(blocks.shape[0]):
            block_of(&self.memmap.mem, blocks[i]).state &= ~BLOCK_DIRTY
        self.z.nr_dirty_free -= blocks.shape[0]
        self.z.dirty_free_limit = self.z.nr_dirty_free + kept

    def recount(self):
        """Count the free blocks of the span by walking its records, not its lists.

        :return: a list per migratetype of counts per order, and the pages on per-CPU lists.
        """
        cdef pfn_t pfn = self.z.zone_start_pfn, end = pfn + self.z.spanned_pages, step
        cdef int order = 0, mt, o
        cdef int64_t counts[MIGRATE_TYPES][MAX_ORDER]
        cdef int64_t pcp = 0
        cdef mem_t *mem = &self.memmap.mem
        memset(counts, 0, sizeof(counts))
        with nogil:
            while pfn < end:
                step = _recount_step(mem, &self.z, pfn, &order, counts, &pcp)
                pfn += step
        return [[counts[mt][o] for o in range(MAX_ORDER)] for mt in range(MIGRATE_TYPES)], pcp


cdef pfn_t _recount_step(mem_t *mem, zone_t *zone, pfn_t pfn, int *order,
                         int64_t counts[MIGRATE_TYPES][MAX_ORDER], int64_t *pcp) noexcept nogil:
    cdef const pageblock_t *block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    cdef pfn_t left = PAGEBLOCK_PAGES - (pfn & (PAGEBLOCK_PAGES - 1))
    if block.zone != zone.index + 1 or not section_online(mem, pfn):
        return left
    if is_free_head(mem, pfn, order):
        counts[block_mt(mem, pfn, order[0])][order[0]] += 1
        return <pfn_t> 1 << order[0]
    if block.kind == KIND_PCP and left == PAGEBLOCK_PAGES:
        pcp[0] += PAGEBLOCK_PAGES
        return left
    if not block.state & BLOCK_DIRTY:
        return left
    if mem.states[pfn] & STATE_PCP:
        pcp[0] += 1 << state_order(mem.states[pfn])
        return <pfn_t> 1 << state_order(mem.states[pfn])
    return 1


cdef void junk_fill(mem_t *mem, pfn_t start, pfn_t end) noexcept nogil:
    # Nobody may look at the records of an offline range; in a debug build they are nonsense.
    memset(&mem.pages[start], 0xFF, (end - start) * sizeof(page_t))
    memset(&mem.states[start], 0xFF, end - start)
    memset(&mem.blocks[start >> PAGEBLOCK_ORDER], 0xFF,
           ((end - start) >> PAGEBLOCK_ORDER) * sizeof(pageblock_t))


def take_page_off_buddy(MemMap memmap, pfn_t pfn):
    """Take one page out of the free block that holds it and poison it; 0, or -EBUSY."""
    cdef mem_t *mem = &memmap.mem
    cdef zone_t *zone = page_zone(mem, pfn) if section_online(mem, pfn) else NULL
    cdef int order = 0, o, mt
    cdef pfn_t head, half
    if zone == NULL:
        return -EBUSY
    for o in range(MAX_ORDER):
        head = pfn & ~((<pfn_t> 1 << o) - 1)
        if is_free_head(mem, head, &order) and order >= o:
            break
    else:
        return -EBUSY
    # The type of the block's first pageblock: the second may have another.
    mt = get_pageblock_migratetype(mem, head)
    del_page_from_free_list(mem, zone, head, order)
    mark_dirty(mem, pfn)
    while order:
        order -= 1
        half = <pfn_t> 1 << order
        if pfn >= head + half:
            add_to_free_list(mem, zone, head, order, mt, False)
            head += half
        else:
            add_to_free_list(mem, zone, head + half, order, mt, False)
    if mt != MIGRATE_ISOLATE:
        zone.nr_free_pages -= 1
    mem.pages[pfn].flags = PF_HWPOISON | PF_TAKEN
    return 0
