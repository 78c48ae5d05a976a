"""A slow, readable twin of one zone's allocator: fallback, reserves, per-CPU lists, marks."""

from __future__ import annotations

from tests.reference.free_area_twin import (
    HIGHATOMIC,
    ISOLATE,
    MOVABLE,
    ORDERS,
    PAGEBLOCK,
    RECLAIMABLE,
    UNMOVABLE,
    FreeArea,
    Pages,
)
from tests.reference.watermark_twin import (
    HIGH_ATOMIC,
    KSWAPD,
    MIN_RESERVE,
    NO_WATERMARKS,
    NOFRAGMENT,
    NON_BLOCK,
    OOM,
    RESERVES,
    WMARK_MIN,
    Pcp,
    Tunables,
)

FALLBACKS = {
    UNMOVABLE: (RECLAIMABLE, MOVABLE),
    MOVABLE: (RECLAIMABLE, UNMOVABLE),
    RECLAIMABLE: (UNMOVABLE, MOVABLE),
}
EVENTS = (
    "numa_hit", "numa_miss", "numa_foreign", "numa_local", "numa_other", "pgalloc", "pgfree",
)  # fmt: skip


def pcp_allowed(order: int) -> bool:
    return order <= 3 or order == 9


def pindex(order: int, mt: int) -> int:
    return 12 + (mt == MOVABLE) if order == 9 else 3 * order + mt


class TwinZone(FreeArea):
    """One zone."""

    def __init__(self, pages: Pages, vm: Tunables, nid: int, idx: int, nr_cpus: int) -> None:
        super().__init__(pages, nid, idx, nr_cpus)
        self.vm = vm
        self.nr_reserved_highatomic = 0
        self.boosted = False
        self.events = dict.fromkeys(EVENTS, 0)

    # -- another type's pages ------------------------------------------------------------

    def _source(self, order: int, mt: int) -> int | None:
        return next((f for f in FALLBACKS[mt] if self.free[order, f]), None)

    def _may_claim(self, order: int, mt: int) -> bool:
        return order >= 4 or mt in (UNMOVABLE, RECLAIMABLE) or self.pages.grouping_disabled

    def fallback(self, order: int, mt: int, flags: int) -> bool:
        lowest = 9 if flags & NOFRAGMENT and order < 9 else order
        found = [o for o in range(10, lowest - 1, -1) if self._source(o, mt) is not None]
        if not found:
            return False
        o = found[0]
        if not self._may_claim(o, mt) and mt == MOVABLE and o > order:
            o = next(o for o in range(order, ORDERS) if self._source(o, mt) is not None)
        source = self._source(o, mt)
        assert source is not None
        self._steal(self.free[o, source][0], o, mt, flags)
        return True

    def _steal(self, pfn: int, order: int, mt: int, flags: int) -> None:
        if self.block_type(pfn) == HIGHATOMIC:
            self.move(pfn, mt)
            return
        if order >= 9:
            for block in range(pfn, pfn + (1 << order), PAGEBLOCK):
                self.set_type(block, mt)
            self.move(pfn, mt)
            return
        if self._boost_watermark() and flags & KSWAPD:
            self.boosted = True
        if not self._may_claim(order, mt) or not self._claim(pfn, mt):
            self.move(pfn, mt)

    def _claim(self, pfn: int, mt: int) -> bool:
        """Take all that is free in a pageblock; whether there was anything."""
        old = self.block_type(pfn)
        moved = self.move_free_block(pfn, mt)
        if not moved:
            return False
        # Nothing is on an LRU list, so no page in use suits a movable request; for another, all
        # that is used in a Movable pageblock looks like its own.
        alike = PAGEBLOCK - moved if mt != MOVABLE and old == MOVABLE else 0
        if moved + alike >= PAGEBLOCK // 2 or self.pages.grouping_disabled:
            self.set_type(pfn, mt)
        return True

    def _boost_watermark(self) -> bool:
        most = self.wmark_high * self.vm.watermark_boost_factor // 10000
        if self.managed < 4 * PAGEBLOCK or not most:
            return False
        self.boost = min(self.boost + PAGEBLOCK, max(PAGEBLOCK, most))
        return True

    # -- pageblocks for atomic requests --------------------------------------------------

    def reserve_highatomic(self, pfn: int) -> None:
        if self.nr_reserved_highatomic >= self.managed // 100 + PAGEBLOCK:
            return
        if self.block_type(pfn) < HIGHATOMIC:
            self.nr_reserved_highatomic += PAGEBLOCK
            self.set_type(pfn, HIGHATOMIC)
            self.move_free_block(pfn, HIGHATOMIC)

    def unreserve_highatomic(self, mt: int, force: bool) -> bool:
        if not force and self.nr_reserved_highatomic <= PAGEBLOCK:
            return False
        for order in range(ORDERS):
            if not self.free[order, HIGHATOMIC]:
                continue
            pfn = self.free[order, HIGHATOMIC][0]
            # A page that waited on a CPU's list may come back after its pageblock was opened.
            if self.block_type(pfn) == HIGHATOMIC:
                self.nr_reserved_highatomic = max(0, self.nr_reserved_highatomic - PAGEBLOCK)
            self.set_type(pfn, mt)
            if self.move_free_block(pfn, mt):
                return True
        return False

    # -- taking ---------------------------------------------------------------------------

    def _take(self, order: int, mt: int, flags: int) -> int | None:
        pfn = self.smallest(order, mt)
        if pfn is None and self.fallback(order, mt, flags):
            pfn = self.smallest(order, mt)
        return pfn

    def _from_buddy(self, order: int, mt: int, flags: int) -> int | None:
        pfn = self.smallest(order, HIGHATOMIC) if flags & HIGH_ATOMIC else None
        if pfn is None:
            pfn = self._take(order, mt, flags)
        if pfn is None and flags & (OOM | NON_BLOCK):
            pfn = self.smallest(order, HIGHATOMIC)
        if pfn is not None:
            self.nr_free_pages -= 1 << order
        return pfn

    def _from_pcp(self, order: int, mt: int, flags: int, pcp: Pcp) -> int | None:
        lst = pcp.lists[pindex(order, mt)]
        pcp.factor >>= 1
        if not lst:
            for _ in range(max(pcp.batch >> order, 2) if pcp.batch > 1 else pcp.batch):
                pfn = self._take(order, mt, flags)
                if pfn is None:
                    break
                lst.append((pfn, mt))
                pcp.count += 1 << order
                self.nr_free_pages -= 1 << order
        if not lst:
            return None
        pcp.count -= 1 << order
        return lst.pop(0)[0]

    def rmqueue(self, order: int, mt: int, flags: int, cpu: int) -> int | None:
        pfn = self._from_pcp(order, mt, flags, self.pcps[cpu]) if pcp_allowed(order) else None
        if pfn is None:
            pfn = self._from_buddy(order, mt, flags)
        if pfn is not None:
            self.pages.used[pfn] = order
        return pfn

    # -- giving back ----------------------------------------------------------------------

    def give(self, pfn: int, cpu: int) -> None:
        order = self.pages.used.pop(pfn)
        self.events["pgfree"] += 1 << order
        mt = self.block_type(pfn)
        if not pcp_allowed(order) or mt == ISOLATE:
            self.free_one_page(pfn, order, mt)
            return
        pcp = self.pcps[cpu]
        index = pindex(order, MOVABLE if mt == HIGHATOMIC else mt)
        pcp.lists[index].insert(0, (pfn, mt))
        pcp.count += 1 << order
        everything = pcp.factor > 0 and 1 <= order <= 3
        limit = 0 if everything else pcp.high
        if pcp.count >= limit:
            count = pcp.count if everything else self._how_many(pcp)
            self._flush(pcp, count, index)

    @staticmethod
    def _how_many(pcp: Pcp) -> int:
        if pcp.high < pcp.batch:
            return 1
        count, most = pcp.batch << pcp.factor, pcp.high - pcp.batch
        if count < most and pcp.factor < 5:
            pcp.factor += 1
        return max(min(count, most), pcp.batch)

    def _flush(self, pcp: Pcp, count: int, index: int) -> None:
        count = min(count, pcp.count)
        while count > 0:
            order, lst = 9 if index >= 12 else index // 3, pcp.lists[index]
            while lst and count > 0:
                pfn, mt = lst.pop()
                count -= 1 << order
                pcp.count -= 1 << order
                self.free_one_page(pfn, order, self.block_type(pfn) if self.nr_isolate else mt)
            index = (index + 1) % 14

    def drain(self, cpu: int = -1) -> None:
        for pcp in self.pcps if cpu < 0 else [self.pcps[cpu]]:
            self._flush(pcp, pcp.count, 0)

    def pcp_disable(self) -> None:
        for pcp in self.pcps:
            pcp.high, pcp.batch = 0, 1
        self.drain()

    def pcp_enable(self) -> None:
        for pcp in self.pcps:
            pcp.high, pcp.batch = self.pageset_high, self.pageset_batch

    def pcp_reset(self) -> None:
        self.pcps = [Pcp() for _ in self.pcps]

    # -- watermarks -----------------------------------------------------------------------

    def watermark_ok(self, order: int, mark: int, highest: int, flags: int) -> bool:
        free = self.nr_free_pages - ((1 << order) - 1)
        if not flags & RESERVES:
            free -= self.nr_reserved_highatomic
        if flags & MIN_RESERVE:
            mark -= mark // 2
            if flags & NON_BLOCK:
                mark -= mark // 4
        if flags & OOM:
            mark -= mark // 2
        if free <= mark + self.reserve[highest]:
            return False
        types = [UNMOVABLE, MOVABLE, RECLAIMABLE]
        if flags & (HIGH_ATOMIC | OOM):
            types.append(HIGHATOMIC)
        return order == 0 or any(self.free[o, mt] for o in range(order, ORDERS) for mt in types)

    def may_give(self, order: int, highest: int, flags: int, atomic: bool) -> bool:
        """Whether the zone has room above the mark that the flags name."""
        if flags & NO_WATERMARKS:
            return True
        which = flags & 3
        mark = (self.wmark_min, self.wmark_low, self.wmark_high)[which]
        if self.watermark_ok(order, mark + self.boost, highest, flags):
            return True
        retried = order == 0 and atomic and self.boost > 0 and which == WMARK_MIN
        return retried and self.watermark_ok(0, mark, highest, flags)
