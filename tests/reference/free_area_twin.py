"""A slow, readable twin of a zone's free lists: merging, splitting, moving, isolating.

Free lists are Python lists of pfns, head first; what a page is stands in plain dicts.  Used by
tests only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.reference.watermark_twin import MOVABLE_ZONE, ZoneMarks

ORDERS = 11
PAGEBLOCK = 512
UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC, ISOLATE = range(5)


def block_start(pfn: int) -> int:
    return pfn // PAGEBLOCK * PAGEBLOCK


@dataclass
class Pages:
    """What all zones share."""

    used: dict[int, int] = field(default_factory=dict)  # first pfn of a block -> its order
    zone_of: dict[int, FreeArea] = field(default_factory=dict)  # start of a pageblock -> zone
    grouping_disabled: bool = False


class FreeArea(ZoneMarks):
    """The free lists of one zone."""

    def __init__(self, pages: Pages, nid: int, idx: int, nr_cpus: int) -> None:
        super().__init__(nid, idx, nr_cpus)
        self.pages = pages
        self.start = self.spanned = 0
        self.nr_free_pages = self.nr_isolate = 0
        self.free: dict[tuple[int, int], list[int]] = {
            (o, mt): [] for o in range(ORDERS) for mt in range(5)
        }
        self.where: dict[int, tuple[int, int]] = {}  # first pfn -> the list that it is on
        self.types: dict[int, int] = {}  # start of a pageblock -> migratetype

    def block_type(self, pfn: int) -> int:
        return self.types[block_start(pfn)]

    def set_type(self, pfn: int, mt: int) -> None:
        if self.pages.grouping_disabled and mt < HIGHATOMIC:
            mt = UNMOVABLE
        self.types[block_start(pfn)] = mt

    # -- lists ------------------------------------------------------------------------

    def insert(self, pfn: int, order: int, mt: int, tail: bool) -> None:
        lst = self.free[order, mt]
        lst.append(pfn) if tail else lst.insert(0, pfn)
        self.where[pfn] = (order, mt)

    def remove(self, pfn: int) -> tuple[int, int]:
        order, mt = self.where.pop(pfn)
        self.free[order, mt].remove(pfn)
        return order, mt

    def move(self, pfn: int, mt: int) -> int:
        order, _ = self.remove(pfn)
        self.insert(pfn, order, mt, tail=True)
        return 1 << order

    def is_free(self, pfn: int, order: int) -> bool:
        return pfn in self.where and self.where[pfn][0] == order

    # -- merging and splitting ----------------------------------------------------------

    def free_one_page(self, pfn: int, order: int, mt: int, to_tail: bool = False) -> None:
        if mt != ISOLATE:
            self.nr_free_pages += 1 << order
        while order < 10:
            buddy = pfn ^ (1 << order)
            if not self.is_free(buddy, order):
                break
            if order == 9:
                other = self.block_type(buddy)
                if other != mt and max(other, mt) >= HIGHATOMIC:
                    break
            self.remove(buddy)
            pfn, order = min(pfn, buddy), order + 1
        likely = order <= 8 and self.is_free((pfn & ~(1 << order)) ^ (2 << order), order + 1)
        self.insert(pfn, order, mt, tail=to_tail or likely)

    def smallest(self, order: int, mt: int) -> int | None:
        for o in range(order, ORDERS):
            if self.free[o, mt]:
                pfn = self.free[o, mt][0]
                self.remove(pfn)
                while o > order:
                    o -= 1
                    self.insert(pfn + (1 << o), o, mt, tail=False)
                return pfn
        return None

    def move_free(self, first: int, end: int, mt: int) -> int:
        """Move the free blocks that start in a range to another type; how many pages."""
        moved, pfn = 0, first
        while pfn < end:
            if pfn in self.where:
                pages = self.move(pfn, mt)
                moved, pfn = moved + pages, pfn + pages
            else:
                pfn += 1
        return moved

    def move_free_block(self, pfn: int, mt: int) -> int:
        first = block_start(pfn)
        if first + PAGEBLOCK > self.start + self.spanned:
            return 0
        return self.move_free(first if first >= self.start else pfn, first + PAGEBLOCK, mt)

    # -- isolation --------------------------------------------------------------------

    def unmovable(self, block: int) -> int | None:
        """The first page of a pageblock that can neither move nor go.

        Nothing of the twin is on an LRU list; the tail pages of a larger block and pages on
        per-CPU lists look free to the kernel.
        """
        if self.idx == MOVABLE_ZONE:
            return None
        used = self.pages.used
        return next((p for p in range(block, block + PAGEBLOCK) if p in used), None)

    def isolate_block(self, block: int) -> int | None:
        if self.types[block] == ISOLATE:
            return block
        blocked = self.unmovable(block)
        if blocked is None:
            self.set_type(block, ISOLATE)
            self.nr_isolate += 1
            self.nr_free_pages -= self.move_free(block, block + PAGEBLOCK, ISOLATE)
        return blocked

    def split_at(self, pfn: int) -> None:
        """Split a free block of order 10 that crosses the edge of what was isolated."""
        head = pfn - PAGEBLOCK
        if pfn % 1024 == 0 or not self.is_free(head, 10):
            return
        self.remove(head)
        if self.block_type(head) != ISOLATE:
            self.nr_free_pages -= 1024
        for half in (head, pfn):
            self.free_one_page(half, 9, self.block_type(half))

    def isolate(self, first: int, end: int) -> int | None:
        """Isolate a range of pageblocks; the page that forbids it, after undoing, or None."""
        last = end - PAGEBLOCK
        blocked = self.isolate_block(first)
        if blocked is not None:
            return blocked
        self.split_at(first)
        if last != first:
            blocked = self.isolate_block(last)
            if blocked is not None:
                self.undo_isolate(first, first + PAGEBLOCK, MOVABLE)
                return blocked
        self.split_at(end)
        for block in range(first + PAGEBLOCK, last, PAGEBLOCK):
            blocked = self.isolate_block(block)
            if blocked is not None:
                self.undo_isolate(first, block, MOVABLE)
                self.undo_isolate(last, end, MOVABLE)
                return blocked
        return None

    def undo_isolate(self, first: int, end: int, mt: int) -> None:
        for block in range(first, end, PAGEBLOCK):
            if self.types.get(block) == ISOLATE:
                self._undo_block(block, mt)

    def _undo_block(self, block: int, mt: int) -> None:
        buddy = block ^ PAGEBLOCK
        merges = self.is_free(block, 9) and self.is_free(buddy, 9)
        self.nr_isolate -= 1
        if merges and self.block_type(buddy) != ISOLATE:
            self.remove(block)
            self.set_type(block, mt)
            self.free_one_page(block, 9, mt, to_tail=True)
            return
        self.nr_free_pages += self.move_free(block, block + PAGEBLOCK, mt)
        self.set_type(block, mt)
