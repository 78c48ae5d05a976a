"""The slow twin of a full compaction run: which page goes where, by the rules alone.

It knows a zone as a set of free blocks, of pages that can move and of pages that cannot, and
takes for granted that pages which were left stay on a CPU's list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK = 512
ROUND = 32
MOVABLE = 1


@dataclass
class CompactionTwin:
    """A zone from start to end - 1.

    ``free`` maps where free blocks begin to their orders, ``held`` are movable pages that
    somebody pins, ``types`` the migratetypes of pageblocks by number; ``spare`` is how many pages
    may go before the zone is at its min mark.
    """

    start: int
    end: int
    free: dict[int, int]
    movable: set[int]
    held: set[int]
    types: dict[int, int]
    spare: int
    moves: list[tuple[int, int]] = field(default_factory=list)
    migrate_scanned: int = 0
    free_scanned: int = 0
    failed: int = 0

    def run(self) -> None:
        """Compact all there is (order -1, MIGRATE_SYNC, no hints)."""
        self.migrate_pfn, self.free_pfn = self.start, (self.end - 1) // BLOCK * BLOCK
        self.targets: list[int] = []
        last = -1
        while self.free_pfn // BLOCK > self.migrate_pfn // BLOCK:
            begin = self.migrate_pfn
            pages = self._isolate_pages(whole=last == begin // BLOCK)
            if not pages:
                continue
            last = begin // BLOCK
            if not self._migrate(pages):
                break

    def _isolate_pages(self, whole: bool) -> list[int]:
        """Pages of the first pageblock that can be scanned: 32, or all that are left of it."""
        pages: list[int] = []
        pfn = self.migrate_pfn
        end = (pfn // BLOCK + 1) * BLOCK
        if end > self.free_pfn:
            self.migrate_pfn = end
            return pages
        while pfn < end:
            self.migrate_scanned += 1
            if pfn in self.free:
                pfn += 1 << self.free[pfn]
                continue
            if pfn in self.movable:
                pages.append(pfn)
            pfn += 1
            if len(pages) >= ROUND and not whole:
                break
        self.migrate_pfn = min(pfn, end)
        return pages

    def _migrate(self, pages: list[int]) -> bool:
        """Move pages, the last isolated first; False where there is no target left."""
        for pfn in reversed(pages):
            if not self.targets:
                self._isolate_targets(len(pages))
            if not self.targets:
                self.failed += 1
                return self.free_pfn // BLOCK <= self.migrate_pfn // BLOCK
            if pfn in self.held:
                self.failed += 1
                continue
            to = self.targets.pop()
            self.moves.append((pfn, to))
            self.movable.remove(pfn)
            self.movable.add(to)
        if any(pfn in self.held for pfn in pages) and not self.targets:
            self._isolate_targets(len(pages))
        return True

    def _isolate_targets(self, wanted: int) -> None:
        """Free pages from where the last came from downward, until there are enough."""
        at = self.free_pfn
        block = at // BLOCK
        step = 1
        while block > self.migrate_pfn // BLOCK:
            end = min((block + 1) * BLOCK, self.end)
            large = self.free.get(block * BLOCK, 0) >= 9
            if not large and self.types[block] == MOVABLE:
                had = len(self.targets)
                at = self._scan_targets(at, end, wanted, step)
                if len(self.targets) >= wanted or at < end:
                    self.free_pfn = at if at < end else (block - 1) * BLOCK
                    return
                # The fuller the zone, the fewer pages are looked at.
                step = 1 if len(self.targets) > had else min(2 * step, ROUND)
            block -= 1
            at = block * BLOCK
        self.free_pfn = at

    def _scan_targets(self, at: int, end: int, wanted: int, step: int) -> int:
        """Take free blocks of one pageblock, upward; where the scan ended."""
        while at < end:
            self.free_scanned += 1
            order = self.free.get(at)
            if order is None:
                at += step
                continue
            if self.spare <= 1 << order:
                return at
            del self.free[at]
            self.spare -= 1 << order
            self.targets += range(at, at + (1 << order))
            self.free_scanned += (1 << order) - 1
            at += 1 << order
            if len(self.targets) >= wanted:
                break
            at += step - 1
        return min(at, end)
