"""Huge pages of pools leave a range: used ones move, free ones dissolve (mm/hugetlb.c)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _hugetlb, _migrate
from kmm.errors import Busy, kernel_error
from kmm.gfp import __GFP_NOWARN, __GFP_THISNODE
from kmm.hugetlb import (
    HState,
    alloc_buddy_huge_page,
    alloc_fresh_huge_page,
    dequeue_huge_page_nodemask,
    enqueue_huge_page,
    free_huge_page,
    hstate_of,
    remove_hugetlb_page,
    update_and_free_page,
)
from kmm.params import (
    MIGRATE_AGAIN,
    MIGRATE_DONE,
    MIGRATE_GONE,
    MIGRATE_PENDING,
    PAGEBLOCK_ORDER,
    PG_ACTIVE,
    PG_ISOLATED,
    PG_PINNED,
)
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

#: How often a huge page that somebody holds is tried within one call.
MAX_PASSES = 10

Pfns = npt.NDArray[np.uint64]


def huge_pages_in(m: Machine, start_pfn: int, end_pfn: int) -> list[int]:
    """Return the pfns of the pools' huge pages that have pages in a range, upward.

    A gigantic one may begin below the range.
    """
    if not any(h.nr_huge_pages for h in m.hstates):
        return []
    found = _hugetlb.hugetlb_heads(m.memmap_engine, start_pfn, end_pfn)
    below = {
        head
        for h in m.hstates
        if h.is_gigantic and h.nr_huge_pages
        for head in [start_pfn >> h.order << h.order]
        if head < start_pfn and _hugetlb.hugetlb_heads(m.memmap_engine, head, head + 1)
    }
    return [head for head in below if hstate_of(m, head).is_gigantic] + found


def flags_of(m: Machine, pfn: int) -> int:
    """Return the PG_* marks of a huge page."""
    return int(m.pageblocks["flags"][pfn >> PAGEBLOCK_ORDER])


def used_huge_page_across(m: Machine, start_pfn: int) -> int | None:
    """Return the huge page in use that begins below a pfn and holds it, if there is one."""
    for head in huge_pages_in(m, start_pfn, start_pfn + 1):
        if head < start_pfn and flags_of(m, head) & PG_ACTIVE:
            return head
    return None


def mark_huge_pages(m: Machine, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Tell which pages of a list are huge pages of pools."""
    which = np.zeros(len(pfns), dtype=np.uint8)
    if any(h.nr_huge_pages for h in m.hstates):
        _hugetlb.mark_hugetlb(m.memmap_engine, pfns, which)
    return which.astype(np.bool_)


# -- moving -----------------------------------------------------------------------------


def alloc_huge_page_nodemask(
    m: Machine, h: HState, nid: int, nodemask: Collection[int] | None, gfp: int
) -> tuple[int, bool] | None:
    """Find a huge page for another one to move to: a free one of the pool, else a fresh one.

    :param nid: whose zonelist is used; nodemask: which nodes may give, None for all.
    :param gfp: of the migration; the pool has its own but for __GFP_THISNODE and __GFP_NOWARN.
    :return: its pfn, and whether it is temporary, beside the pool; None if there is none.
    """
    gfp = h.alloc_mask | gfp & (__GFP_THISNODE | __GFP_NOWARN)
    if h.available_huge_pages:
        pfn = dequeue_huge_page_nodemask(m, h, gfp, nid, nodemask)
        if pfn is not None:
            return pfn, False
    pfn = None if h.is_gigantic else alloc_fresh_huge_page(m, h, gfp, nid, nodemask)
    return None if pfn is None else (pfn, True)


def move_hugetlb_state(m: Machine, h: HState, old: int, new: int) -> None:
    """Let the old page be the temporary one, and the node's surplus go along."""
    old_zone, new_zone = m.page_zone(old), m.page_zone(new)
    if old_zone is None or new_zone is None or old_zone.nid == new_zone.nid:
        return
    if h.surplus_huge_pages_node[old_zone.nid]:
        h.surplus_huge_pages_node[old_zone.nid] -= 1
        h.surplus_huge_pages_node[new_zone.nid] += 1


@traced
def unmap_and_move_huge_page(
    m: Machine, pfn: int, gfp: int, nid: int, nodemask: Collection[int] | None
) -> tuple[int, int] | None:
    """Move one isolated huge page, which goes back to its pool or is freed.

    :return: a MIGRATE_* and where it went; None if there was no page to go to.
    """
    if not flags_of(m, pfn) & PG_ISOLATED:
        return MIGRATE_GONE, 0
    h = hstate_of(m, pfn)
    found = alloc_huge_page_nodemask(m, h, nid, nodemask, gfp)
    if found is None:
        return None
    new, temporary = found
    if flags_of(m, pfn) & PG_PINNED:
        free_huge_page(m, h, new, temporary=temporary)
        return MIGRATE_AGAIN, 0
    _hugetlb.move_hugetlb(m, pfn, new)
    if temporary:
        move_hugetlb_state(m, h, pfn, new)
    free_huge_page(m, h, pfn, temporary=temporary)
    return MIGRATE_DONE, new


@dataclass(slots=True)
class HugetlbResult:
    """What became of huge pages that were to move; counts are in base pages."""

    moved: Pfns
    to: Pfns
    left: Pfns
    nr_succeeded: int
    nr_failed: int
    code: int  # -ENOMEM if it stopped for want of a page to move to


def migrate_hugetlbs(
    m: Machine, pfns: Pfns, gfp: int, nid: int, nodemask: Collection[int] | None
) -> HugetlbResult:
    """Move isolated huge pages, first to last, ten times round those that somebody holds.

    One that has nowhere to go ends it.  What does not move is isolated no more.

    :param gfp, nid, nodemask: as for alloc_huge_page_nodemask.
    """
    status = np.zeros(len(pfns), dtype=np.uint8)
    to = np.zeros(len(pfns), dtype=np.uint64)
    failed = code = 0
    for _ in range(MAX_PASSES):
        again = np.flatnonzero((status == MIGRATE_PENDING) | (status == MIGRATE_AGAIN))
        if code or not len(again):
            break
        failed = 0
        for i in again.tolist():
            pages = 1 << hstate_of(m, int(pfns[i])).order
            moved = unmap_and_move_huge_page(m, int(pfns[i]), gfp, nid, nodemask)
            if moved is None:
                code, failed = -12, failed + pages
                break
            status[i], to[i] = moved
            failed += pages if moved[0] == MIGRATE_AGAIN else 0
    done = status == MIGRATE_DONE
    left = pfns[~done & (status != MIGRATE_GONE)]
    succeeded = sum(1 << hstate_of(m, pfn).order for pfn in to[done].tolist())
    m.count_vm_event("pgmigrate_success", succeeded)
    m.count_vm_event("pgmigrate_fail", failed)
    _migrate.putback_movable_pages(m.memmap_engine, left)
    return HugetlbResult(pfns[done], to[done], left, succeeded, failed, code)


# -- dissolving --------------------------------------------------------------------------


@traced
def dissolve_free_huge_page(m: Machine, pfn: int) -> None:
    """Give a free huge page back to the free lists; its pool is to be that much smaller.

    :raises Busy: if it is in use, or all free pages of the pool are reserved.
    """
    h = hstate_of(m, pfn)
    if flags_of(m, pfn) & PG_ACTIVE:
        raise kernel_error(-16, f"huge page at pfn {pfn:#x} of {m.describe_page(pfn)} is in use")
    if not h.available_huge_pages:
        held = h.resv_huge_pages
        raise kernel_error(-16, f"huge page at pfn {pfn:#x}: all {held} free ones are reserved")
    remove_hugetlb_page(m, h, pfn, False)
    h.max_huge_pages -= 1
    update_and_free_page(m, h, pfn)


@fallible
def dissolve_free_huge_pages(m: Machine, start_pfn: int, end_pfn: int) -> None:
    """Give the free huge pages of a range back to the free lists, upward.

    :raises Busy: at the first that cannot be; those before it are dissolved.
    """
    for pfn in huge_pages_in(m, start_pfn, end_pfn):
        dissolve_free_huge_page(m, pfn)


@traced
def alloc_and_dissolve_huge_page(m: Machine, h: HState, pfn: int) -> None:
    """Put a fresh page of the same node in a free one's place, which goes to the free lists.

    :raises OutOfMemory: if there is none.
    """
    zone = m.page_zone(pfn)
    nid = zone.nid if zone is not None else 0
    fresh = alloc_buddy_huge_page(m, h, h.alloc_mask | __GFP_THISNODE, nid)
    if fresh is None:
        raise kernel_error(-12, f"no page to take the place of the huge page at pfn {pfn:#x}")
    remove_hugetlb_page(m, h, pfn, False)
    h.nr_huge_pages_node[nid] += 1
    enqueue_huge_page(m, h, fresh)
    update_and_free_page(m, h, pfn)


@traced
def isolate_or_dissolve_huge_page(m: Machine, pfn: int) -> bool:
    """Clear a huge page out of a range that somebody wants as a whole.

    :return: True if it is isolated, to be moved; False if it was free and is dissolved.
    :raises OutOfMemory: if it is gigantic, or has no page to take its place;
        Busy: if it is isolated already.
    """
    h = hstate_of(m, pfn)
    if h.is_gigantic:
        raise kernel_error(-12, f"huge page at pfn {pfn:#x} is gigantic")
    if not flags_of(m, pfn) & PG_ACTIVE:
        alloc_and_dissolve_huge_page(m, h, pfn)
        return False
    if not _hugetlb.isolate_hugetlb(m.memmap_engine, pfn):
        raise Busy(f"huge page at pfn {pfn:#x} is isolated already")
    return True
