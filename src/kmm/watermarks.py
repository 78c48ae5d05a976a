"""Watermarks, reserves, per-CPU list sizes and the writeback limit (mm/page_alloc.c and others)."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from kmm.mmzone import Zone
from kmm.params import MAX_NR_ZONES, PAGEBLOCK_NR_PAGES, ZONE_DEVICE, ZONE_MOVABLE, ZONE_NORMAL
from kmm.trace import traced
from kmm.zonelists import nr_free_zone_pages

if TYPE_CHECKING:
    from kmm.machine import Machine


def nr_free_buffer_pages(m: Machine) -> int:
    """Return pages above the high watermarks of the zones up to Normal."""
    return nr_free_zone_pages(m, ZONE_NORMAL)


def zone_batchsize(managed_pages: int) -> int:
    """Return how many pages a per-CPU list takes or gives at a time.

    :param managed_pages: pages of the zone.
    """
    batch = min(managed_pages >> 10, 256) // 4
    batch = max(batch, 1)
    return max(1, (1 << ((batch + batch // 2).bit_length() - 1)) - 1)


def zone_highsize(m: Machine, zone: Zone, batch: int, cpu_online: int = 0) -> int:
    """Return how many pages a CPU may keep of a zone."""
    fraction = m.vm.percpu_pagelist_high_fraction
    total = zone.managed_pages // fraction if fraction else zone.low_wmark_pages()
    ncpu = len(m.cpus_of_node(zone.nid)) + cpu_online
    return int(max(total // (ncpu or m.nr_cpus), 4 * batch))


def zone_set_pageset_high_and_batch(m: Machine, zone: Zone, cpu_online: int = 0) -> None:
    """Recompute a zone's per-CPU sizes; equal ones are not written again."""
    batch = zone_batchsize(zone.managed_pages)
    high = zone_highsize(m, zone, batch, cpu_online)
    if (zone.pageset_high, zone.pageset_batch) != (high, batch):
        zone.pageset_update(high, batch, True)


def setup_zone_pageset(m: Machine, zone: Zone) -> None:
    """Give a zone its own per-CPU lists when its first memory comes."""
    zone.pageset_reset()
    zone_set_pageset_high_and_batch(m, zone)


@traced
def zone_pcp_reset(m: Machine, zone: Zone) -> None:
    """Fall back to the boot pageset when a zone has lost its last page."""
    zone.pageset_reset()


def calculate_totalreserve_pages(m: Machine) -> None:
    """Sum what each node keeps: the largest lowmem reserve of each zone plus its high mark."""
    m.totalreserve_pages = 0
    for nid in m.n_online:
        pgdat = m.nodes[nid]
        pgdat.totalreserve_pages = sum(
            min(max(z.lowmem_reserve[z.zone_idx :]) + z.high_wmark_pages(), z.managed_pages)
            for z in pgdat.zones
        )
        m.totalreserve_pages += pgdat.totalreserve_pages


@traced
def setup_per_zone_wmarks(m: Machine) -> None:
    """Spread min_free_kbytes over the zones by size, then size reserves and per-CPU lists."""
    zones = [z for nid in sorted(m.n_online) for z in m.nodes[nid].zones]
    pages_min = m.vm.min_free_kbytes >> 2
    shared = [z for z in zones if z.zone_idx != ZONE_MOVABLE]
    if m.rules.movable_shares_min_free_kbytes:
        shared = zones
    lowmem = sum(z.managed_pages for z in shared)
    scale = m.vm.watermark_scale_factor
    for zone in zones:
        managed = zone.managed_pages
        low = pages_min * managed // lowmem if lowmem else 0
        step = max(low >> 2, managed // 10000 * scale + managed % 10000 * scale // 10000)
        zone.watermark_boost = 0
        zone.watermark_min = low
        zone.watermark_low = low + step
        zone.watermark_high = low + 2 * step
    for zone in zones:
        zone_set_pageset_high_and_batch(m, zone)
    m.recomputed.add("watermarks")
    calculate_totalreserve_pages(m)


@traced
def setup_per_zone_lowmem_reserve(m: Machine) -> None:
    """Keep lower zones from requests that higher zones of the node could serve."""
    for nid in sorted(m.n_online):
        zones = m.nodes[nid].zones
        for i, zone in enumerate(zones[:ZONE_DEVICE]):
            ratio = m.vm.lowmem_reserve_ratio[i]
            reserve = [0] * MAX_NR_ZONES
            managed = 0
            for j in range(i + 1, MAX_NR_ZONES):
                managed += zones[j].managed_pages
                reserve[j] = managed // ratio if ratio and zone.managed_pages else 0
            zone.lowmem_reserve = reserve
    m.recomputed.add("reserves")
    calculate_totalreserve_pages(m)


def calculate_min_free_kbytes(m: Machine) -> None:
    """Set min_free_kbytes from the size of low memory, unless the user set a larger one."""
    new = isqrt(nr_free_buffer_pages(m) * 4 * 16)
    if new > m.vm.user_min_free_kbytes:
        m.vm.min_free_kbytes = min(max(new, 128), 262144)
    else:
        m.printk(
            f"min_free_kbytes is not updated to {new} because user defined value "
            f"{m.vm.user_min_free_kbytes} is preferred"
        )


def refresh_zone_stat_thresholds(m: Machine) -> None:
    """Size how far per-CPU counters may drift from a zone's totals."""
    for pgdat in m.nodes.values():
        for zone in pgdat.zones:
            if zone.populated:
                step = 1 + (zone.managed_pages >> 15).bit_length()
                zone.stat_threshold = min(125, 2 * m.nr_cpus.bit_length() * step)
    m.recomputed.add("thresholds")


def set_recommended_min_free_kbytes(m: Machine) -> None:
    """Raise min_free_kbytes so that huge pages can be had (khugepaged)."""
    populated = sum(
        z.populated for nid in m.n_online for z in m.nodes[nid].zones[: ZONE_NORMAL + 1]
    )
    recommended = PAGEBLOCK_NR_PAGES * populated * (2 + 9)
    recommended = min(recommended, nr_free_buffer_pages(m) // 20) * 4
    if recommended > m.vm.min_free_kbytes:
        if m.vm.user_min_free_kbytes >= 0:
            m.printk(
                f"khugepaged: raising min_free_kbytes from {m.vm.min_free_kbytes} to "
                f"{recommended} to help transparent hugepage allocations"
            )
        m.vm.min_free_kbytes = recommended
    setup_per_zone_wmarks(m)


def khugepaged_min_free_kbytes_update(m: Machine) -> None:
    """Recompute the raise while huge pages are in use."""
    if m.vm.thp_available and m.vm.thp_enabled != "never":
        set_recommended_min_free_kbytes(m)


@traced
def init_per_zone_wmark_min(m: Machine) -> None:
    """Recompute everything that depends on how much memory there is."""
    calculate_min_free_kbytes(m)
    setup_per_zone_wmarks(m)
    refresh_zone_stat_thresholds(m)
    setup_per_zone_lowmem_reserve(m)
    khugepaged_min_free_kbytes_update(m)


def set_thp_enabled(m: Machine, mode: str) -> None:
    """Switch transparent huge pages (start_stop_khugepaged).

    :param mode: ``always``, ``madvise`` or ``never``.
    """
    m.vm.thp_enabled = mode
    if not m.vm.thp_available:
        return
    if mode != "never":
        set_recommended_min_free_kbytes(m)
    else:
        calculate_min_free_kbytes(m)
        setup_per_zone_wmarks(m)


def set_boost_factor(m: Machine, value: int) -> None:
    """Set how far a fallback may boost a zone's watermarks.

    :param value: 1/10000 of the high watermark; 0 switches boosting off.
    """
    for zone in m.all_zones():
        zone.boost_factor = value


@traced
def writeback_set_ratelimit(m: Machine) -> None:
    """Set after how many dirtied pages a task looks at the dirty limits."""
    free = sum(z.nr_free_pages for p in m.nodes.values() for z in p.zones)
    filelru = sum(
        p.vmstat.get("nr_inactive_file", 0) + p.vmstat.get("nr_active_file", 0)
        for p in m.nodes.values()
    )
    dirtyable = max(0, free - m.totalreserve_pages) + filelru + 1
    m.ratelimit_pages = max(16, dirtyable * m.vm.dirty_ratio // 100 // (m.nr_cpus * 32))


# The name in older kernels.
setup_per_zone_pages_min = setup_per_zone_wmarks
