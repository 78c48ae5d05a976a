"""The size of a pool of huge pages: growing, shrinking, surplus, reservations (mm/hugetlb.c)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from kmm import _hugetlb
from kmm.errors import kernel_error
from kmm.gfp import __GFP_COMP, __GFP_NOWARN, __GFP_RETRY_MAYFAIL, __GFP_THISNODE, gfp_zone
from kmm.hugetlb import (
    PMD_ORDER,
    ULONG_MAX,
    HState,
    alloc_fresh_huge_page,
    dequeue_huge_page_nodemask,
    enqueue_huge_page,
    free_huge_page,
    nid_of,
    remove_hugetlb_page,
    update_and_free_page,
)
from kmm.params import PAGEBLOCK_NR_PAGES
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

# Pools that grow by less do it page by page.
_BULK = 64


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


@fallible
def demote_pool_huge_page(m: Machine, h: HState, nodes: Collection[int]) -> None:
    """Make smaller huge pages of a free one, from the next node that has one.

    :raises Busy: if no node has a sound one.
    """
    target = m.hstates[[other.order for other in m.hstates].index(PMD_ORDER)]
    for nid in _turns(h, nodes, True):
        pfn = next((p for p in reversed(h.free[nid]) if p not in m.hwpoison), None)
        if pfn is None:
            continue
        remove_hugetlb_page(m, h, pfn, False)
        end = pfn + _hugetlb.destroy_compound_gigantic_page(m, pfn)
        for part in range(pfn, end, 1 << target.order):
            _hugetlb.prep_compound_gigantic_page(m, part, target.order)
            target.nr_huge_pages_node[nid] += 1
            free_huge_page(m, target, part)
        h.max_huge_pages -= 1
        target.max_huge_pages += 1 << (h.order - target.order)
        return
    raise kernel_error(-16, f"{h.name}: no free page to make smaller ones of")


def demote(m: Machine, h: HState, count: int, nid: int | None) -> None:
    """Make smaller huge pages of free ones that nobody has reserved, as far as there are some.

    :param count: how many; nid: of which node, None for any.
    :raises Busy: if those there are are broken.
    """
    nodes = sorted(m.n_memory) if nid is None else [nid]
    for _ in range(min(count, h.nr_huge_pages)):
        free = h.free_huge_pages if nid is None else len(h.free[nid])
        # A difference of unsigned numbers: below 0 it is no reason to stop.
        if free == h.resv_huge_pages:
            return
        demote_pool_huge_page(m, h, nodes)


# -- surplus and reservations ------------------------------------------------------------


def alloc_surplus_huge_page(
    m: Machine, h: HState, gfp: int, nid: int, nodemask: Collection[int] | None = None
) -> int | None:
    """Allocate a page beyond the pool's size, if it may have one; it is on no list yet."""
    if h.is_gigantic or h.surplus_huge_pages >= h.nr_overcommit_huge_pages:
        return None
    pfn = alloc_fresh_huge_page(m, h, gfp, nid, nodemask)
    if pfn is not None:
        h.surplus_huge_pages_node[nid_of(m, pfn)] += 1
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
