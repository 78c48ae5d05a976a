"""Reclaim: dropping, writing back and swapping what is least needed (mm/vmscan.c).

The engine scans the lists; here is who reclaims when, how hard, and when that is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmm import _vmscan
from kmm.clock import SECOND
from kmm.compaction import COMPACT_SKIPPED, COMPACT_SUCCESS, compaction_suitable
from kmm.gfp import __GFP_DMA, __GFP_DMA32, __GFP_HIGHMEM, __GFP_IO, __GFP_MOVABLE, gfp_zone
from kmm.mmzone import PgData, Zone
from kmm.page_writeback import wakeup_flusher_threads
from kmm.params import ZONE_NAMES, ZONE_NORMAL
from kmm.shrinker import shrink_slab
from kmm.trace import traced
from kmm.zonelists import zones_of

if TYPE_CHECKING:
    from kmm.machine import Machine

SWAP_CLUSTER_MAX = 32
DEF_PRIORITY = 12
MAX_RECLAIM_RETRIES = 16
PAGE_ALLOC_COSTLY_ORDER = 3
JIFFY = SECOND // 250

PGDAT_DIRTY, PGDAT_WRITEBACK, PGDAT_CONGESTED = 1, 2, 4

#: What a scan of a node counts beside what it looked at and freed.
_COUNTED = "dirty unqueued_dirty congested writeback immediate taken file_taken".split()


@dataclass(slots=True)
class ScanControl:
    """What one reclaimer wants and what it got (struct scan_control); pages."""

    nr_to_reclaim: int
    gfp: int
    reclaim_idx: int
    order: int = 0
    cpu: int = 0
    kswapd: bool = False
    swappiness: int = 60
    priority: int = DEF_PRIORITY
    may_writepage: bool = True
    may_swap: bool = True
    force_deactivate: bool = False
    skipped_deactivate: bool = False
    wakeup_flushers: bool = False
    compaction_ready: bool = False
    nr_scanned: int = 0
    nr_reclaimed: int = 0
    nr: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))


def compact_gap(order: int) -> int:
    """Return how many free pages compaction for an order wants to work with."""
    return 2 << order


def swappiness(m: Machine) -> int:
    """Return vm.swappiness."""
    return m.vm.kept.get("swappiness", 60)


@contextmanager
def memalloc(m: Machine) -> Iterator[None]:
    """Be somebody who reclaims: what that needs itself is not reclaimed for (PF_MEMALLOC)."""
    before, m.reclaiming = m.reclaiming, True
    try:
        yield
    finally:
        m.reclaiming = before


def set_flags(m: Machine, nid: int, on: int = 0, off: int = 0) -> None:
    """Set and clear a node's PGDAT_* flags."""
    failures, flags, _, _ = _vmscan.reclaim_state(m, nid)
    _vmscan.set_reclaim_state(m, nid, failures, (flags | on) & ~off)


def kswapd_failures(m: Machine, nid: int) -> int:
    """How often in a row a node's kswapd has freed nothing."""
    return _vmscan.reclaim_state(m, nid)[0]


def set_kswapd_failures(m: Machine, nid: int, failures: int) -> None:
    """Set that."""
    _vmscan.set_reclaim_state(m, nid, failures, _vmscan.reclaim_state(m, nid)[1])


def managed_zones(pgdat: PgData, highest_zoneidx: int) -> list[Zone]:
    """The zones of a node up to an index that the allocator has pages of."""
    return [z for z in pgdat.zones[: highest_zoneidx + 1] if z.managed_pages]


@traced
def zone_reclaimable_pages(m: Machine, zone: Zone) -> int:
    """Return how many pages of a zone reclaim could free; its free pages if there are none."""
    return _vmscan.zone_reclaimable_pages(m, zone.index)


def reclaim_throttle(m: Machine, timeout: int) -> None:
    """Let the others get on for a while.

    :param timeout: ns of the machine's clock.
    """
    before, m.reclaiming = m.reclaiming, False
    try:
        m.clock.advance(timeout)
    finally:
        m.reclaiming = before


# -- one node -----------------------------------------------------------------------------------


@traced
def shrink_node(m: Machine, pgdat: PgData, sc: ScanControl) -> None:
    """Scan a node's lists and slabs at a priority, again while that helps a request of an order.

    :param sc: what is wanted; what was looked at and freed is added.
    """
    nid, reclaimable = pgdat.node_id, False
    while True:
        before = sc.nr_reclaimed
        sc.nr = dict.fromkeys(_COUNTED, 0)
        _vmscan.shrink_lists(m, nid, sc)
        sc.nr_reclaimed += shrink_slab(m, nid, sc.priority)
        got = sc.nr_reclaimed - before
        reclaimable = reclaimable or got > 0
        _note_node(m, nid, sc)
        if sc.wakeup_flushers:
            sc.wakeup_flushers = False
            wakeup_flusher_threads(m)
        if not should_continue_reclaim(m, pgdat, got, sc):
            break
    if reclaimable:
        set_kswapd_failures(m, nid, 0)


def _note_node(m: Machine, nid: int, sc: ScanControl) -> None:
    """Remember of a node what its lists were full of, and wait where they turn too fast."""
    n = sc.nr
    if sc.kswapd:
        if n["writeback"] and n["writeback"] == n["taken"]:
            set_flags(m, nid, on=PGDAT_WRITEBACK)
        if n["unqueued_dirty"] == n["file_taken"]:
            set_flags(m, nid, on=PGDAT_DIRTY)
        if n["immediate"]:
            reclaim_throttle(m, SECOND // 10)
        if n["dirty"] and n["dirty"] == n["congested"]:
            set_flags(m, nid, on=PGDAT_CONGESTED)
    elif _vmscan.reclaim_state(m, nid)[1] & PGDAT_CONGESTED:
        reclaim_throttle(m, JIFFY)


@traced
def should_continue_reclaim(m: Machine, pgdat: PgData, reclaimed: int, sc: ScanControl) -> bool:
    """Whether a request of an order needs more pages of a node before compaction can help.

    :param reclaimed: pages freed by the last scan.
    """
    costly = sc.order > PAGE_ALLOC_COSTLY_ORDER
    if not sc.order or not sc.gfp & __GFP_IO or not (costly or sc.priority < DEF_PRIORITY - 2):
        return False
    if not reclaimed:
        return False
    zones = managed_zones(pgdat, sc.reclaim_idx)
    if any(
        compaction_suitable(m, z, sc.order, 0, sc.reclaim_idx) != COMPACT_SKIPPED for z in zones
    ):
        return False
    stat = m.memmap_engine.node_stat(pgdat.node_id)
    inactive = stat[2] + (stat[0] if m.swap is not None and m.swap.nr_free else 0)
    return inactive > compact_gap(sc.order)


def compaction_ready(m: Machine, zone: Zone, sc: ScanControl) -> bool:
    """Whether a zone serves a request of an order, or has enough free pages to compact for it."""
    suitable = compaction_suitable(m, zone, sc.order, 0, sc.reclaim_idx)
    if suitable in (COMPACT_SUCCESS, COMPACT_SKIPPED) or not sc.gfp & __GFP_IO:
        return suitable == COMPACT_SUCCESS and bool(sc.gfp & __GFP_IO)
    mark = zone.high_wmark_pages() + compact_gap(sc.order)
    return zone.nr_free_pages > mark + zone.lowmem_reserve[sc.reclaim_idx]


def _gfp_up_to(zone_idx: int) -> int:
    """The gfp bits of a request that may use zones up to an index."""
    both = __GFP_HIGHMEM | __GFP_MOVABLE
    return (__GFP_DMA, __GFP_DMA32, 0, both, both)[zone_idx]


# -- direct reclaim -----------------------------------------------------------------------------


@traced
def allow_direct_reclaim(m: Machine, nid: int) -> bool:
    """Whether a node has enough of its reserves left for others to reclaim for themselves."""
    if kswapd_failures(m, nid) >= MAX_RECLAIM_RETRIES:
        return True
    reserve = free = 0
    for zone in managed_zones(m.nodes[nid], ZONE_NORMAL):
        if zone_reclaimable_pages(m, zone):
            reserve += zone.min_wmark_pages()
            free += zone.nr_free_pages
    return not reserve or free > reserve // 2


@traced
def throttle_direct_reclaim(m: Machine, zones: list[Zone], gfp: int) -> None:
    """Let a node's kswapd work while its reserves are nearly used up."""
    zone = next((z for z in zones if z.zone_idx <= ZONE_NORMAL), None)
    if zone is None or allow_direct_reclaim(m, zone.nid):
        return
    m.count_vm_event("pgscan_direct_throttle")
    for _ in range(MAX_RECLAIM_RETRIES):
        m.memmap_engine.wakeup_kswapd(zone.index, 0, zone.zone_idx)
        m.run_kswapds()
        if allow_direct_reclaim(m, zone.nid):
            return
        reclaim_throttle(m, JIFFY)


@traced
def try_to_free_pages(m: Machine, nid: int, order: int, gfp: int, nodes: int, cpu: int) -> int:
    """Reclaim pages for a request that found none.

    :param nid: node whose zonelist is reclaimed from; order, gfp: of the request; nodes: bit k
        lets node k give; cpu: on which the request runs.
    :return: pages reclaimed, at least 1 if the request should be tried again.
    """
    zones = zones_of(m, nid, gfp, nodes)
    throttle_direct_reclaim(m, zones, gfp)
    sc = ScanControl(SWAP_CLUSTER_MAX, gfp, gfp_zone(gfp), order, cpu, swappiness=swappiness(m))
    with memalloc(m):
        return _do_try_to_free_pages(m, zones, sc)


def _do_try_to_free_pages(m: Machine, zones: list[Zone], sc: ScanControl) -> int:
    while True:
        m.count_vm_event(f"allocstall_{ZONE_NAMES[max(sc.reclaim_idx, 0)].lower()}")
        while sc.priority >= 0:
            sc.nr_scanned = 0
            _shrink_zones(m, zones, sc)
            if sc.nr_reclaimed >= sc.nr_to_reclaim or sc.compaction_ready:
                break
            sc.priority -= 1
        if sc.nr_reclaimed:
            return sc.nr_reclaimed
        if sc.compaction_ready:
            return 1
        if not sc.skipped_deactivate:
            return 0
        # What is active was spared although nothing else is left.
        sc.priority, sc.force_deactivate, sc.skipped_deactivate = DEF_PRIORITY, True, False


def _shrink_zones(m: Machine, zones: list[Zone], sc: ScanControl) -> None:
    """Scan each node of some zones once."""
    last = first = -1
    for zone in zones:
        if sc.order > PAGE_ALLOC_COSTLY_ORDER and compaction_ready(m, zone, sc):
            sc.compaction_ready = True
            continue
        if zone.nid == last:
            continue
        last = zone.nid
        first = last if first < 0 else first
        shrink_node(m, m.nodes[zone.nid], sc)
    if first >= 0 and sc.priority == 1 and not sc.nr_reclaimed:
        reclaim_throttle(m, JIFFY)
