"""Handing out and taking back pages (mm/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kmm.errors import KernelError, check, check_number, kernel_error
from kmm.mmzone import Zone
from kmm.params import MAX_ORDER, ZONE_DMA, ZONE_DMA32, ZONE_MOVABLE, ZONE_NORMAL
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

__GFP_DMA, __GFP_HIGHMEM, __GFP_DMA32, __GFP_MOVABLE = 0x1, 0x2, 0x4, 0x8
__GFP_RECLAIMABLE, __GFP_HIGH, __GFP_IO = 0x10, 0x20, 0x40
__GFP_DIRECT_RECLAIM, __GFP_KSWAPD_RECLAIM = 0x400, 0x800
__GFP_NOWARN: int = 0x2000
__GFP_RETRY_MAYFAIL: int = 0x4000
__GFP_NOFAIL, __GFP_NOMEMALLOC, __GFP_THISNODE = 0x8000, 0x80000, 0x200000
__GFP_ZERO, __GFP_COMP, __GFP_NORETRY, __GFP_RECLAIM = 0x100, 0x40000, 0x10000, 0xC00
GFP_KERNEL = 0xCC0
GFP_ATOMIC = 0xA20
GFP_NOWAIT = 0x800
GFP_USER = 0x100CC0
GFP_HIGHUSER = 0x100CC2
GFP_HIGHUSER_MOVABLE = 0x100CCA
GFP_TRANSHUGE_LIGHT = 0x1C20CA
GFP_TRANSHUGE = 0x1C24CA

ALL_NODES = (1 << 64) - 1
GFP_BITS = 0xFFFFFFF

FPI_TO_TAIL = 2


def gfp_zone(gfp: int) -> int:
    """Return the highest zone that a request may use; MOVABLE counts only with HIGHMEM."""
    if gfp & __GFP_DMA:
        return ZONE_DMA
    if gfp & __GFP_DMA32:
        return ZONE_DMA32
    return ZONE_MOVABLE if gfp & 0xA == 0xA else ZONE_NORMAL


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
        raise kernel_error(-12, f"no block of order {order} for node {nid}, gfp {gfp:#x}")
    return pfn


def __alloc_pages_slowpath(m: Machine, gfp: int, order: int, nid: int, nodes: int, cpu: int) -> int:
    """Wait for memory: compaction, reclaim, and what else lies idle; a pfn or -ENOMEM.

    Compaction and reclaim plug in at ``m.ops``; what has no user can be neither moved nor
    reclaimed.  Pages parked on per-CPU lists and pageblocks kept for atomic requests come back.
    """
    pfn = -1
    if order > 0:
        for priority in (2, 1):
            result, pfn = m.ops.try_to_compact_pages(m, nid, order, gfp, nodes, cpu, 0, priority)
            if pfn < 0 and result > 1:  # not COMPACT_SKIPPED
                pfn = m._request(gfp, order, nid, nodes, cpu)
            if pfn >= 0:
                return pfn
    if pfn < 0 and m.ops.try_to_free_pages(m, nid, order, gfp):
        pfn = m._request(gfp, order, nid, nodes, cpu)
    if pfn >= 0:
        return pfn
    drain_all_pages(m)
    pfn = m._request(gfp, order, nid, nodes, cpu)
    while pfn < 0 and m._unreserve_highatomic(gfp, nid, nodes):
        pfn = m._request(gfp, order, nid, nodes, cpu)
    if pfn < 0 and gfp & __GFP_NOFAIL:
        pfn = m._request_reserve(gfp, order, nid, nodes, cpu)
    return pfn


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
    """Put the allocator back, list order included, if the block of code raises a KernelError.

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
    except KernelError:
        m.memmap_engine.end_journal(True)
        for zone, state in saved:
            zone.restore(state)
        raise
    except BaseException:
        m.memmap_engine.end_journal(False)
        raise
    m.memmap_engine.end_journal(False)
