"""A slow, readable twin of LRU lists and of scanning them; used by tests only.

Lists are Python lists, the page that is looked at next last.  Pages are of order 0; one node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt

BATCH = 32
ANON, FILE = 0, 2
Key = tuple[str, int]


@dataclass(eq=False)
class Page:
    """One page in memory: whose, and what is marked of it."""

    user: str
    index: int
    kind: str
    zone: int
    mapped: bool
    referenced: bool = False
    young: bool = False
    dirty: bool = False
    writeback: bool = False
    reclaim: bool = False
    pinned: bool = False

    @property
    def base(self) -> int:
        return FILE if self.kind == "file" else ANON

    @property
    def key(self) -> Key:
        return self.user, self.index


@dataclass
class Scan:
    """What a reclaimer wants."""

    priority: int
    reclaim_idx: int
    swappiness: int
    nr_to_reclaim: int
    kswapd: bool
    scanned: int = 0
    reclaimed: int = 0
    deactivate: set[int] = field(default_factory=set)


@dataclass
class LruTwin:
    """The lists of one node: inactive and active anonymous pages, inactive and active file pages."""

    free_pages: Callable[[], int]
    high_marks: Callable[[], int]
    swap_slots: int = 0
    lists: list[list[Page]] = field(default_factory=lambda: [[], [], [], []])
    swapped: set[Key] = field(default_factory=set)
    cost: list[int] = field(default_factory=lambda: [0, 0])  # of anonymous pages, of files
    write_dirty: bool = False  # kswapd may write files' pages
    events: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, by: int = 1) -> None:
        self.events[name] = self.events.get(name, 0) + by

    def list_of(self, page: Page) -> int | None:
        return next((i for i, pages in enumerate(self.lists) if page in pages), None)

    # -- what users do --------------------------------------------------------------------

    def add(self, page: Page) -> None:
        self.lists[page.base].insert(0, page)

    def touch(self, page: Page, write: bool) -> None:
        if page.kind == "anon" or page.mapped:
            page.young = True
        elif not write or page.kind == "shmem":
            self.mark_accessed(page)
        if write and page.kind != "anon":
            page.dirty = True

    def mark_accessed(self, page: Page) -> None:
        at = self.list_of(page)
        if not page.referenced:
            page.referenced = True
        elif at == page.base:
            page.referenced = False
            self.lists[at].remove(page)
            self.lists[page.base + 1].insert(0, page)
            self.count("pgactivate")

    def written(self, page: Page) -> None:
        """The backing store has what a page holds."""
        page.dirty = page.writeback = False
        if page.reclaim:
            page.reclaim = False
            for pages in self.lists:
                if page in pages:
                    pages.remove(page)
            self.lists[page.base].append(page)
            self.count("pgrotated")

    # -- scanning -------------------------------------------------------------------------

    def size(self, lru: int, reclaim_idx: int = 4) -> int:
        return sum(page.zone <= reclaim_idx for page in self.lists[lru])

    def inactive_is_low(self, base: int) -> bool:
        inactive, active = len(self.lists[base]), len(self.lists[base + 1])
        gib = (inactive + active) >> 18
        return inactive * (isqrt(10 * gib) if gib else 1) < active

    def take(self, lru: int, n: int, sc: Scan) -> tuple[list[Page], int]:
        """Take the oldest pages of a list; those of too high zones go to its front."""
        taken: list[Page] = []
        skipped: list[Page] = []
        looked_at = 0
        while len(taken) < n and self.lists[lru]:
            page = self.lists[lru].pop()
            looked_at += 1
            (skipped if page.zone > sc.reclaim_idx else taken).append(page)
        for page in skipped:
            self.lists[lru].insert(0, page)
            self.count(f"pgskip {page.zone}")
        return taken, looked_at

    def shrink_active(self, base: int, n: int, sc: Scan) -> None:
        taken, looked_at = self.take(base + 1, n, sc)
        self.count("pgrefill", looked_at)
        self.count("pgdeactivate", len(taken))
        for page in taken:
            page.young = False
            self.lists[base].insert(0, page)

    def fate(self, page: Page, sc: Scan) -> str:
        """``free``, ``keep`` or ``activate``."""
        if page.writeback:
            page.reclaim = True
            return "activate"
        referenced, page.referenced = page.referenced, False
        if page.young:
            page.young, page.referenced = False, True
            return "activate" if referenced else "keep"
        if page.kind != "file":
            if page.pinned:
                return "keep"
            if len(self.swapped) == self.swap_slots:
                return "activate"
            self.swapped.add(page.key)
            self.count("pswpout")
            return "free"
        if page.dirty:
            if not (sc.kswapd and page.reclaim and self.write_dirty):
                page.reclaim = True
                return "activate"
            if referenced or page.pinned:
                return "keep"
            self.count("written by reclaim")
        return "keep" if page.pinned else "free"

    def shrink_inactive(self, base: int, n: int, sc: Scan) -> int:
        taken, looked_at = self.take(base, n, sc)
        freed = written = 0
        for page in taken:
            before = self.events.get("written by reclaim", 0) + self.events.get("pswpout", 0)
            fate = self.fate(page, sc)
            written += self.events.get("written by reclaim", 0) + self.events.get("pswpout", 0)
            written -= before
            if fate == "free":
                freed += 1
            else:
                active = fate == "activate"
                self.count("pgactivate", active)
                self.lists[base + active].insert(0, page)
        kind = "file" if base == FILE else "anon"
        sc.scanned += len(taken)
        self.count(f"pgscan_{kind}", looked_at)
        self.count(f"pgsteal_{kind}", freed)
        if taken:
            self.note_cost(base, written)
        return freed

    def note_cost(self, base: int, pages: int) -> None:
        self.cost[base // 2] += pages
        if sum(self.cost) > sum(len(pages) for pages in self.lists) // 4:
            self.cost = [c // 2 for c in self.cost]

    def scan_counts(self, sc: Scan) -> list[int]:
        sizes = [self.size(lru, sc.reclaim_idx) >> sc.priority for lru in range(4)]
        inactive_file = len(self.lists[FILE])
        files = inactive_file + len(self.lists[FILE + 1])
        tiny = (
            files + self.free_pages() <= self.high_marks()
            and ANON not in sc.deactivate
            and len(self.lists[ANON]) >> sc.priority > 0
        )
        if len(self.swapped) == self.swap_slots:
            return [0, 0, *sizes[2:]]
        if sc.priority == 0 and sc.swappiness:
            return sizes
        if tiny:
            return [*sizes[:2], 0, 0]
        if inactive_file >> sc.priority and FILE not in sc.deactivate:
            return [0, 0, *sizes[2:]]
        total = sum(self.cost)
        costs = [total + c for c in self.cost]
        ap = sc.swappiness * (3 * total + 1) // (costs[0] + 1)
        fp = (200 - sc.swappiness) * (3 * total + 1) // (costs[1] + 1)
        return [n * (ap, ap, fp, fp)[lru] // (ap + fp) for lru, n in enumerate(sizes)]

    def shrink_node(self, sc: Scan) -> None:
        sc.deactivate = {base for base in (ANON, FILE) if self.inactive_is_low(base)}
        nr = self.scan_counts(sc)
        targets, freed = list(nr), 0
        even_handed = not sc.kswapd and sc.priority == 12
        while nr[0] or nr[2] or nr[3]:
            for lru in range(4):
                n = min(nr[lru], BATCH)
                nr[lru] -= n
                if n and lru % 2 == 0:
                    freed += self.shrink_inactive(lru, n, sc)
                elif n and lru - 1 in sc.deactivate:
                    self.shrink_active(lru - 1, n, sc)
            if freed < sc.nr_to_reclaim or even_handed:
                continue
            anon, files = nr[0] + nr[1], nr[2] + nr[3]
            if not anon or not files:
                break
            small, large = (0, 2) if files > anon else (2, 0)
            done = min(anon, files) * 100 // (targets[small] + targets[small + 1] + 1)
            nr[small] = nr[small + 1] = 0
            for lru in (large, large + 1):
                rest = targets[lru] * (100 - done) // 100
                nr[lru] = rest - min(rest, targets[lru] - nr[lru])
        sc.reclaimed += freed
        if self.swap_slots and self.inactive_is_low(ANON):
            self.shrink_active(ANON, BATCH, sc)
