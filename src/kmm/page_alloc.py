"""Handing out and taking back pages (mm/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _buddy
from kmm.errors import KernelError, check, kernel_error
from kmm.mmzone import Zone
from kmm.params import (
    MAX_ORDER,
    MIGRATE_UNMOVABLE,
    ZONE_DMA,
    ZONE_DMA32,
    ZONE_MOVABLE,
    ZONE_NORMAL,
)
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

__GFP_DMA, __GFP_HIGHMEM, __GFP_DMA32, __GFP_MOVABLE = 0x1, 0x2, 0x4, 0x8
__GFP_RECLAIMABLE, __GFP_HIGH = 0x10, 0x20
__GFP_DIRECT_RECLAIM, __GFP_KSWAPD_RECLAIM = 0x400, 0x800
__GFP_NOWARN: int = 0x2000
__GFP_RETRY_MAYFAIL: int = 0x4000
__GFP_NOMEMALLOC, __GFP_THISNODE = 0x80000, 0x200000
GFP_KERNEL = 0xCC0
GFP_ATOMIC = 0xA20
GFP_NOWAIT = 0x800
GFP_USER = 0x100CC0
GFP_HIGHUSER_MOVABLE = 0x100CCA

ALLOC_NON_BLOCK, ALLOC_MIN_RESERVE = 0x10, 0x20
ALLOC_NOFRAGMENT, ALLOC_HIGHATOMIC, ALLOC_KSWAPD = 0x100, 0x200, 0x800
WMARK_MIN, WMARK_LOW, WMARK_HIGH = 0, 1, 2

FPI_TO_TAIL = 2


def gfp_zone(gfp: int) -> int:
    """Return the highest zone that a request may use; MOVABLE counts only with HIGHMEM."""
    if gfp & __GFP_DMA:
        return ZONE_DMA
    if gfp & __GFP_DMA32:
        return ZONE_DMA32
    return ZONE_MOVABLE if gfp & 0xA == 0xA else ZONE_NORMAL


def gfp_migratetype(m: Machine, gfp: int) -> int:
    """Return the migratetype that a request prefers."""
    if gfp & (__GFP_MOVABLE | __GFP_RECLAIMABLE) == __GFP_MOVABLE | __GFP_RECLAIMABLE:
        raise kernel_error(-22, f"gfp: {gfp:#x}; allowed: movable or reclaimable, not both")
    if m.memmap_engine.grouping_disabled:
        return MIGRATE_UNMOVABLE
    return gfp >> 3 & 3


def zone_watermark_ok(zone: Zone, order: int, mark: int, highest: int, flags: int) -> bool:
    """Whether a zone stays above a mark (pages) after giving 2^order pages away."""
    free = zone.nr_free_pages - ((1 << order) - 1)
    if not flags & (ALLOC_NON_BLOCK | ALLOC_MIN_RESERVE | ALLOC_HIGHATOMIC):
        free -= zone.nr_reserved_highatomic
    low = mark
    if flags & ALLOC_MIN_RESERVE:
        low -= low // 2
        if flags & ALLOC_NON_BLOCK:
            low -= low // 4
    if free <= low + zone.lowmem_reserve[highest]:
        return False
    if order == 0:
        return True
    counts = zone.free_counts()
    types = (0, 1, 2, 3) if flags & ALLOC_HIGHATOMIC else (0, 1, 2)
    return any(counts[mt][o] for mt in types for o in range(order, MAX_ORDER))


def _candidates(
    m: Machine, gfp: int, nid: int, nodemask: Collection[int] | None
) -> tuple[list[Zone], int]:
    highest = gfp_zone(gfp)
    pgdat = m.nodes[nid]
    zonelist = pgdat.nofallback if gfp & __GFP_THISNODE else pgdat.zonelist
    zones = [
        z for z in zonelist if z.zone_idx <= highest and (nodemask is None or z.nid in nodemask)
    ]
    return zones, highest


def alloc_flags_nofragment(m: Machine, zones: list[Zone]) -> int:
    """Keep a Normal zone's pageblocks pure while the same node has DMA32 to fall back to."""
    if not zones or zones[0].zone_idx != ZONE_NORMAL:
        return 0
    if len(m.n_online) > 1 and not m.nodes[zones[0].nid].zone(ZONE_DMA32).populated:
        return 0
    return ALLOC_NOFRAGMENT


def get_page_from_freelist(
    m: Machine, gfp: int, order: int, zones: list[Zone], highest: int, wmark: int, flags: int
) -> int | None:
    """Take a block from the first zone that has room above its mark; None if none has."""
    mt = gfp_migratetype(m, gfp)
    while True:
        for zone in zones:
            if flags & ALLOC_NOFRAGMENT and len(m.n_online) > 1 and zone.nid != zones[0].nid:
                break
            marks = (zone.watermark_min, zone.watermark_low, zone.watermark_high)
            if not zone_watermark_ok(
                zone, order, marks[wmark] + zone.watermark_boost, highest, flags
            ):
                continue
            pfn = zone.rmqueue(order, mt, flags, m.this_cpu)
            if pfn >= 0:
                return int(pfn)
        if not flags & ALLOC_NOFRAGMENT:
            return None
        flags &= ~ALLOC_NOFRAGMENT


def _slowpath_flags(gfp: int, order: int) -> int:
    flags = ALLOC_KSWAPD if gfp & __GFP_KSWAPD_RECLAIM else 0
    if gfp & __GFP_HIGH:
        flags |= ALLOC_MIN_RESERVE
    if not gfp & __GFP_DIRECT_RECLAIM and not gfp & __GFP_NOMEMALLOC:
        flags |= ALLOC_NON_BLOCK
        if order > 0 and gfp & __GFP_HIGH:
            flags |= ALLOC_HIGHATOMIC
    return flags


@fallible
def __alloc_pages(
    m: Machine, gfp: int, order: int, nid: int, nodemask: Collection[int] | None = None
) -> int:
    """Allocate one block.

    :param gfp: __GFP_* flags; order: block of 2^order pages, 0 to 10.
    :param nid: node whose zonelist is used; nodemask: nodes that may give memory, None for all.
    :return: pfn of the first page.
    :raises OutOfMemory: when no zone has the block above its min mark.
    """
    if not 0 <= order < MAX_ORDER:
        raise kernel_error(-22, f"order: {order}; allowed: 0 to {MAX_ORDER - 1}")
    zones, highest = _candidates(m, gfp, nid, nodemask)
    flags = alloc_flags_nofragment(m, zones)
    if gfp & __GFP_KSWAPD_RECLAIM:
        flags |= ALLOC_KSWAPD
    pfn = get_page_from_freelist(m, gfp, order, zones, highest, WMARK_LOW, flags)
    if pfn is None:
        slow = _slowpath_flags(gfp, order)
        pfn = get_page_from_freelist(m, gfp, order, zones, highest, WMARK_MIN, slow)
    if pfn is None and gfp & __GFP_DIRECT_RECLAIM:
        # Nothing can be reclaimed, but pages parked on per-CPU lists come back.
        drain_all_pages(m)
        pfn = get_page_from_freelist(m, gfp, order, zones, highest, WMARK_MIN, slow)
    if pfn is None:
        raise kernel_error(-12, f"no block of order {order} for node {nid}, gfp {gfp:#x}")
    return pfn


def alloc_pages_bulk(
    m: Machine, out: npt.NDArray[np.uint64], order: int, gfp: int, nid: int
) -> int:
    """Allocate blocks into an array, as many as there are.

    :param out: uint64 array of any length, filled with pfns; order: 0 to 10.
    :return: how many blocks were allocated.
    """
    zones, highest = _candidates(m, gfp, nid, None)
    mt = gfp_migratetype(m, gfp)
    done = _bulk_pass(m, zones, highest, order, mt, out, 0)
    if done < len(out) and gfp & __GFP_DIRECT_RECLAIM and any(z.pcp_pages() for z in zones):
        drain_all_pages(m)
        done = _bulk_pass(m, zones, highest, order, mt, out, done)
    return done


def _bulk_pass(
    m: Machine,
    zones: list[Zone],
    highest: int,
    order: int,
    mt: int,
    out: npt.NDArray[np.uint64],
    done: int,
) -> int:
    for zone in zones:
        spare = zone.nr_free_pages - zone.min_wmark_pages() - zone.lowmem_reserve[highest]
        want = min(len(out) - done, max(0, spare >> order))
        if want:
            done += zone.rmqueue_bulk(order, mt, ALLOC_KSWAPD, m.this_cpu, out[done : done + want])
        if done == len(out):
            break
    return done


@traced
def __free_pages(m: Machine, pfn: int, order: int) -> None:
    """Free one block.

    :raises KernelError: EFAULT where there is no online page, EINVAL for another order than it
        was allocated with, EEXIST if it is free already or inside a larger block.
    """
    check(
        _buddy.free_pages(m.memmap_engine, pfn, order, m.this_cpu),
        f"free of pfn {pfn:#x}, order {order}",
    )


@traced
def __drain_all_pages(m: Machine, zone: Zone | None = None) -> None:
    """Give the per-CPU lists of one zone, or of all, back to the free lists."""
    zones = [zone] if zone is not None else m.all_zones()
    for z in zones:
        z.drain()


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
