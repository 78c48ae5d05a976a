"""A slow, readable twin of one zone's allocator, written from the rules and used by tests only.

Free lists are Python lists of pfns, head first; what a page is stands in plain dicts.
"""

from __future__ import annotations

ORDERS = 11
PAGEBLOCK = 512
UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC, ISOLATE = range(5)
FALLBACKS = {
    UNMOVABLE: (RECLAIMABLE, MOVABLE),
    MOVABLE: (RECLAIMABLE, UNMOVABLE),
    RECLAIMABLE: (UNMOVABLE, MOVABLE),
}


class TwinZone:
    """One zone whose pages are all present, from start (pfn) on."""

    def __init__(self, start: int, nr_pages: int, nr_cpus: int, high: int, batch: int) -> None:
        self.start, self.end = start, start + nr_pages
        self.free = {(o, mt): [] for o in range(ORDERS) for mt in range(5)}
        self.where: dict[int, tuple[int, int]] = {}  # head pfn -> the list that it is on
        self.types = dict.fromkeys(range(start, self.end, PAGEBLOCK), MOVABLE)
        self.used: dict[int, int] = {}  # head pfn -> order
        self.nr_free_pages = 0
        self.high, self.batch = high, batch
        self.pcp = [{"count": 0, "factor": 0} for _ in range(nr_cpus)]
        self.pcp_lists: list[dict[int, list[tuple[int, int]]]] = [
            {i: [] for i in range(14)} for _ in range(nr_cpus)
        ]
        for pfn in range(start, self.end, 1024):
            self._insert(pfn, 10, MOVABLE, tail=True)
        self.nr_free_pages = nr_pages

    def block_type(self, pfn: int) -> int:
        return self.types[pfn // PAGEBLOCK * PAGEBLOCK]

    # -- lists ------------------------------------------------------------------------

    def _insert(self, pfn: int, order: int, mt: int, tail: bool) -> None:
        lst = self.free[order, mt]
        lst.append(pfn) if tail else lst.insert(0, pfn)
        self.where[pfn] = (order, mt)

    def _remove(self, pfn: int) -> tuple[int, int]:
        order, mt = self.where.pop(pfn)
        self.free[order, mt].remove(pfn)
        return order, mt

    def _is_free(self, pfn: int, order: int) -> bool:
        return self.where.get(pfn, (None,))[0] == order

    # -- freeing ----------------------------------------------------------------------

    def free_one_page(self, pfn: int, order: int, mt: int, to_tail: bool = False) -> None:
        if mt != ISOLATE:
            self.nr_free_pages += 1 << order
        while order < 10:
            buddy = pfn ^ (1 << order)
            if not self._is_free(buddy, order):
                break
            if order == 9:
                other = self.block_type(buddy)
                if other != mt and max(other, mt) >= HIGHATOMIC:
                    break
            self._remove(buddy)
            pfn, order = min(pfn, buddy), order + 1
        likely = False
        if order <= 8:
            pair = pfn & ~((2 << order) - 1)
            likely = self._is_free(pair ^ (2 << order), order + 1)
        self._insert(pfn, order, mt, tail=to_tail or likely)

    # -- allocating -------------------------------------------------------------------

    def smallest(self, order: int, mt: int) -> int | None:
        for o in range(order, ORDERS):
            if self.free[o, mt]:
                pfn = self.free[o, mt][0]
                self._remove(pfn)
                while o > order:
                    o -= 1
                    self._insert(pfn + (1 << o), o, mt, tail=False)
                return pfn
        return None

    def _source(self, order: int, mt: int) -> int | None:
        return next((f for f in FALLBACKS[mt] if self.free[order, f]), None)

    def _may_claim(self, order: int, mt: int) -> bool:
        return order >= 4 or mt in (UNMOVABLE, RECLAIMABLE)

    def fallback(self, order: int, mt: int) -> bool:
        found = [o for o in range(10, order - 1, -1) if self._source(o, mt) is not None]
        if not found:
            return False
        o = found[0]
        if not self._may_claim(o, mt) and o > order:
            o = found[-1]
        source = self._source(o, mt)
        assert source is not None
        self._steal(self.free[o, source][0], o, mt)
        return True

    def _move(self, pfn: int, mt: int) -> None:
        order, _ = self._remove(pfn)
        self._insert(pfn, order, mt, tail=True)

    def _steal(self, pfn: int, order: int, mt: int) -> None:
        old = self.block_type(pfn)
        if old >= HIGHATOMIC:
            self._move(pfn, mt)
        elif order >= 9:
            for block in range(pfn, pfn + (1 << order), PAGEBLOCK):
                self.types[block] = mt
            self._move(pfn, mt)
        elif not self._may_claim(order, mt):
            self._move(pfn, mt)
        else:
            self._claim(pfn // PAGEBLOCK * PAGEBLOCK, old, mt)

    def _claim(self, block: int, old: int, mt: int) -> None:
        moved = self.move_free(block, mt)
        # Without LRU pages, what is used in a Movable pageblock counts as like an unmovable
        # request's own.
        alike = PAGEBLOCK - moved if old == MOVABLE and mt != MOVABLE else 0
        if moved + alike >= PAGEBLOCK // 2:
            self.types[block] = mt

    def move_free(self, block: int, mt: int) -> int:
        heads = sorted(p for p in self.where if block <= p < block + PAGEBLOCK)
        moved = 0
        for pfn in heads:
            moved += 1 << self.where[pfn][0]
            self._move(pfn, mt)
        return moved

    def _take(self, order: int, mt: int) -> int | None:
        pfn = self.smallest(order, mt)
        if pfn is None and self.fallback(order, mt):
            pfn = self.smallest(order, mt)
        return pfn

    def rmqueue(self, order: int, mt: int, cpu: int) -> int | None:
        pfn = None
        if order <= 3 or order == 9:
            pfn = self._from_pcp(order, mt, cpu)
        if pfn is None:
            pfn = self._take(order, mt)
            if pfn is not None:
                self.nr_free_pages -= 1 << order
        if pfn is not None:
            self.used[pfn] = order
        return pfn

    # -- per-CPU lists ----------------------------------------------------------------

    @staticmethod
    def index(order: int, mt: int) -> int:
        return 12 + (mt == MOVABLE) if order == 9 else 3 * order + mt

    @staticmethod
    def order_of(index: int) -> int:
        return 9 if index >= 12 else index // 3

    def _from_pcp(self, order: int, mt: int, cpu: int) -> int | None:
        state = self.pcp[cpu]
        lst = self.pcp_lists[cpu][self.index(order, mt)]
        state["factor"] >>= 1
        if not lst:
            count = max(self.batch >> order, 2) if self.batch > 1 else self.batch
            for _ in range(count):
                pfn = self._take(order, mt)
                if pfn is None:
                    break
                lst.append((pfn, mt))
                state["count"] += 1 << order
                self.nr_free_pages -= 1 << order
        if not lst:
            return None
        state["count"] -= 1 << order
        return lst.pop(0)[0]

    def give(self, pfn: int, cpu: int) -> None:
        order = self.used.pop(pfn)
        mt = self.block_type(pfn)
        if not (order <= 3 or order == 9) or mt == ISOLATE:
            self.free_one_page(pfn, order, mt)
            return
        state = self.pcp[cpu]
        index = self.index(order, MOVABLE if mt == HIGHATOMIC else mt)
        self.pcp_lists[cpu][index].insert(0, (pfn, mt))
        state["count"] += 1 << order
        everything = state["factor"] > 0 and 1 <= order <= 3
        limit = 0 if everything or not self.high else self.high
        if state["count"] < limit:
            return
        if everything:
            count = state["count"]
        elif self.high < self.batch:
            count = 1
        else:
            count = self.batch << state["factor"]
            if count < limit - self.batch and state["factor"] < 5:
                state["factor"] += 1
            count = max(min(count, limit - self.batch), self.batch)
        self._flush(cpu, count, index)

    def _flush(self, cpu: int, count: int, index: int) -> None:
        count = min(count, self.pcp[cpu]["count"])
        isolating = ISOLATE in self.types.values()
        while count > 0:
            order, lst = self.order_of(index), self.pcp_lists[cpu][index]
            while lst and count > 0:
                pfn, mt = lst.pop()
                count -= 1 << order
                self.pcp[cpu]["count"] -= 1 << order
                self.free_one_page(pfn, order, self.block_type(pfn) if isolating else mt)
            index = (index + 1) % 14

    def drain(self) -> None:
        for cpu, state in enumerate(self.pcp):
            if state["count"]:
                self._flush(cpu, state["count"], 0)

    # -- isolation --------------------------------------------------------------------

    def isolate(self, block: int) -> bool:
        """Isolate a pageblock unless a block that somebody uses starts in it.

        The tail pages of a larger allocation look free to the kernel here.
        """
        used = any(block <= p < block + PAGEBLOCK for p in self.used)
        if self.types[block] == ISOLATE or used:
            return False
        self.types[block] = ISOLATE
        self.nr_free_pages -= self.move_free(block, ISOLATE)
        for boundary in (block, block + PAGEBLOCK):
            self._split_at(boundary)
        return True

    def _split_at(self, pfn: int) -> None:
        """Split a free block of order 10 that crosses a boundary of what was isolated."""
        head = pfn - PAGEBLOCK
        if pfn % 1024 == 0 or not self._is_free(head, 10):
            return
        _, mt = self._remove(head)
        self.nr_free_pages -= 0 if mt == ISOLATE else 1024
        for half in (head, pfn):
            self.free_one_page(half, 9, self.block_type(half))

    def undo_isolate(self, block: int, mt: int) -> None:
        if self.types[block] != ISOLATE:
            return
        buddy = block ^ PAGEBLOCK
        free_pair = self._is_free(block, 9) and self._is_free(buddy, 9)
        if free_pair and self.types.get(buddy) != ISOLATE:
            self._remove(block)
            self.types[block] = mt
            self.free_one_page(block, 9, mt, to_tail=True)
            return
        self.nr_free_pages += self.move_free(block, mt)
        self.types[block] = mt
