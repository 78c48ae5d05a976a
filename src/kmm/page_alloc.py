"""Handing out and taking back pages (mm/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.compaction import (
    COMPACT_COMPLETE,
    COMPACT_CONTENDED,
    COMPACT_CONTINUE,
    COMPACT_DEFERRED,
    COMPACT_PARTIAL_SKIPPED,
    COMPACT_PRIO_ASYNC,
    COMPACT_PRIO_SYNC_FULL,
    COMPACT_PRIO_SYNC_LIGHT,
    COMPACT_SKIPPED,
    COMPACT_SUCCESS,
    compaction_succeeded,
    compaction_suitable,
)
from kmm.errors import check, check_number, kernel_error
from kmm.gfp import (
    __GFP_DIRECT_RECLAIM,
    __GFP_IO,
    __GFP_MOVABLE,
    __GFP_NOFAIL,
    __GFP_NORETRY,
    __GFP_RECLAIMABLE,
    __GFP_RETRY_MAYFAIL,
    __GFP_THISNODE,
    GFP_BITS,
    gfp_zone,
)
from kmm.mmzone import Zone
from kmm.params import MAX_ORDER, ZONE_NORMAL
from kmm.show_mem import warn_alloc
from kmm.trace import fallible, traced
from kmm.vmscan import (
    MAX_RECLAIM_RETRIES,
    PAGE_ALLOC_COSTLY_ORDER,
    zone_reclaimable_pages,
)
from kmm.zonelists import zones_of

if TYPE_CHECKING:
    from kmm.machine import Machine

ALL_NODES = (1 << 64) - 1

FPI_TO_TAIL = 2

ALLOC_WMARK_HIGH, ALLOC_NO_WATERMARKS = 2, 0x04
ALLOC_MIN_RESERVE, ALLOC_CPUSET, ALLOC_KSWAPD = 0x20, 0x40, 0x800
MAX_COMPACT_RETRIES = 16
#: How often a request is tried that the kernel would try for ever: without progress in sight, or
#: because it must not fail.
NOFAIL_LOOPS = 100


def _nodemask_bits(m: Machine, nodemask: Collection[int] | None) -> int:
    if nodemask is None:
        return ALL_NODES
    highest = min(len(m.nodes), 64) - 1
    return sum(1 << check_number("nodemask", nid, 0, highest) for nid in set(nodemask))


def check_gfp(gfp: int) -> int:
    """Return a request's __GFP_* flags if they do not contradict each other.

    :raises InvalidArgument: naming the value and what is allowed.
    """
    gfp = check_number("gfp", gfp, 0, GFP_BITS)
    if gfp & (__GFP_MOVABLE | __GFP_RECLAIMABLE) == __GFP_MOVABLE | __GFP_RECLAIMABLE:
        raise kernel_error(-22, f"gfp: {gfp:#x}; allowed: movable or reclaimable, not both")
    return gfp


def _cpu_of(m: Machine, cpu: int | None) -> int:
    return m.this_cpu if cpu is None else check_number("cpu", cpu, 0, m.nr_cpus - 1)


@fallible
def __alloc_pages(
    m: Machine,
    gfp: int,
    order: int,
    nid: int,
    nodemask: Collection[int] | None = None,
    cpu: int | None = None,
) -> int:
    """Allocate one block.

    :param gfp: __GFP_* flags; order: block of 2^order pages, 0 to 10.
    :param nid: node whose zonelist is used; nodemask: nodes that may give memory, None for all.
    :param cpu: whose per-CPU lists serve, ``m.this_cpu`` if None.
    :return: pfn of the first page.
    :raises OutOfMemory: when no zone has the block above its min mark; InvalidArgument: naming
        the argument.
    """
    gfp = check_gfp(gfp)
    order = check_number("order", order, 0, MAX_ORDER - 1)
    nid = check_number("nid", nid, 0, len(m.nodes) - 1)
    nodes = _nodemask_bits(m, nodemask)
    here = _cpu_of(m, cpu)
    pfn = m._request(gfp, order, nid, nodes, here)
    if pfn < 0 and gfp & __GFP_DIRECT_RECLAIM:
        pfn = __alloc_pages_slowpath(m, gfp, order, nid, nodes, here)
    if pfn < 0:
        warn_alloc(m, gfp, order, nodes)
        raise kernel_error(-12, f"no block of order {order} for node {nid}, gfp {gfp:#x}")
    return pfn


@dataclass(slots=True)
class _Waiting:
    """A request that has to wait for memory (struct alloc_context and what its loop remembers)."""

    m: Machine
    gfp: int
    order: int
    nid: int
    nodes: int
    cpu: int
    flags: int
    can_compact: bool
    compact_priority: int = COMPACT_PRIO_SYNC_LIGHT
    compact_result: int = 0
    compaction_retries: int = 0
    no_progress_loops: int = 0

    @property
    def costly(self) -> bool:
        return self.order > PAGE_ALLOC_COSTLY_ORDER

    def try_freelist(self, flags: int | None = None) -> int:
        """Walk over the free lists once; a pfn or -ENOMEM."""
        return self.m._from_freelist(
            self.gfp,
            self.order,
            self.nid,
            self.nodes,
            self.cpu,
            self.flags if flags is None else flags,
        )


@traced
def __alloc_pages_slowpath(m: Machine, gfp: int, order: int, nid: int, nodes: int, cpu: int) -> int:
    """Wait for memory: kswapd, compaction, direct reclaim, and somebody's end; a pfn or -ENOMEM.

    What the request could have at once it was refused already.  Inside a chain whose records are
    kept for undoing no user's page may change: there only what lies idle comes back.
    """
    w = _Waiting(m, gfp, order, nid, nodes, cpu, m._slowpath_flags(gfp, order), gfp & __GFP_IO != 0)
    if m.memmap_engine.journaling or m.reclaiming:
        pfn = -1 if m.reclaiming else _idle_pages(w)
        return _last_resort(w) if pfn < 0 else pfn
    m.run_kswapds()
    pfn = w.try_freelist()
    if pfn < 0 and w.can_compact and (w.costly or (order > 0 and gfp >> 3 & 3 != 1)):
        pfn = _direct_compact(w, COMPACT_PRIO_ASYNC)
        if pfn < 0 and w.costly and gfp & __GFP_NORETRY:
            if w.compact_result in (COMPACT_SKIPPED, COMPACT_DEFERRED) or gfp & __GFP_THISNODE:
                return _last_resort(w)
            w.compact_priority = COMPACT_PRIO_ASYNC
    if pfn < 0:
        pfn = _retry(w)
    return _last_resort(w) if pfn < 0 else pfn


def _idle_pages(w: _Waiting) -> int:
    """Take back what lies on per-CPU lists and in pageblocks kept for atomic requests."""
    drain_all_pages(w.m)
    pfn = w.try_freelist()
    while pfn < 0 and w.m._unreserve_highatomic(w.gfp, w.nid, w.nodes):
        pfn = w.try_freelist()
    return pfn


def _last_resort(w: _Waiting) -> int:
    """Let a request that must not fail have half of the min marks."""
    if not w.gfp & __GFP_NOFAIL:
        return -1
    return w.try_freelist(ALLOC_MIN_RESERVE)


def _retry(w: _Waiting) -> int:
    """Reclaim and compact as long as that leads somewhere (the retry loop of the slow path)."""
    m = w.m
    for _ in range(NOFAIL_LOOPS):
        if w.flags & ALLOC_KSWAPD:
            m._wake_kswapds(w.gfp, w.order, w.nid, w.nodes)
            m.run_kswapds()
        pfn = w.try_freelist()
        if pfn >= 0:
            return pfn
        progress, pfn = _direct_reclaim(w)
        if pfn < 0:
            pfn = _direct_compact(w, w.compact_priority)
        if pfn >= 0:
            return pfn
        if w.gfp & __GFP_NORETRY:
            return -1
        if w.costly and not (w.can_compact and w.gfp & __GFP_RETRY_MAYFAIL):
            return -1
        if should_reclaim_retry(m, w, progress):
            continue
        if progress and w.can_compact and should_compact_retry(m, w):
            continue
        killed, pfn = __alloc_pages_may_oom(m, w)
        if pfn >= 0 or not killed:
            return pfn
        w.no_progress_loops = 0
    return -1


def _direct_reclaim(w: _Waiting) -> tuple[bool, int]:
    """Reclaim for a request (__alloc_pages_direct_reclaim); whether pages came, and its block."""
    m = w.m
    if not m.ops.try_to_free_pages(m, w.nid, w.order, w.gfp, w.nodes, w.cpu):
        return False, -1
    pfn = w.try_freelist()
    if pfn < 0:
        # What was freed may be kept for atomic requests, or lie on some CPU's lists.
        m._unreserve_highatomic(w.gfp, w.nid, w.nodes)
        drain_all_pages(m)
        pfn = w.try_freelist()
    return True, pfn


def _direct_compact(w: _Waiting, priority: int) -> int:
    """Compact for a request of an order (__alloc_pages_direct_compact); its block or -1."""
    m = w.m
    if w.order == 0:
        return -1
    w.compact_result, pfn = m.ops.try_to_compact_pages(
        m, w.nid, w.order, w.gfp, w.nodes, w.cpu, w.flags, priority
    )
    if w.compact_result == COMPACT_SKIPPED:
        return -1
    m.count_vm_event("compact_stall")
    if pfn < 0:
        pfn = w.try_freelist()
    m.count_vm_event("compact_success" if pfn >= 0 else "compact_fail")
    zone = m.page_zone(pfn) if pfn >= 0 else None
    if zone is not None:
        compaction_succeeded(zone, w.order)
    return pfn


@traced
def should_reclaim_retry(m: Machine, w: _Waiting, progress: bool) -> bool:
    """Whether reclaiming all that could be reclaimed would serve a request.

    :param progress: whether the last time freed anything.
    """
    w.no_progress_loops = 0 if progress and not w.costly else w.no_progress_loops + 1
    if w.no_progress_loops <= MAX_RECLAIM_RETRIES:
        for zone in zones_of(m, w.nid, w.gfp, w.nodes):
            free = zone.nr_free_pages + zone_reclaimable_pages(m, zone)
            if m._would_serve(zone.index, w.gfp, w.order, w.flags, free):
                return True
    return m._unreserve_highatomic(w.gfp, w.nid, w.nodes)


@traced
def should_compact_retry(m: Machine, w: _Waiting) -> bool:
    """Whether compacting once more, or harder, may serve a request of an order."""
    if not w.order:
        return False
    result = w.compact_result
    if result == COMPACT_SUCCESS:
        w.compaction_retries += 1
    if result == COMPACT_SKIPPED:
        return _compaction_zonelist_suitable(w)
    withdrawn = (COMPACT_COMPLETE, COMPACT_DEFERRED, COMPACT_CONTENDED, COMPACT_PARTIAL_SKIPPED)
    most = MAX_COMPACT_RETRIES // 4 if w.costly else MAX_COMPACT_RETRIES
    if result not in withdrawn and w.compaction_retries <= most:
        return True
    if w.compact_priority > (COMPACT_PRIO_SYNC_LIGHT if w.costly else COMPACT_PRIO_SYNC_FULL):
        w.compact_priority -= 1
        w.compaction_retries = 0
        return True
    return False


def _compaction_zonelist_suitable(w: _Waiting) -> bool:
    """Whether some zone could be compacted once its pages are reclaimed."""
    for zone in zones_of(w.m, w.nid, w.gfp, w.nodes):
        free = zone.nr_free_pages + zone_reclaimable_pages(w.m, zone) // w.order
        suitable = compaction_suitable(w.m, zone, w.order, w.flags, gfp_zone(w.gfp), free)
        if suitable == COMPACT_CONTINUE:
            return True
    return False


@traced
def __alloc_pages_may_oom(m: Machine, w: _Waiting) -> tuple[bool, int]:
    """Kill somebody for a request; whether trying again makes sense, and its block."""
    gfp = w.gfp
    pfn = w.try_freelist(ALLOC_WMARK_HIGH | ALLOC_CPUSET)
    if pfn >= 0:
        return False, pfn
    if w.costly or gfp & (__GFP_RETRY_MAYFAIL | __GFP_THISNODE) or gfp_zone(gfp) < ZONE_NORMAL:
        return False, -1
    if not m.ops.out_of_memory(m, gfp, w.order, w.nodes) and not gfp & __GFP_NOFAIL:
        return False, -1
    if gfp & __GFP_NOFAIL:
        pfn = w.try_freelist(ALLOC_NO_WATERMARKS)
    return True, pfn


@traced
def __free_pages(m: Machine, pfn: int, order: int, cpu: int | None = None) -> None:
    """Free one block.

    :param pfn: its first page; order: as it was allocated; cpu: whose per-CPU lists take it,
        ``m.this_cpu`` if None.
    :raises KernelError: EFAULT where there is no online page, EINVAL for another order than it
        was allocated with, EEXIST if it is free already or inside a larger block.
    """
    pfn = check_number("pfn", pfn, 0, (1 << 63) - 1)
    order = check_number("order", order, 0, MAX_ORDER - 1)
    code = m._release(pfn, order, _cpu_of(m, cpu))
    check(code, f"free of pfn {pfn:#x}, order {order}")


@traced
def __drain_all_pages(m: Machine, zone: Zone | None = None) -> None:
    """Give the per-CPU lists of one zone, or of all, back to the free lists."""
    zones = [zone] if zone is not None else m.all_zones()
    for z in zones:
        z.drain()
    m.give_back_records()


@traced
def drain_all_pages(m: Machine, zone: Zone | None = None) -> None:
    """Drain per-CPU lists that have pages."""
    __drain_all_pages(m, zone)


@traced
def zone_pcp_disable(m: Machine, zone: Zone) -> None:
    """Stop a zone's per-CPU caching and empty its lists."""
    zone.pageset_update(0, 1, False)
    __drain_all_pages(m, zone)


@traced
def zone_pcp_enable(m: Machine, zone: Zone) -> None:
    """Give a zone's per-CPU lists their remembered sizes back."""
    zone.pageset_update(zone.pageset_high, zone.pageset_batch, False)


@contextmanager
def allocator_undo(m: Machine) -> Iterator[None]:
    """Put the allocator back, list order included, if the block of code raises anything.

    Freeing what a failed chain had allocated would leave pages on per-CPU lists and pageblocks
    claimed for another migratetype.
    """
    if m.memmap_engine.journaling:
        yield  # the chain that called this one undoes it all
        return
    saved = [(zone, zone.save()) for zone in m.all_zones() if zone.populated]
    m.memmap_engine.begin_journal()
    try:
        yield
    except BaseException:
        m.memmap_engine.end_journal(True)
        for zone, state in saved:
            zone.restore(state)
        raise
    m.memmap_engine.end_journal(False)
