"""Watermarks, reserves, per-CPU list sizes and the writeback limit (mm/page_alloc.c and others)."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from kmm import _watermarks
from kmm.mmzone import Zone
from kmm.params import PAGE_SIZE, PAGEBLOCK_NR_PAGES, ZONE_NORMAL
from kmm.trace import traced
from kmm.zonelists import nr_free_zone_pages

if TYPE_CHECKING:
    from kmm.machine import Machine


MAX_STAT_THRESHOLD = 125


def nr_free_buffer_pages(m: Machine) -> int:
    """Return pages above the high watermarks of the zones up to Normal."""
    return nr_free_zone_pages(m, ZONE_NORMAL)


def zone_batchsize(managed_pages: int) -> int:
    """Return how many pages a per-CPU list takes or gives at a time.

    :param managed_pages: pages of the zone.
    """
    return _watermarks.batchsize(managed_pages)


def zone_highsize(m: Machine, zone: Zone, batch: int, cpu_online: int = 0) -> int:
    """Return how many pages a CPU may keep of a zone.

    :param batch: pages that a per-CPU list takes or gives at a time.
    :param cpu_online: 1 while a CPU of the node comes online, else 0.
    """
    fraction = m.vm.percpu_pagelist_high_fraction
    return _watermarks.highsize(m.memmap_engine, zone.index, batch, cpu_online, fraction)


def zone_set_pageset_high_and_batch(m: Machine, zone: Zone, cpu_online: int = 0) -> None:
    """Recompute a zone's per-CPU sizes; equal ones are not written again."""
    fraction = m.vm.percpu_pagelist_high_fraction
    _watermarks.set_pageset(m.memmap_engine, zone.index, cpu_online, fraction)


@traced
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
    nids = sorted(m.n_online)
    kept = _watermarks.totalreserve(m.memmap_engine, nids)
    for nid, pages in zip(nids, kept, strict=True):
        m.nodes[nid].totalreserve_pages = pages
    m.totalreserve_pages = sum(kept)


@traced
def setup_per_zone_wmarks(m: Machine) -> None:
    """Spread min_free_kbytes over the zones by size, then size reserves and per-CPU lists."""
    _watermarks.setup_wmarks(
        m.memmap_engine,
        sorted(m.n_online),
        m.vm.min_free_kbytes >> 2,
        m.vm.watermark_scale_factor,
        m.vm.percpu_pagelist_high_fraction,
        m.rules.movable_shares_min_free_kbytes,
        m.rules.watermark_divisor_is_32_bits,
    )
    m.recomputed.add("watermarks")
    calculate_totalreserve_pages(m)


@traced
def setup_per_zone_lowmem_reserve(m: Machine) -> None:
    """Keep lower zones from requests that higher zones of the node could serve."""
    ratios = m.vm.lowmem_reserve_ratio
    _watermarks.setup_lowmem_reserve(m.memmap_engine, sorted(m.n_online), ratios)
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


@traced
def refresh_zone_stat_thresholds(m: Machine) -> None:
    """Size how far per-CPU counters may drift from a zone's totals."""
    _watermarks.refresh_stat_thresholds(m.memmap_engine)
    m.recomputed.add("thresholds")


def set_recommended_min_free_kbytes(m: Machine) -> None:
    """Raise min_free_kbytes so that huge pages can be had (khugepaged)."""
    populated = _watermarks.populated_zones(m.memmap_engine, m.n_online, ZONE_NORMAL)
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


def global_dirty_limits(m: Machine) -> tuple[int, int]:
    """Return how many dirty pages start the writing back, and how many make tasks wait for it."""
    free = _watermarks.sum_of_free_pages(m.memmap_engine)
    filelru = _watermarks.sum_of_file_pages(m.memmap_engine)
    for nid in m.n_online:
        base = m.nodes[nid].vmstat
        filelru += base.get("nr_inactive_file", 0) + base.get("nr_active_file", 0)
    dirtyable = max(0, free - m.totalreserve_pages) + filelru + 1
    # The kernel makes the percentages parts of a page first, which loses a few pages.
    limit = m.vm.dirty_ratio * PAGE_SIZE // 100 * dirtyable // PAGE_SIZE
    background = m.vm.dirty_background_ratio * PAGE_SIZE // 100 * dirtyable // PAGE_SIZE
    if m.vm.dirty_bytes:
        limit = -(-m.vm.dirty_bytes // PAGE_SIZE)
    if m.vm.dirty_background_bytes:
        background = -(-m.vm.dirty_background_bytes // PAGE_SIZE)
    return background if background < limit else limit // 2, limit


@traced
def writeback_set_ratelimit(m: Machine) -> None:
    """Set after how many dirtied pages a task looks at the dirty limits."""
    m.ratelimit_pages = max(16, global_dirty_limits(m)[1] // (m.nr_cpus * 32))


# The name in older kernels.
setup_per_zone_pages_min = setup_per_zone_wmarks
