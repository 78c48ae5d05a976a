"""Pools of huge pages: growing, shrinking, reserving, surplus, dissolving (mm/hugetlb.c).

A pool has the huge pages of one size on all nodes.  Free ones are on a list per node, the one
that came last being the first to go; they are pages of the pool's own PageUser, in use ones of
somebody else's.  What the pool counts is here; validate.py recounts it from the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from typing import TYPE_CHECKING

from kmm import _hugetlb
from kmm._memory import PageUser
from kmm.errors import OutOfMemory, bug, kernel_error
from kmm.page_alloc import (
    __GFP_COMP,
    __GFP_NOWARN,
    __GFP_RETRY_MAYFAIL,
    __GFP_THISNODE,
    GFP_HIGHUSER,
    GFP_HIGHUSER_MOVABLE,
    __alloc_pages,
    __free_pages,
    gfp_zone,
)
from kmm.params import MAX_ORDER, PAGE_SHIFT, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER, USER_HUGETLB
from kmm.trace import fallible, note, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

PMD_ORDER, PUD_ORDER = 9, 18
ULONG_MAX = (1 << 64) - 1
# Pools that grow by less do it page by page.
_BULK = 64


class HState:
    """The pool of one size.

    :param order: 9 for pages of 2 MiB, 18 for those of 1 GiB, which are called gigantic.
    """

    def __init__(self, m: Machine, order: int) -> None:
        self.m, self.order = m, order
        nodes = list(m.nodes)
        #: Per node: pfn of each free page and its slot at the pool's user, the next to go last.
        self.free: dict[int, dict[int, int]] = {nid: {} for nid in nodes}
        self.nr_huge_pages_node = dict.fromkeys(nodes, 0)
        self.surplus_huge_pages_node = dict.fromkeys(nodes, 0)
        self.resv_huge_pages = 0
        self.max_huge_pages = 0
        self.nr_overcommit_huge_pages = 0
        self.next_nid_to_alloc = self.next_nid_to_free = min(m.n_memory, default=0)
        self._user: PageUser | None = None
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
        if self._user is None:
            self._user = PageUser(self.m.memmap_engine, USER_HUGETLB, 0, self.order)
        if not self._spare:
            n = self._user.nr_slots
            self._user.resize(max(2 * n, 64))
            self._spare = list(range(self._user.nr_slots - 1, n - 1, -1))
        slot = self._spare.pop()
        self._user.attach(self.m, slot, pfn)
        return slot

    def drop(self, nid: int, pfn: int) -> None:
        """Take a free page off its node's list; it is a block in nobody's hands then."""
        slot = self.free[nid].pop(pfn)
        if self._user is None or self._user.detach(self.m, slot) != pfn:
            bug("remove_hugetlb_page", f"pfn {pfn:#x} is not where its list says")
        self._spare.append(slot)


def _nid_of(m: Machine, pfn: int) -> int:
    zone = m.page_zone(pfn)
    return zone.nid if zone is not None else 0


def hstate_of(m: Machine, pfn: int) -> HState:
    """Return the pool that a huge page belongs to, by its size."""
    order = int(m.pageblocks["order"][pfn >> PAGEBLOCK_ORDER])
    return next(h for h in m.hstates if h.order == order)


# -- one page ---------------------------------------------------------------------------


def enqueue_huge_page(m: Machine, h: HState, pfn: int) -> None:
    """Put a page that is counted and in nobody's hands on its node's list of free ones."""
    h.free[_nid_of(m, pfn)][pfn] = h.hold(pfn)


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
        h.nr_huge_pages_node[_nid_of(m, pfn)] += 1
    return pfn


def remove_hugetlb_page(m: Machine, h: HState, pfn: int, adjust_surplus: bool) -> None:
    """Stop counting a page, which comes off its list if it is free.

    :param adjust_surplus: whether it was a surplus page.
    """
    nid = _nid_of(m, pfn)
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
    nid = _nid_of(m, pfn)
    if restore_reserve:
        h.resv_huge_pages += 1
    if temporary or h.surplus_huge_pages_node[nid]:
        remove_hugetlb_page(m, h, pfn, not temporary)
        update_and_free_page(m, h, pfn)
    else:
        enqueue_huge_page(m, h, pfn)


# -- nodes take turns --------------------------------------------------------------------


def _next_node_in(nid: int, nodes: Collection[int]) -> int:
    return min((n for n in nodes if n > nid), default=min(nodes))


def _turns(h: HState, nodes: Collection[int], freeing: bool) -> Iterator[int]:
    """Every node once, from the one whose turn it is on (hstate_next_node_to_alloc, ..._free)."""
    name = "next_nid_to_free" if freeing else "next_nid_to_alloc"
    for _ in range(len(nodes)):
        nid = getattr(h, name)
        if nid not in nodes:
            nid = _next_node_in(nid, nodes)
        setattr(h, name, _next_node_in(nid, nodes))
        yield nid


def alloc_pool_huge_page(
    m: Machine, h: HState, nodes: Collection[int], noretry: set[int] | None = None
) -> bool:
    """Give the pool one page more, from the next node that has one; whether there was one."""
    for nid in _turns(h, nodes, False):
        pfn = alloc_fresh_huge_page(m, h, h.alloc_mask | __GFP_THISNODE, nid, None, noretry)
        if pfn is not None:
            free_huge_page(m, h, pfn)
            return True
    return False


def _alloc_pool_pages_at_once(m: Machine, h: HState, nodes: Collection[int], want: int) -> None:
    """Give the pool many pages, as single calls would, where all nodes have them for sure."""
    share = want // max(len(nodes), 1)
    if h.is_gigantic or share < _BULK or m.kprobes is not None or h.surplus_huge_pages:
        return
    for nid in nodes:
        zones = [z for z in m.nodes[nid].nofallback if z.zone_idx <= gfp_zone(h.alloc_mask)]
        sure = 0
        for z in zones:
            blocks = sum(row[9] + 2 * row[10] for row in z.free_counts()[:3])
            keep = z.watermark_high + z.watermark_boost + max(z.lowmem_reserve)
            sure += max(blocks - keep // PAGEBLOCK_NR_PAGES - 4, 0)
        share = min(share, sure)
    if share < _BULK:
        return
    gfp = h.alloc_mask | __GFP_THISNODE | __GFP_COMP | __GFP_NOWARN | __GFP_RETRY_MAYFAIL
    for nid in _turns(h, nodes, False):
        pfns = m.alloc_pages_bulk(share, h.order, gfp, nid).tolist()
        m.count_vm_event("htlb_buddy_alloc_success", len(pfns))
        h.nr_huge_pages_node[nid] += len(pfns)
        for pfn in pfns:
            enqueue_huge_page(m, h, pfn)


def remove_pool_huge_page(
    m: Machine, h: HState, nodes: Collection[int], acct_surplus: bool
) -> int | None:
    """Take one free page out of the pool, from the next node that has one; None if none has.

    :param acct_surplus: whether it has to be a surplus page.
    """
    for nid in _turns(h, nodes, True):
        if h.free[nid] and (not acct_surplus or h.surplus_huge_pages_node[nid]):
            pfn = next(reversed(h.free[nid]))
            remove_hugetlb_page(m, h, pfn, acct_surplus)
            return pfn
    return None


def update_and_free_pages_bulk(m: Machine, h: HState, pfns: list[int]) -> None:
    """Free pages that were taken out of a pool, the last first."""
    for pfn in reversed(pfns):
        update_and_free_page(m, h, pfn)


def adjust_pool_surplus(m: Machine, h: HState, nodes: Collection[int], delta: int) -> bool:
    """Make one page more, or one less, a surplus page; whether some node had one to take.

    :param delta: 1 or -1.
    """
    surplus, total = h.surplus_huge_pages_node, h.nr_huge_pages_node
    for nid in _turns(h, nodes, delta > 0):
        if surplus[nid] if delta < 0 else surplus[nid] < total[nid]:
            surplus[nid] += delta
            return True
    return False


@traced
def set_max_huge_pages(
    m: Machine, h: HState, count: int, nid: int | None, nodes: Collection[int]
) -> None:
    """Make a pool larger or smaller, as far as memory and reservations let it.

    :param count: pages that it is to have, on the node if one is named.
    :param nid: the node, None for all; nodes: those that take part.
    """
    if nid is not None:
        count = min(count + h.nr_huge_pages - h.nr_huge_pages_node[nid], ULONG_MAX)
    while h.surplus_huge_pages and count > h.persistent_huge_pages:
        if not adjust_pool_surplus(m, h, nodes, -1):
            break
    if count > h.persistent_huge_pages:
        _alloc_pool_pages_at_once(m, h, nodes, count - h.persistent_huge_pages)
    noretry: set[int] = set()
    while count > h.persistent_huge_pages:
        if not alloc_pool_huge_page(m, h, nodes, noretry):
            h.max_huge_pages = h.persistent_huge_pages
            return
    # What is reserved stays, and is too many until it is freed.
    least = max(count, h.resv_huge_pages + h.nr_huge_pages - h.free_huge_pages)
    gone: list[int] = []
    for _ in range(h.persistent_huge_pages - least):
        pfn = remove_pool_huge_page(m, h, nodes, False)
        if pfn is None:
            break
        gone.append(pfn)
    update_and_free_pages_bulk(m, h, gone)
    m.give_back_records()
    while count < h.persistent_huge_pages:
        if not adjust_pool_surplus(m, h, nodes, 1):
            break
    h.max_huge_pages = h.persistent_huge_pages


# -- surplus and reservations ------------------------------------------------------------


def alloc_surplus_huge_page(
    m: Machine, h: HState, gfp: int, nid: int, nodemask: Collection[int] | None = None
) -> int | None:
    """Allocate a page beyond the pool's size, if it may have one; it is on no list yet."""
    if h.is_gigantic or h.surplus_huge_pages >= h.nr_overcommit_huge_pages:
        return None
    pfn = alloc_fresh_huge_page(m, h, gfp, nid, nodemask)
    if pfn is not None:
        h.surplus_huge_pages_node[_nid_of(m, pfn)] += 1
    return pfn


def gather_surplus_pages(m: Machine, h: HState, delta: int) -> bool:
    """Reserve some pages, allocating those that are missing; whether all could be had."""
    needed = h.resv_huge_pages + delta - h.free_huge_pages
    fresh: list[int] = []
    for _ in range(needed):
        pfn = alloc_surplus_huge_page(m, h, h.alloc_mask, m.this_node())
        if pfn is None:
            for pfn in reversed(fresh):
                free_huge_page(m, h, pfn)
            return False
        fresh.append(pfn)
    h.resv_huge_pages += delta
    for pfn in reversed(fresh):
        enqueue_huge_page(m, h, pfn)
    return True


def return_unused_surplus_pages(m: Machine, h: HState, unused_resv_pages: int) -> None:
    """Give up reservations, and free surplus pages that they kept."""
    h.resv_huge_pages -= unused_resv_pages
    gone: list[int] = []
    for _ in range(min(unused_resv_pages, h.surplus_huge_pages)):
        pfn = remove_pool_huge_page(m, h, sorted(m.n_memory), True)
        if pfn is None:
            break
        gone.append(pfn)
    update_and_free_pages_bulk(m, h, gone)


@fallible
def hugetlb_acct_memory(m: Machine, h: HState, delta: int) -> None:
    """Reserve pages of a pool, or with a minus give reservations up.

    :raises OutOfMemory: if the pool has not enough and may not grow.
    """
    if delta > 0 and not gather_surplus_pages(m, h, delta):
        free, held = h.free_huge_pages, h.resv_huge_pages
        raise kernel_error(
            -12, f"{h.name}: {delta} pages to reserve; {free} are free, {held} reserved"
        )
    if delta < 0:
        return_unused_surplus_pages(m, h, -delta)


def alloc_huge_page(
    m: Machine, h: HState, nid: int, nodemask: Collection[int] | None, reserved: bool
) -> int:
    """Take a page of a pool for a user, or a surplus one.

    :param nid: whose zonelist is used; nodemask: which nodes may give, None for all.
    :param reserved: whether the user has a reservation, which it uses up.
    :return: the pfn of a block that is in nobody's hands.
    :raises KernelError: ENOSPC if there is none; who touches it gets SIGBUS.
    """
    pfn = None
    if reserved or h.available_huge_pages:
        pfn = dequeue_huge_page_nodemask(m, h, h.alloc_mask, nid, nodemask)
    if pfn is None:
        pfn = alloc_surplus_huge_page(m, h, h.alloc_mask, nid, nodemask)
    if pfn is None:
        raise kernel_error(-28, f"{h.name}: no page that node {nid}'s CPU may have")
    if reserved:
        h.resv_huge_pages -= 1
    return pfn
