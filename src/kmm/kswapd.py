"""The daemon of each node that frees pages before somebody has to wait for them (mm/vmscan.c).

It runs in the machine's virtual time: whoever woke it goes on when it has done its work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm import _vmscan
from kmm.clock import SECOND
from kmm.compaction import reset_isolation_suitable, wakeup_kcompactd
from kmm.gfp import GFP_KERNEL
from kmm.mmzone import PgData, Zone
from kmm.params import PAGEBLOCK_ORDER
from kmm.trace import traced
from kmm.vmscan import (
    DEF_PRIORITY,
    MAX_RECLAIM_RETRIES,
    PGDAT_CONGESTED,
    PGDAT_DIRTY,
    PGDAT_WRITEBACK,
    SWAP_CLUSTER_MAX,
    ScanControl,
    _gfp_up_to,
    compact_gap,
    kswapd_failures,
    managed_zones,
    memalloc,
    set_flags,
    set_kswapd_failures,
    shrink_node,
    swappiness,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

SHORT_SLEEP = SECOND // 10
_ALLOC_HIGH_WMARK = 2


@dataclass(slots=True)
class Kswapd:
    """One node's daemon between its runs."""

    #: What it last reclaimed for, while it sleeps so shortly that a wake-up means it was too early.
    dozing_for: tuple[int, int] | None = None
    naps: int = 0
    running: bool = False


@traced
def pgdat_balanced(m: Machine, pgdat: PgData, order: int, highest_zoneidx: int) -> bool:
    """Whether some zone of a node serves a request of an order above its high watermark.

    A node without zones up to the index is balanced.
    """
    gfp = _gfp_up_to(highest_zoneidx)
    zones = managed_zones(pgdat, highest_zoneidx)
    return not zones or any(
        m._would_serve(z.index, gfp, order, _ALLOC_HIGH_WMARK, z.nr_free_pages) for z in zones
    )


def pgdat_watermark_boosted(pgdat: PgData, highest_zoneidx: int) -> bool:
    """Whether a zone of a node has boosted watermarks."""
    return any(z.watermark_boost for z in managed_zones(pgdat, highest_zoneidx))


def run_kswapds(m: Machine) -> None:
    """Let every kswapd that was woken work until it can sleep again."""
    if m.reclaiming or m.memmap_engine.journaling:
        return
    # What they do may wake another.
    while _vmscan.any_kswapd_request(m):
        for nid, pgdat in m.nodes.items():
            heard = _vmscan.kswapd_request(m, nid)
            if heard is not None and f"kswapd{nid}" in m.kthreads:
                _wake_up(m, pgdat, *heard)


@traced
def wakeup_kswapd(m: Machine, zone: Zone, order: int, highest_zoneidx: int) -> None:
    """Wake the kswapd of a zone's node if there is something to do for it.

    The allocator's own wake-ups leave word inside the engine; kswapd hears it when the allocating
    task next lets it run.

    :param order: of the allocation; highest_zoneidx: the highest zone that may serve it.
    """
    m.memmap_engine.wakeup_kswapd(zone.index, order, highest_zoneidx)
    run_kswapds(m)


def _wake_up(m: Machine, pgdat: PgData, order: int, highest_zoneidx: int) -> None:
    """Start a kswapd if its node is short of something and there is hope."""
    nid = pgdat.node_id
    if kswapd_failures(m, nid) >= MAX_RECLAIM_RETRIES:
        return  # hopeless: whoever needs memory reclaims by himself
    if pgdat_balanced(m, pgdat, order, highest_zoneidx) and not pgdat_watermark_boosted(
        pgdat, highest_zoneidx
    ):
        return
    daemon = m.kswapds.setdefault(nid, Kswapd())
    if daemon.running:
        return  # it looks around once more before it sleeps
    if daemon.dozing_for is not None:
        m.count_vm_event("kswapd_low_wmark_hit_quickly")
        order = max(order, daemon.dozing_for[0])
        highest_zoneidx = max(highest_zoneidx, daemon.dozing_for[1])
    _run(m, pgdat, daemon, order, highest_zoneidx)


def _reclaim(m: Machine, pgdat: PgData, order: int, highest_zoneidx: int) -> None:
    """Reclaim until the node is balanced, or hopeless."""
    with memalloc(m):
        reclaimed_for = balance_pgdat(m, pgdat, order, highest_zoneidx)
        while not _may_sleep(m, pgdat, reclaimed_for, highest_zoneidx):
            m.count_vm_event("kswapd_high_wmark_hit_quickly")
            reclaimed_for = balance_pgdat(m, pgdat, order, highest_zoneidx)


def _run(m: Machine, pgdat: PgData, daemon: Kswapd, order: int, highest_zoneidx: int) -> None:
    """Reclaim until the node is balanced, or hopeless, and fall asleep (kswapd)."""
    daemon.dozing_for = None
    daemon.running = True
    try:
        _reclaim(m, pgdat, order, highest_zoneidx)
    finally:
        daemon.running = False
    # There is free memory again, of which blocks of an order can be made.
    reset_isolation_suitable(m, pgdat)
    wakeup_kcompactd(m, pgdat.node_id, order, highest_zoneidx)
    daemon.dozing_for = (order, highest_zoneidx)
    daemon.naps += 1
    nap = daemon.naps

    def look_again() -> None:
        if daemon.naps != nap or daemon.dozing_for is None:
            return
        daemon.dozing_for = None
        if not _may_sleep(m, pgdat, order, highest_zoneidx):
            m.count_vm_event("kswapd_high_wmark_hit_quickly")
            _run(m, pgdat, daemon, order, highest_zoneidx)

    m.clock.call_after(SHORT_SLEEP, look_again)


def _may_sleep(m: Machine, pgdat: PgData, order: int, highest_zoneidx: int) -> bool:
    """Whether a kswapd has nothing to do, or no hope (prepare_kswapd_sleep)."""
    if kswapd_failures(m, pgdat.node_id) >= MAX_RECLAIM_RETRIES:
        return True
    if not pgdat_balanced(m, pgdat, order, highest_zoneidx):
        return False
    set_flags(m, pgdat.node_id, off=PGDAT_CONGESTED | PGDAT_DIRTY | PGDAT_WRITEBACK)
    return True


@traced
def balance_pgdat(m: Machine, pgdat: PgData, order: int, highest_zoneidx: int) -> int:
    """Reclaim from a node until one of its zones is above its high watermark.

    A watermark that was boosted is reclaimed for without writing and swapping, and then falls.

    :return: the order that it was done for in the end, 0 once there is room to compact for it.
    """
    m.count_vm_event("pageoutrun")
    zones = managed_zones(pgdat, highest_zoneidx)
    boosts = {z.index: z.watermark_boost for z in zones}
    sc = ScanControl(0, GFP_KERNEL, highest_zoneidx, order, _cpu_of(m, pgdat), True, swappiness(m))
    _vmscan.set_reclaim_active(m, pgdat.node_id, highest_zoneidx, True)
    try:
        hopeless = not _reclaim_until_balanced(m, pgdat, sc, sum(boosts.values()))
    finally:
        _vmscan.set_reclaim_active(m, pgdat.node_id, highest_zoneidx, False)
    if hopeless:
        set_kswapd_failures(m, pgdat.node_id, kswapd_failures(m, pgdat.node_id) + 1)
    for zone in zones:
        zone.watermark_boost -= min(zone.watermark_boost, boosts[zone.index])
    if any(boosts.values()):
        wakeup_kcompactd(m, pgdat.node_id, PAGEBLOCK_ORDER, highest_zoneidx)
    return sc.order


def _cpu_of(m: Machine, pgdat: PgData) -> int:
    """The CPU that a node's kswapd runs on: one of its own if it has any."""
    cpus = m.cpus_of_node(pgdat.node_id)
    return cpus[0] if cpus else m.this_cpu


def _reclaim_until_balanced(m: Machine, pgdat: PgData, sc: ScanControl, boost: int) -> bool:
    """The rounds of balance_pgdat; whether there was nothing to do or something was freed.

    :param boost: pages to reclaim for boosted watermarks.
    """
    while sc.priority >= 1:
        before, raise_priority = sc.nr_reclaimed, True
        balanced = pgdat_balanced(m, pgdat, sc.order, sc.reclaim_idx)
        if not balanced and boost:
            # Need goes first: the boost is for later.
            boost, sc.priority = 0, DEF_PRIORITY
            continue
        if balanced and not boost:
            return True
        if boost and sc.priority == DEF_PRIORITY - 2:
            raise_priority = False
        sc.may_writepage = sc.may_swap = not boost
        _vmscan.age_active_anon(m, pgdat.node_id, sc)
        sc.nr_scanned = 0
        if _kswapd_shrink_node(m, pgdat, sc):
            raise_priority = False
        got = sc.nr_reclaimed - before
        boost -= min(boost, got)
        if boost and not got:
            break
        if raise_priority or not got:
            sc.priority -= 1
    return sc.nr_reclaimed > 0


def _kswapd_shrink_node(m: Machine, pgdat: PgData, sc: ScanControl) -> bool:
    """Scan a node for what its zones lack; whether as much was looked at as was wanted."""
    zones = managed_zones(pgdat, sc.reclaim_idx)
    sc.nr_to_reclaim = sum(max(z.high_wmark_pages(), SWAP_CLUSTER_MAX) for z in zones)
    shrink_node(m, pgdat, sc)
    if sc.order and sc.nr_reclaimed >= compact_gap(sc.order):
        sc.order = 0
    return sc.nr_scanned >= sc.nr_to_reclaim
