"""A slow, readable twin of users of pages: their slots, LRU lists, migration, what pages hold.

Pages come from the allocator's twin, so that every slot is compared, not only how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.reference.allocator_twin import TwinAllocator

HUGE = 512
RECLAIM, TRANSHUGE, TRANSHUGE_LIGHT = 0xC00, 0x1C24CA, 0x1C20CA
GFP_OF_KIND = {
    "anon": 0x100CCA | 0x40000 | 0x100,
    "shmem": 0x100CCA | 0x40000,
    "file": 0x100CCA | 0x40000,
    "slab": 0xCC0 | 0x40000,
    "slab_reclaimable": 0xCC0 | 0x10 | 0x40000,
    "stack": 0xCC0 | 0x100,
    "page_table": 0xCC0 | 0x100,
    "kernel": 0xCC0,
    "driver_movable": 0x100CCA,
    "offline": 0x100CCA,
}
ON_LISTS = ("anon", "shmem", "file")
COUNTERS = {
    "slab": "nr_slab_unreclaimable",
    "slab_reclaimable": "nr_slab_reclaimable",
    "page_table": "nr_page_table_pages",
    "anon": "nr_anon_pages",
    "shmem": "nr_shmem",
}
MOST_WAITING = 510  # pages that are gathered when they are let go
# Of those as many go at once, the last first.
TOGETHER = {"anon": 510, "shmem": 15, "file": 15}
THISNODE_NORETRY = 0x200000 | 0x10000

# Where the page (or huge page) of an index goes: whose zonelist is used, which nodes may give it.
Place = Callable[[int], tuple[int, set[int] | None]]


@dataclass
class TwinUser:
    """Who has which pages; ``slots`` tells the first page of a block by its index."""

    name: str
    kind: str
    size: int
    place: Place
    order: int = 0
    thp: str = "never"
    locked: bool = False
    mapped: bool = False
    interleave: bool = False
    cpu: int = 0
    slots: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def has_any(self, start: int, end: int) -> bool:
        return any(i in self.slots for i in range(start, end))


@dataclass
class Page:
    """A used block: a single page, a huge one, or a block of a cache."""

    user: TwinUser
    index: int
    order: int
    marks: set[str] = field(default_factory=set)

    @property
    def huge(self) -> bool:
        return self.user.order == 0 and self.order == 9


class TwinUsers:
    """All users of a machine."""

    def __init__(self, allocator: TwinAllocator) -> None:
        self.allocator = allocator
        self.users: dict[str, TwinUser] = {}
        self.pages: dict[int, Page] = {}  # by the first pfn
        # By node and list, the pages in it, the oldest first.
        self.lru: dict[tuple[int, str], list[int]] = {}

    def node(self, pfn: int) -> int:
        return self.allocator.zone_of(pfn).nid

    # -- lists --------------------------------------------------------------------------

    def _list_of(self, pfn: int) -> list[int] | None:
        page = self.pages[pfn]
        if page.user.kind not in ON_LISTS or "mlocked" in page.marks:
            return None
        name = "active_" if "active" in page.marks else "inactive_"
        name += "file" if page.user.kind == "file" else "anon"
        return self.lru.setdefault((self.node(pfn), name), [])

    def _put_on_list(self, pfn: int) -> None:
        lst = self._list_of(pfn)
        if lst is not None:
            lst.append(pfn)

    def _take_off_list(self, pfn: int) -> None:
        lst = self._list_of(pfn)
        if lst is not None and "isolated" not in self.pages[pfn].marks:
            lst.remove(pfn)

    # -- pages come and go ----------------------------------------------------------------

    def _attempt(
        self, order: int, gfp: int, nid: int, cpu: int, nodes: set[int] | None
    ) -> int | None:
        a = self.allocator
        return a._attempt(a._request(order, gfp, nid, cpu, nodes))

    def _attach(self, user: TwinUser, index: int, pfn: int, order: int, marks: set[str]) -> None:
        marks = marks | ({"mlocked"} if user.locked else set())
        self.pages[pfn] = Page(user, index, order, marks)
        step = HUGE if user.order == 0 and order == 9 else 1
        for i in range(step):
            user.slots[index + i] = pfn + i
        self._put_on_list(pfn)

    def _detach(self, pfn: int) -> None:
        self._take_off_list(pfn)
        page = self.pages.pop(pfn)
        for i in range(HUGE if page.huge else 1):
            del page.user.slots[page.index + i]
            page.user.tokens.pop(page.index + i, None)

    def fault(self, user: TwinUser, start: int, n: int) -> None:
        """Touch pages; there has to be memory for them."""
        marks: set[str] = set()
        if user.kind == "shmem" and not user.mapped:
            marks = {"dirty", "referenced"}
        if user.kind == "anon" and user.locked:
            marks = {"referenced"}
        gfp, at, end = GFP_OF_KIND[user.kind], start, start + n
        while at < end:
            aligned = at % HUGE == 0 and at + HUGE <= end
            if user.thp != "never" and aligned and not user.has_any(at, at + HUGE):
                self._attach(user, at, self._huge(user, at), 9, marks)
                at += HUGE
                continue
            if at not in user.slots:
                nid, nodes = user.place(at)
                pfn = self._attempt(user.order, gfp, nid, user.cpu, nodes)
                assert pfn is not None
                self._attach(user, at, pfn, user.order, marks)
            at += 1

    def _huge(self, user: TwinUser, at: int) -> int:
        gfp = TRANSHUGE if user.thp == "madvise" else TRANSHUGE_LIGHT
        nid, nodes = user.place(at // HUGE if user.interleave else at)
        if not user.interleave and (nodes is None or nid in nodes):
            gfp |= THISNODE_NORETRY
        pfn = self._attempt(9, gfp, nid, user.cpu, nodes)
        assert pfn is not None
        return pfn

    def release(self, user: TwinUser, start: int, n: int) -> int:
        """Let pages go; how many are freed."""
        waiting: list[int] = []
        at, end, freed = start, start + n, 0
        while at < end:
            pfn = user.slots.get(at)
            if pfn is None:
                at += 1
                continue
            head = pfn if pfn in self.pages else pfn // HUGE * HUGE
            page = self.pages[head]
            if page.huge and (at % HUGE or at + HUGE > end):
                self.split(head)
                continue
            if page.huge:
                self._release_pages(waiting, user)
                self._detach(head)
                self.allocator.free_pages(head, user.cpu)
                freed += HUGE
                at += HUGE
                continue
            self._detach(head)
            at += 1
            if "pinned" in page.marks:
                continue
            waiting.append(head)
            freed += 1 << user.order
            if len(waiting) == MOST_WAITING:
                self._release_pages(waiting, user)
        self._release_pages(waiting, user)
        return freed

    def _release_pages(self, pfns: list[int], user: TwinUser) -> None:
        group = TOGETHER.get(user.kind, 1)
        for first in range(0, len(pfns), group):
            self._free(pfns[first : first + group][::-1], user.cpu)
        pfns.clear()

    def _free(self, pfns: list[int], cpu: int) -> None:
        for pfn in pfns:
            self.allocator.free_pages(pfn, cpu)

    def split(self, head: int) -> None:
        """Turn a huge page into single ones."""
        self._take_off_list(head)
        page = self.pages.pop(head)
        del self.allocator.pages.used[head]
        for i in range(HUGE):
            self.allocator.pages.used[head + i] = 0
            marks = page.marks | ({"dirty"} if page.user.kind == "anon" else set())
            self.pages[head + i] = Page(page.user, page.index + i, 0, marks)
            if "isolated" not in marks:
                self._put_on_list(head + i)

    # -- pages move -----------------------------------------------------------------------

    def isolate(self, start: int, end: int) -> list[int]:
        """Take what can move off its list, or from its driver."""
        out = []
        for pfn in sorted(p for p in self.pages if start <= p < end):
            page = self.pages[pfn]
            if page.user.kind in (*ON_LISTS, "driver_movable"):
                self._take_off_list(pfn)
                page.marks.add("isolated")
                out.append(pfn)
        return out

    def putback(self, pfns: list[int]) -> None:
        for pfn in pfns:
            self.pages[pfn].marks.discard("isolated")
            self._put_on_list(pfn)

    def _move(self, pfn: int, to: int) -> None:
        page = self.pages.pop(pfn)
        page.marks.discard("isolated")
        if page.user.kind == "anon":
            page.marks.add("dirty")
        self.pages[to] = page
        for i in range(HUGE if page.huge else 1):
            page.user.slots[page.index + i] = to + i
        self._put_on_list(to)

    def migrate(self, pfns: list[int], gfp: int, nid: int, nodes: set[int], cpu: int) -> list[int]:
        """Move isolated pages; those that are left, which are on their lists again."""
        left, rest = [], list(pfns)
        while rest:
            batch = [rest.pop(0)]
            while rest and sum(1 << self.pages[p].order for p in (*batch, rest[0])) <= 512:
                batch.append(rest.pop(0))
            for _ in range(10):
                batch = [p for p in batch if not self._migrate_one(p, gfp, nid, nodes, cpu)]
            left += batch
        self.putback(left)
        return left

    def _migrate_one(self, pfn: int, gfp: int, nid: int, nodes: set[int], cpu: int) -> bool:
        """Whether a page moved; the target of one that is held is given back each time."""
        huge = self.pages[pfn].huge
        wanted = gfp & ~RECLAIM | TRANSHUGE if huge else gfp
        to = self._attempt(9 if huge else 0, wanted, nid, cpu, nodes)
        assert to is not None
        if "pinned" in self.pages[pfn].marks:
            self.allocator.free_pages(to, cpu)
            return False
        self._move(pfn, to)
        if huge:
            self.allocator.free_pages(pfn, cpu)
        else:
            self._free([pfn], cpu)
        return True

    def counters(self, nid: int) -> Counter[str]:
        """What a node counts, added up from the pages there are."""
        out: Counter[str] = Counter()
        for pfn, page in self.pages.items():
            if self.node(pfn) != nid:
                continue
            n, kind = 1 << page.order, page.user.kind
            if kind in COUNTERS:
                out[COUNTERS[kind]] += n
            if kind in ("shmem", "file"):
                out["nr_file_pages"] += n
                out["nr_mapped"] += n * page.user.mapped
            if kind == "stack":
                out["nr_kernel_stack"] += 4 * n
            if page.huge:
                out["nr_anon_transparent_hugepages"] += 1
            if "mlocked" in page.marks:
                out["nr_unevictable"] += n
        for (node, name), pfns in self.lru.items():
            if node == nid:
                out[f"nr_{name}"] += sum(1 << self.pages[p].order for p in pfns)
        return out
