"""Pools of huge pages, and how a page comes and goes (mm/hugetlb.c).

A pool has the huge pages of one size on all nodes.  Free ones are on a list per node, the one
that came last being the first to go; they are pages of the pool's own PageUser, in use ones of
somebody else's.  What the pool counts is here; validate.py recounts it from the pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING

from kmm import _hugetlb
from kmm._memory import PageUser
from kmm.errors import OutOfMemory, bug
from kmm.gfp import (
    __GFP_COMP,
    __GFP_NOWARN,
    __GFP_RETRY_MAYFAIL,
    __GFP_THISNODE,
    GFP_HIGHUSER,
    GFP_HIGHUSER_MOVABLE,
    gfp_zone,
)
from kmm.memory import User
from kmm.mempolicy import DEFAULT_POLICY
from kmm.page_alloc import __alloc_pages, __free_pages
from kmm.params import MAX_ORDER, PAGE_SHIFT, PAGEBLOCK_ORDER, USER_HUGETLB
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

PMD_ORDER, PUD_ORDER = 9, 18
ULONG_MAX = (1 << 64) - 1


class PoolPages(User):
    """Who has a pool's free pages: the pool, which no other user is told of by name."""

    def __init__(self, m: Machine, name: str, order: int) -> None:
        self.m, self.name, self.kind = m, name, USER_HUGETLB
        self.policy, self.thp, self.cpu, self.cpuset = DEFAULT_POLICY, "never", 0, None
        self.interleave_offset, self.il_prev = 0, -1
        self.gfp = GFP_HIGHUSER if order >= MAX_ORDER else GFP_HIGHUSER_MOVABLE
        self._prepare_reclaim()
        self.engine = PageUser(m.memmap_engine, USER_HUGETLB, 0, order)
        m.users_by_number[self.engine.number] = self


class HState:
    """The pool of one size.

    :param order: 9 for pages of 2 MiB, 18 for those of 1 GiB, which are called gigantic.
    """

    def __init__(self, m: Machine, order: int) -> None:
        self.m, self.order = m, order
        nodes = list(m.nodes)
        #: Per node: pfn of each free page and its slot at the pool's user, the next to go last.
        # The end of a plain dict is slow to find where much was taken off it.
        self.free: dict[int, OrderedDict[int, int]] = {nid: OrderedDict() for nid in nodes}
        self.nr_huge_pages_node = dict.fromkeys(nodes, 0)
        self.surplus_huge_pages_node = dict.fromkeys(nodes, 0)
        self.resv_huge_pages = 0
        self.max_huge_pages = 0
        self.nr_overcommit_huge_pages = 0
        self.next_nid_to_alloc = self.next_nid_to_free = min(m.n_memory, default=0)
        self.pool: PoolPages | None = None
        self._spare: list[int] = []

    @property
    def size(self) -> int:
        """Bytes of a page."""
        return 1 << (self.order + PAGE_SHIFT)

    @property
    def name(self) -> str:
        """The name of the pool's directory."""
        return f"hugepages-{self.size >> 10}kB"

    @property
    def is_gigantic(self) -> bool:
        """Whether its pages are larger than the largest free block."""
        return self.order >= MAX_ORDER

    @property
    def nr_huge_pages(self) -> int:
        """Pages of all nodes, free and in use, surplus ones too."""
        return sum(self.nr_huge_pages_node.values())

    @property
    def surplus_huge_pages(self) -> int:
        """Pages beyond what the pool is to have."""
        return sum(self.surplus_huge_pages_node.values())

    @property
    def free_huge_pages(self) -> int:
        """Pages that nobody uses."""
        return sum(len(pages) for pages in self.free.values())

    @property
    def persistent_huge_pages(self) -> int:
        """Pages that are no surplus."""
        return self.nr_huge_pages - self.surplus_huge_pages

    @property
    def available_huge_pages(self) -> int:
        """Free pages that nobody has a reservation for."""
        return self.free_huge_pages - self.resv_huge_pages

    @property
    def alloc_mask(self) -> int:
        """The gfp flags of new pages: gigantic ones stay out of Movable zones (htlb_alloc_mask)."""
        return GFP_HIGHUSER if self.is_gigantic else GFP_HIGHUSER_MOVABLE

    def hold(self, pfn: int) -> int:
        """Make a block a page of the pool's user; its slot."""
        if self.pool is None:
            self.pool = PoolPages(self.m, self.name, self.order)
        engine = self.pool.engine
        if not self._spare:
            n = engine.nr_slots
            engine.resize(max(2 * n, 64))
            self._spare = list(range(engine.nr_slots - 1, n - 1, -1))
        slot = self._spare.pop()
        engine.attach(self.m, slot, pfn)
        return slot

    def drop(self, nid: int, pfn: int) -> None:
        """Take a free page off its node's list; it is a block in nobody's hands then."""
        slot = self.free[nid].pop(pfn)
        if self.pool is None or self.pool.engine.detach(self.m, slot) != pfn:
            bug("remove_hugetlb_page", f"pfn {pfn:#x} is not where its list says")
        self._spare.append(slot)


def nid_of(m: Machine, pfn: int) -> int:
    """Return the node of a page."""
    zone = m.page_zone(pfn)
    return zone.nid if zone is not None else 0


def hstate_of(m: Machine, pfn: int) -> HState:
    """Return the pool that a huge page belongs to, by its size."""
    order = int(m.pageblocks["order"][pfn >> PAGEBLOCK_ORDER])
    return next(h for h in m.hstates if h.order == order)


# -- one page ---------------------------------------------------------------------------


def enqueue_huge_page(m: Machine, h: HState, pfn: int) -> None:
    """Put a page that is counted and in nobody's hands on its node's list of free ones."""
    h.free[nid_of(m, pfn)][pfn] = h.hold(pfn)


def dequeue_huge_page_node_exact(m: Machine, h: HState, nid: int) -> int | None:
    """Take the free page of a node that came last; None if there is none."""
    for pfn in reversed(h.free[nid]):
        if pfn not in m.hwpoison:
            h.drop(nid, pfn)
            return pfn
    return None


def dequeue_huge_page_nodemask(
    m: Machine, h: HState, gfp: int, nid: int, nodemask: Collection[int] | None
) -> int | None:
    """Take a free page from the nearest node that has one and may give; None if there is none.

    :param nid: whose zonelist says what is near; nodemask: which nodes may give, None for all.
    """
    pgdat = m.nodes[nid]
    zones = pgdat.nofallback if gfp & __GFP_THISNODE else pgdat.zonelist
    asked: set[int] = set()
    for zone in zones:
        allowed = nodemask is None or zone.nid in nodemask
        if zone.zone_idx > gfp_zone(gfp) or zone.nid in asked or not allowed:
            continue
        asked.add(zone.nid)
        pfn = dequeue_huge_page_node_exact(m, h, zone.nid)
        if pfn is not None:
            return pfn
    return None


@traced
def alloc_buddy_huge_page(
    m: Machine,
    h: HState,
    gfp: int,
    nid: int,
    nodemask: Collection[int] | None = None,
    noretry: set[int] | None = None,
) -> int | None:
    """Take a block from the free lists, and count how that went; None if there is none.

    :param noretry: nodes that had none before, which are not tried hard again; it is updated.
    """
    hard = noretry is None or nid not in noretry
    gfp |= __GFP_COMP | __GFP_NOWARN | (__GFP_RETRY_MAYFAIL if hard else 0)
    try:
        pfn = __alloc_pages(m, gfp, h.order, nid, nodemask)
    except OutOfMemory:
        m.count_vm_event("htlb_buddy_alloc_fail")
        if noretry is not None:
            noretry.add(nid)
        return None
    m.count_vm_event("htlb_buddy_alloc_success")
    if noretry is not None:
        noretry.discard(nid)
    return pfn


@traced
def alloc_gigantic_page(
    m: Machine, h: HState, gfp: int, nid: int, nodemask: Collection[int] | None = None
) -> int | None:
    """Take pages in a row for a gigantic page, moving what is in the way; None if that fails."""
    try:
        pfn = m.ops.alloc_contig_pages(m, 1 << h.order, gfp, nid, nodemask)
    except OutOfMemory:
        return None
    _hugetlb.prep_compound_gigantic_page(m, pfn, h.order)
    return pfn


def alloc_fresh_huge_page(
    m: Machine,
    h: HState,
    gfp: int,
    nid: int,
    nodemask: Collection[int] | None = None,
    noretry: set[int] | None = None,
) -> int | None:
    """Allocate a page and count it as one of the pool's; it is on no list yet."""
    if h.is_gigantic:
        pfn = alloc_gigantic_page(m, h, gfp, nid, nodemask)
    else:
        pfn = alloc_buddy_huge_page(m, h, gfp, nid, nodemask, noretry)
    if pfn is not None:
        h.nr_huge_pages_node[nid_of(m, pfn)] += 1
    return pfn


def remove_hugetlb_page(m: Machine, h: HState, pfn: int, adjust_surplus: bool) -> None:
    """Stop counting a page, which comes off its list if it is free.

    :param adjust_surplus: whether it was a surplus page.
    """
    nid = nid_of(m, pfn)
    if pfn in h.free[nid]:
        h.drop(nid, pfn)
    if adjust_surplus:
        h.surplus_huge_pages_node[nid] -= 1
    h.nr_huge_pages_node[nid] -= 1


def update_and_free_page(m: Machine, h: HState, pfn: int) -> None:
    """Give a page that the pool does not count any more back to the free lists."""
    if h.is_gigantic:
        n = _hugetlb.destroy_compound_gigantic_page(m, pfn)
        m.ops.free_contig_range(m, pfn, n)
    else:
        __free_pages(m, pfn, h.order)


@traced
def free_huge_page(
    m: Machine, h: HState, pfn: int, restore_reserve: bool = False, temporary: bool = False
) -> None:
    """Take a page back that nobody uses any more: to its pool, or freed if it is too many.

    :param restore_reserve: whether its reservation comes to life again.
    :param temporary: whether it was made for a migration, beside the pool.
    """
    nid = nid_of(m, pfn)
    if restore_reserve:
        h.resv_huge_pages += 1
    if temporary or h.surplus_huge_pages_node[nid]:
        remove_hugetlb_page(m, h, pfn, not temporary)
        update_and_free_page(m, h, pfn)
    else:
        enqueue_huge_page(m, h, pfn)


# -- what is shown ------------------------------------------------------------------------


def hugetlb_total_pages(m: Machine) -> int:
    """Return the pages in all pools, in pages of 4 KiB."""
    return sum(h.nr_huge_pages << h.order for h in m.hstates)


def hugetlb_report_meminfo(m: Machine) -> list[str]:
    """Return the lines of /proc/meminfo about pools."""
    h = m.default_hstate
    counts = {
        "Total": h.nr_huge_pages,
        "Free": h.free_huge_pages,
        "Rsvd": h.resv_huge_pages,
        "Surp": h.surplus_huge_pages,
    }
    return [
        *(f"HugePages_{k + ':':<9}{n:5}" for k, n in counts.items()),
        f"Hugepagesize:   {h.size >> 10:8} kB",
        f"Hugetlb:        {hugetlb_total_pages(m) * 4:8} kB",
    ]


def hugetlb_report_node_meminfo(m: Machine, nid: int) -> list[str]:
    """Return the lines of a node's meminfo about the default pool."""
    h = m.default_hstate
    return [
        f"Node {nid} HugePages_Total: {h.nr_huge_pages_node[nid]:5}",
        f"Node {nid} HugePages_Free:  {len(h.free[nid]):5}",
        f"Node {nid} HugePages_Surp:  {h.surplus_huge_pages_node[nid]:5}",
    ]
