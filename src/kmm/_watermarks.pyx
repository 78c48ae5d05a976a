"""The arithmetic of watermarks, reserves and per-CPU list sizes over all zones (mm/page_alloc.c).

It runs several times in every online and offline of a block, over every zone of the machine.
"""
from kmm._memmap cimport MemMap
from kmm._types cimport *
from kmm._vmstat cimport NR_ACTIVE_FILE, NR_INACTIVE_FILE

cdef enum:
    MAX_STAT_THRESHOLD = 125
    ZONE_MOVABLE = 3


cdef inline int bit_length(uint64_t value) noexcept nogil:
    cdef int n = 0
    while value:
        n += 1
        value >>= 1
    return n


cdef inline zone_t *zone_at(const mem_t *mem, int nid, int zone_idx) noexcept nogil:
    return mem.zones[nid * NR_ZONES + zone_idx]


cdef inline int64_t high_wmark_pages(const zone_t *zone) noexcept nogil:
    return zone.watermark_high + zone.watermark_boost


cdef int zone_batchsize(int64_t managed) noexcept nogil:
    cdef int64_t batch = max(min(managed >> 10, 256) / 4, 1)
    return max(1, (1 << (bit_length(batch + batch / 2) - 1)) - 1)


cdef int zone_highsize(const mem_t *mem, const zone_t *zone, int batch, int cpu_online,
                       int64_t fraction) noexcept nogil:
    cdef int64_t total = (zone.managed_pages / fraction if fraction
                          else zone.watermark_low + zone.watermark_boost)
    cdef int ncpu = mem.nodes[zone.nid].nr_cpus + cpu_online
    # The kernel keeps the share in an int: one of 2^31 pages wraps.
    return max(<int32_t> (total / (ncpu or mem.nr_cpus)), 4 * batch)


cdef void pageset_set_high_and_batch(const mem_t *mem, zone_t *zone, int cpu_online,
                                     int64_t fraction) noexcept nogil:
    cdef int batch = zone_batchsize(zone.managed_pages)
    cdef int high = zone_highsize(mem, zone, batch, cpu_online, fraction)
    cdef int cpu
    if zone.pageset_high == high and zone.pageset_batch == batch:
        return
    zone.pageset_high, zone.pageset_batch = high, batch
    for cpu in range(zone.nr_cpus):
        zone.pcp[cpu].high, zone.pcp[cpu].batch = high, batch


def batchsize(int64_t managed):
    """Return how many pages a per-CPU list of a zone of so many pages takes or gives at a time."""
    return zone_batchsize(managed)


def highsize(MemMap memmap, int zone_index, int batch, int cpu_online, int64_t fraction):
    """Return how many pages a CPU may keep of a zone.

    :param fraction: vm.percpu_pagelist_high_fraction.
    """
    return zone_highsize(&memmap.mem, memmap.mem.zones[zone_index], batch, cpu_online, fraction)


def set_pageset(MemMap memmap, int zone_index, int cpu_online, int64_t fraction):
    """Recompute one zone's per-CPU sizes; equal ones are not written again."""
    pageset_set_high_and_batch(&memmap.mem, memmap.mem.zones[zone_index], cpu_online, fraction)


def setup_wmarks(MemMap memmap, nids, uint64_t pages_min, uint64_t scale, int64_t fraction,
                 bint movable_shares, bint short_divisor):
    """Spread pages_min over the zones of some nodes by size; set marks and per-CPU sizes.

    :param scale: vm.watermark_scale_factor, in ten-thousandths of a zone.
    :param movable_shares: whether Movable zones take part in the spreading.
    :param short_divisor: whether the sum of pages is cut to 32 bits, as the kernel's do_div does.
    """
    cdef mem_t *mem = &memmap.mem
    cdef uint64_t total = 0, managed, low, step
    cdef zone_t *zone
    cdef int nid, i
    for nid in nids:
        for i in range(NR_ZONES):
            if i != ZONE_MOVABLE or movable_shares:
                total += <uint64_t> zone_at(mem, nid, i).managed_pages
    # A sum whose low half is 0 would stop the kernel; here it is used whole.
    if short_divisor and <uint32_t> total:
        total = <uint32_t> total
    for nid in nids:
        for i in range(NR_ZONES):
            zone = zone_at(mem, nid, i)
            managed = <uint64_t> zone.managed_pages
            low = pages_min * managed / total if total else 0
            step = max(low >> 2, managed / 10000 * scale + managed % 10000 * scale / 10000)
            zone.watermark_boost = 0
            zone.watermark_min = <int64_t> low
            zone.watermark_low = <int64_t> (low + step)
            zone.watermark_high = <int64_t> (low + 2 * step)
            pageset_set_high_and_batch(mem, zone, 0, fraction)


def setup_lowmem_reserve(MemMap memmap, nids, ratios):
    """Keep lower zones from requests that higher zones of the node could serve.

    :param ratios: vm.lowmem_reserve_ratio, one number a zone.
    """
    cdef mem_t *mem = &memmap.mem
    cdef zone_t *zone
    cdef int nid, i, j
    cdef int64_t managed, ratio
    for nid in nids:
        for i in range(NR_ZONES - 1):
            zone = zone_at(mem, nid, i)
            ratio = ratios[i]
            managed = 0
            for j in range(NR_ZONES):
                if j > i:
                    managed += zone_at(mem, nid, j).managed_pages
                zone.lowmem_reserve[j] = (managed / ratio
                                          if j > i and ratio and zone.managed_pages else 0)


def totalreserve(MemMap memmap, nids):
    """Return what each of some nodes keeps: the largest reserve of each zone and its high mark."""
    cdef mem_t *mem = &memmap.mem
    cdef zone_t *zone
    cdef int nid, i, j
    cdef int64_t kept, largest
    out = []
    for nid in nids:
        kept = 0
        for i in range(NR_ZONES):
            zone = zone_at(mem, nid, i)
            largest = 0
            for j in range(i, NR_ZONES):
                largest = max(largest, zone.lowmem_reserve[j])
            kept += min(largest + high_wmark_pages(zone), zone.managed_pages)
        out.append(kept)
    return out


def free_zone_pages(MemMap memmap, int nid, int highest):
    """Return pages above the high marks in zones up to an index on a node's fallback list."""
    cdef const zonelist_t *zonelist = &memmap.mem.nodes[nid].fallback
    cdef int64_t total = 0
    cdef int i
    for i in range(zonelist.nr):
        if zonelist.zones[i].zone_idx <= highest:
            total += max(0, zonelist.zones[i].managed_pages - high_wmark_pages(zonelist.zones[i]))
    return total


def refresh_stat_thresholds(MemMap memmap):
    """Size how far per-CPU counters may drift from a zone's totals."""
    cdef mem_t *mem = &memmap.mem
    cdef int i, step, cpus = bit_length(mem.nr_cpus)
    for i in range(mem.nr_zones):
        if mem.zones[i].present_pages:
            step = 1 + bit_length(<uint64_t> mem.zones[i].managed_pages >> 15)
            mem.zones[i].stat_threshold = min(MAX_STAT_THRESHOLD, 2 * cpus * step)


def sum_of_free_pages(MemMap memmap):
    """Return the free pages of all zones."""
    cdef int64_t total = 0
    cdef int i
    for i in range(memmap.mem.nr_zones):
        total += memmap.mem.zones[i].nr_free_pages
    return total


def sum_of_file_pages(MemMap memmap):
    """Pages on the LRU lists of files that came since the machine began."""
    cdef int nid
    cdef int64_t total = 0
    for nid in range(memmap.mem.nr_nodes):
        total += (memmap.mem.nodes[nid].stat[NR_INACTIVE_FILE]
                  + memmap.mem.nodes[nid].stat[NR_ACTIVE_FILE])
    return total


def populated_zones(MemMap memmap, nids, int highest):
    """How many zones of some nodes, up to an index, have present pages."""
    cdef int nid, zone_idx, n = 0
    for nid in nids:
        for zone_idx in range(highest + 1):
            n += zone_at(&memmap.mem, nid, zone_idx).present_pages != 0
    return n
