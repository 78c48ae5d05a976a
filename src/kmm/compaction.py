"""Compaction: used pages move together, so that free ones make large blocks (mm/compaction.c).

What happens to pages is engine code (``_compaction``); here is who asks for it: requests that
found no block, kcompactd, and the files that a user writes to.  kcompactd works while virtual time
passes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm import _compaction
from kmm.errors import check_number
from kmm.gfp import __GFP_FS, __GFP_IO, GFP_KERNEL, gfp_zone
from kmm.mmzone import PgData, Zone
from kmm.params import MAX_NR_ZONES, MAX_ORDER, PAGEBLOCK_ORDER
from kmm.trace import traced
from kmm.zonelists import zones_of

if TYPE_CHECKING:
    from kmm.machine import Machine

ALL_NODES = (1 << 64) - 1

#: enum compact_result.
COMPACT_NOT_SUITABLE_ZONE, COMPACT_SKIPPED, COMPACT_DEFERRED = range(3)
COMPACT_NO_SUITABLE_PAGE, COMPACT_CONTINUE, COMPACT_COMPLETE = range(3, 6)
COMPACT_PARTIAL_SKIPPED, COMPACT_CONTENDED, COMPACT_SUCCESS = range(6, 9)
RESULT_NAMES = tuple(
    """not_suitable_zone skipped deferred no_suitable_page continue complete partial_skipped
    contended success""".split()
)
#: enum compact_priority, and what direct compaction uses first and by default.
COMPACT_PRIO_SYNC_FULL, COMPACT_PRIO_SYNC_LIGHT, COMPACT_PRIO_ASYNC = range(3)
MIN_COMPACT_PRIORITY, DEF_COMPACT_PRIORITY = COMPACT_PRIO_SYNC_FULL, COMPACT_PRIO_SYNC_LIGHT
INIT_COMPACT_PRIORITY = COMPACT_PRIO_ASYNC
#: enum migrate_mode.
MIGRATE_ASYNC, MIGRATE_SYNC_LIGHT, MIGRATE_SYNC = range(3)
#: Of a run: the engine's CC_*.
CC_IGNORE_SKIP_HINT, CC_IGNORE_BLOCK_SUITABLE, CC_DIRECT, CC_WHOLE_ZONE = 1, 2, 4, 8
CC_UNEVICTABLE, CC_FS, CC_PROACTIVE, CC_SIGNAL = 16, 32, 64, 128

COMPACT_MAX_DEFER_SHIFT = 6
HPAGE_FRAG_CHECK_INTERVAL = 500_000_000  # ns
_ALL_THERE_IS = CC_IGNORE_SKIP_HINT | CC_WHOLE_ZONE


@dataclass(slots=True)
class Kcompactd:
    """What a node's kcompactd was woken for, and when it looks by itself again (ns)."""

    max_order: int = 0
    highest_zoneidx: int = MAX_NR_ZONES - 1
    next_check: int = 0
    proactive_trigger: bool = False


@dataclass(frozen=True, slots=True)
class CompactControl:
    """What a run over a zone is for (struct compact_control)."""

    order: int
    gfp: int
    mode: int
    flags: int = 0
    alloc_flags: int = 0
    highest_zoneidx: int = 0
    cpu: int | None = None
    capture: bool = False


@dataclass(frozen=True, slots=True)
class CompactRun:
    """What came of a run: the COMPACT_* result, the block kept (or -1), pages looked at."""

    result: int
    captured: int
    migrate_scanned: int
    free_scanned: int


def _tunable(m: Machine, name: str, default: int) -> int:
    return m.vm.kept.get(name, default)


def _migratetype(m: Machine, gfp: int) -> int:
    return 0 if m.memmap_engine.grouping_disabled else min(gfp >> 3 & 3, 2)


@traced
def compact_zone(m: Machine, zone: Zone, cc: CompactControl) -> CompactRun:
    """Compact a zone until a block of the order is free, or the scanners have met.

    :return: what came of it.
    """
    flags = cc.flags
    if _tunable(m, "compact_unevictable_allowed", 1):
        flags |= CC_UNEVICTABLE
    if cc.gfp & __GFP_FS:
        flags |= CC_FS
    if m.signal_pending:
        flags |= CC_SIGNAL
    run = _compaction.compact_zone(
        m,
        zone,
        cc.order,
        _migratetype(m, cc.gfp),
        cc.mode,
        flags,
        cc.alloc_flags,
        cc.highest_zoneidx,
        _tunable(m, "extfrag_threshold", 500),
        fragmentation_score_wmark(m, True),
        m.this_cpu if cc.cpu is None else cc.cpu,
        cc.capture,
    )
    m.give_back_records()
    return CompactRun(*run)


def compaction_suitable(
    m: Machine,
    zone: Zone,
    order: int,
    alloc_flags: int,
    highest_zoneidx: int,
    free: int | None = None,
) -> int:
    """Whether to compact a zone: COMPACT_SUCCESS, _SKIPPED or _CONTINUE.

    :param order: -1 for all that can be had; alloc_flags: which watermark counts (0 min, 1 low,
        2 high); highest_zoneidx: of the request.
    :param free: free pages to reckon with, what the zone has if None.
    """
    result = _compaction.compaction_suitable(
        zone,
        order,
        alloc_flags,
        highest_zoneidx,
        _tunable(m, "extfrag_threshold", 500),
        zone.nr_free_pages if free is None else free,
    )
    return COMPACT_SKIPPED if result == COMPACT_NOT_SUITABLE_ZONE else result


def fragmentation_index(zone: Zone, order: int) -> int:
    """Return -1000 if a zone has a block, else how far fragmentation is to blame, 0 to 1000."""
    return _compaction.fragmentation_index(zone, order)


# -- putting off what failed ----------------------------------------------------------------


def defer_compaction(zone: Zone, order: int) -> None:
    """Let the next requests pass a zone by: twice as many as after the last failure."""
    state = _compaction.compact_state(zone)
    _compaction.set_compact_state(
        zone,
        considered=0,
        defer_shift=min(state["defer_shift"] + 1, COMPACT_MAX_DEFER_SHIFT),
        order_failed=min(order, state["order_failed"]),
    )


def compaction_deferred(zone: Zone, order: int) -> bool:
    """Whether a request passes a zone by; counts it if so."""
    state = _compaction.compact_state(zone)
    if order < state["order_failed"]:
        return False
    limit = 1 << state["defer_shift"]
    considered = min(state["considered"] + 1, limit)
    _compaction.set_compact_state(zone, considered=considered)
    return considered < limit


def compaction_defer_reset(zone: Zone, order: int, alloc_success: bool) -> None:
    """Take note of an order that a zone could give after all.

    :param alloc_success: whether it was allocated; then the whole put-off ends.
    """
    state = _compaction.compact_state(zone)
    if alloc_success:
        _compaction.set_compact_state(zone, considered=0, defer_shift=0)
    if order >= state["order_failed"]:
        _compaction.set_compact_state(zone, order_failed=order + 1)


def compaction_succeeded(zone: Zone, order: int) -> None:
    """Take note that a request that had compaction run got its block from a zone."""
    _compaction.set_compact_state(zone, blockskip_flush=0)
    compaction_defer_reset(zone, order, True)


def reset_isolation_suitable(m: Machine, pgdat: PgData) -> None:
    """Forget which pageblocks of a node to pass over, where a full run has ended since."""
    for zone in pgdat.zones:
        if zone.populated:
            _compaction.reset_skip_bits(m, zone)


# -- for a request --------------------------------------------------------------------------


@traced
def try_to_compact_pages(
    m: Machine,
    nid: int,
    order: int,
    gfp: int,
    nodes: int = ALL_NODES,
    cpu: int | None = None,
    flags: int = 0,
    priority: int = DEF_COMPACT_PRIORITY,
) -> tuple[int, int]:
    """Compact the zones that may serve a request, the nearest first, until one has its block.

    :param nid: whose zonelist; order, gfp: of the request; nodes: bit k lets node k give.
    :param cpu: whose per-CPU lists freed pages pass, ``m.this_cpu`` if None.
    :param flags: the ALLOC_* of the request: which watermark it has to pass (0 min).
    :param priority: COMPACT_PRIO_ASYNC, _SYNC_LIGHT or _SYNC_FULL.
    :return: the highest COMPACT_* of all zones, _SKIPPED where none may be compacted; and the pfn
        of a block that was made and kept for the caller, who has it then, or -1.
    """
    if not gfp & __GFP_IO or m.memmap_engine.journaling:
        return COMPACT_SKIPPED, -1
    check_number("order", order, 1, MAX_ORDER - 1)
    check_number("priority", priority, MIN_COMPACT_PRIORITY, INIT_COMPACT_PRIORITY)
    full = priority == MIN_COMPACT_PRIORITY
    cc = CompactControl(
        order,
        gfp,
        MIGRATE_ASYNC if priority == COMPACT_PRIO_ASYNC else MIGRATE_SYNC_LIGHT,
        CC_DIRECT | (_ALL_THERE_IS | CC_IGNORE_BLOCK_SUITABLE if full else 0),
        flags,
        _highest_zoneidx(gfp),
        cpu,
        True,
    )
    rc = COMPACT_SKIPPED
    for zone in zones_of(m, nid, gfp, nodes):
        if not full and compaction_deferred(zone, order):
            rc = max(COMPACT_DEFERRED, rc)
            continue
        run = compact_zone(m, zone, cc)
        rc = max(run.result, rc)
        if run.result == COMPACT_SUCCESS:
            compaction_defer_reset(zone, order, False)
            return rc, run.captured
        ended = run.result in (COMPACT_COMPLETE, COMPACT_PARTIAL_SKIPPED)
        if priority != COMPACT_PRIO_ASYNC and ended:
            defer_compaction(zone, order)
        if m.signal_pending:
            break
    return rc, -1


def _highest_zoneidx(gfp: int) -> int:
    return gfp_zone(gfp)


# -- for a user -----------------------------------------------------------------------------


@traced
def compact_node(m: Machine, nid: int) -> None:
    """Compact all zones of a node as far as it goes."""
    cc = CompactControl(-1, GFP_KERNEL, MIGRATE_SYNC, _ALL_THERE_IS)
    for zone in m.nodes[nid].zones:
        if zone.populated:
            compact_zone(m, zone, cc)


@traced
def compact_nodes(m: Machine) -> None:
    """Compact all online nodes."""
    for nid in sorted(m.n_online):
        compact_node(m, nid)


def compaction_proactiveness_changed(m: Machine) -> None:
    """Let every kcompactd look at its node again, unless it is not to look at all."""
    for nid in sorted(m.n_online):
        m.kcompactds.setdefault(nid, Kcompactd()).proactive_trigger = True


# -- kcompactd ------------------------------------------------------------------------------


def fragmentation_score_node(pgdat: PgData) -> int:
    """How fragmented a node is for huge pages, 0 to 100: its zones by their size."""
    present = sum(z.present_pages for z in pgdat.zones) + 1
    return sum(
        zone.present_pages * _compaction.extfrag_for_order(zone, PAGEBLOCK_ORDER) // present
        for zone in pgdat.zones
        if zone.populated
    )


def fragmentation_score_wmark(m: Machine, low: bool) -> int:
    """The score at which proactive compaction ends, or, without low, above which it begins."""
    mark = max(100 - _tunable(m, "compaction_proactiveness", 20), 5)
    return mark if low else min(mark + 10, 100)


def should_proactive_compact_node(m: Machine, pgdat: PgData) -> bool:
    """Whether a node is fragmented enough for kcompactd to begin by itself."""
    if not _tunable(m, "compaction_proactiveness", 20):
        return False
    return fragmentation_score_node(pgdat) > fragmentation_score_wmark(m, False)


@traced
def proactive_compact_node(m: Machine, nid: int) -> None:
    """Compact a node until each zone's score is low enough."""
    cc = CompactControl(-1, GFP_KERNEL, MIGRATE_SYNC_LIGHT, _ALL_THERE_IS | CC_PROACTIVE)
    for zone in m.nodes[nid].zones:
        if zone.populated:
            compact_zone(m, zone, cc)


def kcompactd_node_suitable(m: Machine, nid: int, order: int, highest_zoneidx: int) -> bool:
    """Whether some zone of a node lacks a block of an order and could make one."""
    return any(
        compaction_suitable(m, zone, order, 0, highest_zoneidx) == COMPACT_CONTINUE
        for zone in m.nodes[nid].zones[: highest_zoneidx + 1]
        if zone.populated
    )


def wakeup_kcompactd(m: Machine, nid: int, order: int, highest_zoneidx: int) -> None:
    """Have a node's kcompactd make a block of an order as soon as time passes.

    :param order: 0 for nothing; highest_zoneidx: the highest zone that has to have one.
    """
    if not order or f"kcompactd{nid}" not in m.kthreads:
        return
    daemon = m.kcompactds.setdefault(nid, Kcompactd())
    daemon.max_order = max(daemon.max_order, order)
    daemon.highest_zoneidx = min(daemon.highest_zoneidx, highest_zoneidx)
    if kcompactd_node_suitable(m, nid, daemon.max_order, daemon.highest_zoneidx):
        m.clock.call_at(m.clock.now, lambda: kcompactd_do_work(m, nid))


@traced
def kcompactd_do_work(m: Machine, nid: int) -> None:
    """Compact each zone of a node that lacks a block of the order that was asked for."""
    daemon = m.kcompactds.get(nid)
    if daemon is None or not daemon.max_order or f"kcompactd{nid}" not in m.kthreads:
        return
    order, highest = daemon.max_order, daemon.highest_zoneidx
    m.count_vm_event("compact_daemon_wake")
    for zone in m.nodes[nid].zones[: highest + 1]:
        if zone.populated:
            _kcompactd_zone(m, zone, order, highest)
    daemon.max_order, daemon.highest_zoneidx = 0, MAX_NR_ZONES - 1
    daemon.next_check = m.clock.now + HPAGE_FRAG_CHECK_INTERVAL


def _kcompactd_zone(m: Machine, zone: Zone, order: int, highest: int) -> None:
    if compaction_deferred(zone, order):
        return
    if compaction_suitable(m, zone, order, 0, zone.zone_idx) != COMPACT_CONTINUE:
        return
    run = compact_zone(
        m, zone, CompactControl(order, GFP_KERNEL, MIGRATE_SYNC_LIGHT, 0, 0, highest)
    )
    if run.result == COMPACT_SUCCESS:
        compaction_defer_reset(zone, order, False)
    elif run.result in (COMPACT_PARTIAL_SKIPPED, COMPACT_COMPLETE):
        # What lies on per-CPU lists may be what is lacking.
        zone.drain()
        defer_compaction(zone, order)
    m.count_vm_event("compact_daemon_migrate_scanned", run.migrate_scanned)
    m.count_vm_event("compact_daemon_free_scanned", run.free_scanned)


def kcompactd_look(m: Machine) -> None:
    """Let the kcompactds whose time has come look how fragmented their nodes are."""
    if m.memmap_engine.journaling or not _tunable(m, "compaction_proactiveness", 20):
        return
    for nid in sorted(m.n_memory):
        if f"kcompactd{nid}" not in m.kthreads:
            continue
        daemon = m.kcompactds.setdefault(nid, Kcompactd())
        if m.clock.now < daemon.next_check and not daemon.proactive_trigger:
            continue
        daemon.proactive_trigger = False
        timeout, pgdat = HPAGE_FRAG_CHECK_INTERVAL, m.nodes[nid]
        if should_proactive_compact_node(m, pgdat):
            before = fragmentation_score_node(pgdat)
            proactive_compact_node(m, nid)
            if fragmentation_score_node(pgdat) >= before:
                timeout <<= COMPACT_MAX_DEFER_SHIFT
        daemon.next_check = m.clock.now + timeout


def watch_fragmentation(m: Machine) -> None:
    """Let kcompactds look whenever time passes on a machine."""
    machine = weakref.ref(m)

    def look() -> None:
        here = machine()
        if here is not None:
            kcompactd_look(here)

    m.clock.watchers.append(look)
