"""A slow, readable twin of the whole allocator: nodes, zonelists, requests, statistics.

Of the slow path there is what happens where nothing can be reclaimed, moved or killed: waking
kswapd, the reserves that a request may touch, its retries, opening pageblocks kept for atomic ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from tests.reference.free_area_twin import UNMOVABLE, Pages, block_start
from tests.reference.watermark_twin import (
    DMA,
    DMA32,
    HIGH_ATOMIC,
    KSWAPD,
    MIN_RESERVE,
    MOVABLE_ZONE,
    NO_WATERMARKS,
    NOFRAGMENT,
    NON_BLOCK,
    NORMAL,
    WMARK_HIGH,
    WMARK_LOW,
    WMARK_MIN,
    Tunables,
)
from tests.reference.zone_twin import TwinZone

GFP_DMA, GFP_HIGHMEM, GFP_DMA32, GFP_MOVABLE, GFP_HIGH = 0x1, 0x2, 0x4, 0x8, 0x20
GFP_ATOMIC_BIT, GFP_DIRECT_RECLAIM, GFP_KSWAPD_RECLAIM = 0x200, 0x400, 0x800
GFP_NOFAIL, GFP_MEMALLOC, GFP_NOMEMALLOC, GFP_THISNODE = 0x8000, 0x20000, 0x80000, 0x200000

GFP_FS, GFP_RETRY_MAYFAIL, GFP_NORETRY = 0x80, 0x4000, 0x10000
COSTLY = 3
MAX_LOOPS = 100


def highest_zone(gfp: int) -> int:
    if gfp & GFP_DMA:
        return DMA
    if gfp & GFP_DMA32:
        return DMA32
    return MOVABLE_ZONE if gfp & GFP_MOVABLE and gfp & GFP_HIGHMEM else NORMAL


def slow_flags(gfp: int, order: int) -> int:
    flags = WMARK_MIN
    if gfp & GFP_HIGH:
        flags |= MIN_RESERVE
    if gfp & GFP_KSWAPD_RECLAIM:
        flags |= KSWAPD
    if not gfp & GFP_DIRECT_RECLAIM and not gfp & GFP_NOMEMALLOC:
        flags |= NON_BLOCK
        if order > 0 and gfp & GFP_HIGH:
            flags |= HIGH_ATOMIC
    return flags


@dataclass
class Node:
    """A node's zonelists, and what its kswapd has heard: times, order, highest zone."""

    fallback: list[TwinZone] = field(default_factory=list)
    nofallback: list[TwinZone] = field(default_factory=list)
    kswapd: tuple[int, int, int] = (0, -1, 0)


@dataclass
class Request:
    """One call's wishes."""

    order: int
    gfp: int
    mt: int
    nid: int
    cpu: int
    zones: list[TwinZone]  # that may serve, first choice first

    @property
    def highest(self) -> int:
        return highest_zone(self.gfp)


class TwinAllocator:
    """A machine's allocator; cpus: the node of each CPU."""

    def __init__(self, nr_nodes: int, cpus: list[int]) -> None:
        self.vm = Tunables()
        self.pages = Pages()
        self.node_of_cpu, self.nr_cpus = cpus, len(cpus)
        self.cpus_of_node = {nid: cpus.count(nid) for nid in range(nr_nodes)}
        self.n_online: set[int] = set()
        self.totalreserve_of_node: dict[int, int] = {}
        self.nodes = [Node() for _ in range(nr_nodes)]
        self.zones = [
            TwinZone(self.pages, self.vm, nid, idx, len(cpus))
            for nid in range(nr_nodes)
            for idx in range(5)
        ]

    def zone(self, nid: int, idx: int) -> TwinZone:
        return self.zones[5 * nid + idx]

    def zones_of(self, nid: int) -> list[TwinZone]:
        return self.zones[5 * nid : 5 * nid + 5]

    def this_fallback(self) -> Iterable[TwinZone]:
        return self.nodes[self.node_of_cpu[0]].fallback

    def zone_of(self, pfn: int) -> TwinZone:
        zone = self.pages.zone_of[block_start(pfn)]
        assert isinstance(zone, TwinZone)
        return zone

    # -- one request ------------------------------------------------------------------

    def _request(
        self, order: int, gfp: int, nid: int, cpu: int, nodes: Collection[int] | None
    ) -> Request:
        node = self.nodes[nid]
        zones = node.nofallback if gfp & GFP_THISNODE else node.fallback
        highest = highest_zone(gfp)
        zones = [z for z in zones if z.idx <= highest and (nodes is None or z.nid in nodes)]
        mt = UNMOVABLE if self.pages.grouping_disabled else gfp >> 3 & 3
        return Request(order, gfp, mt, nid, cpu, zones)

    def _fast_flags(self, r: Request) -> int:
        flags = WMARK_LOW | (KSWAPD if r.gfp & GFP_KSWAPD_RECLAIM else 0)
        first = r.zones[0]
        several = len(self.n_online) > 1
        if first.idx == NORMAL and (not several or self.zone(first.nid, DMA32).present):
            flags |= NOFRAGMENT
        return flags

    def _from_zonelist(self, r: Request, flags: int) -> int | None:
        for zone in r.zones:
            if flags & NOFRAGMENT and len(self.n_online) > 1 and zone.nid != r.zones[0].nid:
                break
            if not zone.may_give(r.order, r.highest, flags, bool(r.gfp & GFP_ATOMIC_BIT)):
                continue
            pfn = zone.rmqueue(r.order, r.mt, flags, r.cpu)
            if zone.boosted:
                zone.boosted = False
                self._wake_kswapd(zone, 0, zone.idx)
            if pfn is not None:
                if r.order and flags & HIGH_ATOMIC:
                    zone.reserve_highatomic(pfn)
                self._count(r, zone)
                return pfn
        return self._from_zonelist(r, flags & ~NOFRAGMENT) if flags & NOFRAGMENT else None

    def _count(self, r: Request, zone: TwinZone) -> None:
        first = r.zones[0]
        zone.events["pgalloc"] += 1 << r.order
        if zone.nid == first.nid:
            zone.events["numa_hit"] += 1
        else:
            zone.events["numa_miss"] += 1
            first.events["numa_foreign"] += 1
        local = zone.nid == self.node_of_cpu[r.cpu]
        zone.events["numa_local" if local else "numa_other"] += 1

    def _wake_kswapd(self, zone: TwinZone, order: int, highest: int) -> None:
        node = self.nodes[zone.nid]
        if zone.managed:
            times, o, h = node.kswapd
            node.kswapd = (times + 1, max(o, order), max(h, highest))

    def _wake_all_kswapds(self, r: Request) -> None:
        last = None
        for zone in r.zones:
            if zone.nid != last:
                self._wake_kswapd(zone, r.order, r.highest)
            last = zone.nid

    def _attempt(self, r: Request) -> int | None:
        """The fast path, and what the slow path can do without waiting."""
        if not r.zones:
            return None
        pfn = self._from_zonelist(r, self._fast_flags(r))
        if pfn is not None:
            return pfn
        flags = slow_flags(r.gfp, r.order)
        wake = bool(flags & KSWAPD)
        if wake:
            self._wake_all_kswapds(r)
        pfn = self._from_zonelist(r, flags)
        if pfn is not None:
            return pfn
        if wake:
            self._wake_all_kswapds(r)
        reserves = bool(r.gfp & GFP_MEMALLOC and not r.gfp & GFP_NOMEMALLOC)
        if reserves:
            flags = NO_WATERMARKS | flags & KSWAPD
        if reserves or (r.gfp & GFP_HIGH and not r.gfp & GFP_DIRECT_RECLAIM):
            r = self._request(r.order, r.gfp, r.nid, r.cpu, None)
        return self._from_zonelist(r, flags)

    def _wait(self, r: Request) -> int | None:
        """What a request that may wait does when there is nothing to reclaim, move or kill."""
        if not r.zones:
            return None
        flags = slow_flags(r.gfp, r.order)
        pfn = None
        if not (r.order > COSTLY and r.gfp & GFP_NORETRY):
            pfn = self._wait_in_vain(r, flags)
        if pfn is None and r.gfp & GFP_NOFAIL:
            pfn = self._from_zonelist(r, WMARK_MIN | MIN_RESERVE)
        return pfn

    def _wait_in_vain(self, r: Request, flags: int) -> int | None:
        fruitless = 0
        for _ in range(MAX_LOOPS):
            if flags & KSWAPD:
                self._wake_all_kswapds(r)
            pfn = self._from_zonelist(r, flags)
            if pfn is not None:
                return pfn
            if r.gfp & GFP_NORETRY or (r.order > COSTLY and not r.gfp & GFP_RETRY_MAYFAIL):
                return None
            fruitless += 1
            if fruitless <= 16 and any(self._hope(z, r, flags) for z in r.zones):
                continue
            if any(z.unreserve_highatomic(r.mt, force=True) for z in r.zones):
                continue
            pfn = self._from_zonelist(r, WMARK_HIGH)
            if pfn is not None or r.order > COSTLY or r.highest < NORMAL:
                return pfn
            if r.gfp & (GFP_RETRY_MAYFAIL | GFP_THISNODE):
                return None
            if r.gfp & GFP_NOFAIL:
                pfn = self._from_zonelist(r, NO_WATERMARKS)
                if pfn is not None:
                    return pfn
            elif r.gfp & GFP_FS:
                return None
            fruitless = 0
        return None

    def _hope(self, zone: TwinZone, r: Request, flags: int) -> bool:
        """Whether a zone would serve if all were reclaimed: the kernel counts free pages twice."""
        free = zone.nr_free_pages
        zone.nr_free_pages = 2 * free
        try:
            return zone.watermark_ok(r.order, zone.wmark_min + zone.boost, r.highest, flags)
        finally:
            zone.nr_free_pages = free

    # -- the calls ----------------------------------------------------------------------

    def alloc_from_nodes(
        self, order: int, gfp: int, nid: int, cpu: int, nodes: Collection[int] | None
    ) -> int | None:
        """__alloc_pages."""
        r = self._request(order, gfp, nid, cpu, nodes)
        pfn = self._attempt(r)
        if pfn is None and gfp & GFP_DIRECT_RECLAIM:
            pfn = self._wait(r)
        return pfn

    def alloc_pages(self, order: int, gfp: int, nid: int, cpu: int) -> int | None:
        """A request that failed at once is tried again from the start before it waits."""
        pfn = self._attempt(self._request(order, gfp, nid, cpu, None))
        return self.alloc_from_nodes(order, gfp, nid, cpu, None) if pfn is None else pfn

    def free_pages(self, pfn: int, cpu: int) -> None:
        self.zone_of(pfn).give(pfn, cpu)

    def split_page(self, pfn: int) -> None:
        order = self.pages.used[pfn]
        self.pages.used.update(dict.fromkeys(range(pfn, pfn + (1 << order)), 0))

    def drain_all(self) -> None:
        for zone in self.zones:
            zone.drain()
