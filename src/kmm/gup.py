"""Holding users' pages in place (mm/gup.c).

A page that is held for a moment stays where it is, and whoever wants to move it tries again and
again.  One that is held for long must not lie in a Movable zone: it is moved out first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kmm import _migrate, _page_ref
from kmm.errors import KernelError, check_number, kernel_error
from kmm.gfp import (
    __GFP_COMP,
    __GFP_HIGHMEM,
    __GFP_MOVABLE,
    __GFP_NOWARN,
    __GFP_RECLAIM,
    GFP_TRANSHUGE,
    GFP_USER,
)
from kmm.memory import KIND_NAMES, User
from kmm.migrate import MigrationTarget, is_huge, migrate_pages
from kmm.page_alloc import __alloc_pages, __free_pages
from kmm.params import (
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_PINNED,
    PG_REFERENCED,
    PG_USER,
    USER_ANON,
    USER_FILE,
    USER_SHMEM,
    ZONE_MOVABLE,
)
from kmm.trace import traced
from kmm.vmstat import NODE_STAT_ITEMS

if TYPE_CHECKING:
    from kmm.machine import Machine

#: What a pin adds to the references of a page that is not compound.
GUP_PIN_COUNTING_BIAS = 1024
_PINNABLE = (USER_ANON, USER_SHMEM, USER_FILE)
_ACQUIRED = NODE_STAT_ITEMS.index("nr_foll_pin_acquired")
_RELEASED = NODE_STAT_ITEMS.index("nr_foll_pin_released")


@dataclass(eq=False, slots=True)
class Pin:
    """One reference that holds pages in place: the ``nr_pages`` (1 or 512) from ``pfn`` on."""

    pfn: int
    nr_pages: int
    user: str
    index: int
    long_term: bool


def pins_of(m: Machine, pfn: int) -> list[Pin]:
    """The pins that hold a page."""
    near = m.pins.get(pfn // PAGEBLOCK_NR_PAGES, [])
    return [pin for pin in near if pin.pfn <= pfn < pin.pfn + pin.nr_pages]


def _count(m: Machine, item: int, pfn: int) -> None:
    zone = m.page_zone(pfn)
    if zone is not None:
        _page_ref.count_node_stat(m.memmap_engine, zone.nid, item, 1)


def _folio(m: Machine, pfn: int) -> tuple[int, int]:
    """The first page of what a user's page is part of, and its pages."""
    head = pfn // PAGEBLOCK_NR_PAGES * PAGEBLOCK_NR_PAGES
    return (head, PAGEBLOCK_NR_PAGES) if is_huge(m, head) else (pfn, 1)


def _pfn_of(m: Machine, user: User, index: int, long_term: bool) -> int:
    """Where a user's page is; it is brought in if need be, not as a movable one if it is to stay.

    :raises OutOfMemory: if there is no memory for it.
    """
    pfn = int(user.pfns(index, 1)[0])
    if pfn < 0:
        gfp = user.gfp
        user.gfp = gfp & ~__GFP_MOVABLE if long_term else gfp
        try:
            user.fault(index, 1)
        finally:
            user.gfp = gfp
        pfn = int(user.pfns(index, 1)[0])
    return pfn


def is_longterm_pinnable_page(m: Machine, pfn: int) -> bool:
    """Whether a page may be held for long where it lies: not in a Movable zone."""
    zone = m.page_zone(pfn)
    return zone is None or zone.zone_idx != ZONE_MOVABLE


@traced
def migrate_longterm_unpinnable_pages(m: Machine, pfn: int) -> None:
    """Move a page, or the huge page that starts there, out of its Movable zone.

    :raises OutOfMemory: if it is held by somebody else, or has nowhere to go.
    """
    out, refused = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    engine = m.memmap_engine
    n, _ = _migrate.isolate_range(engine, pfn, pfn + 1, out, refused)
    zone = m.page_zone(pfn)
    if n == 0 or zone is None:
        raise kernel_error(-12, f"pfn {pfn:#x} cannot be isolated")
    gfp = GFP_USER | __GFP_NOWARN | __GFP_HIGHMEM | __GFP_COMP
    if is_huge(m, pfn) and not _page_ref.marks(engine, pfn) & PG_PINNED:
        # What is requested for long is not movable, whatever is usual for huge pages.
        huge = ((gfp & ~__GFP_RECLAIM) | GFP_TRANSHUGE) & ~__GFP_MOVABLE
        try:
            to = __alloc_pages(m, huge, PAGEBLOCK_ORDER, zone.nid)
        except KernelError:
            _migrate.split_isolated(m, pfn)
            out = np.arange(pfn, pfn + PAGEBLOCK_NR_PAGES, dtype=np.uint64)
        else:
            _migrate.migrate_to(m, pfn, to, m.this_cpu)
            return
    result = migrate_pages(m, out, MigrationTarget(gfp, zone.nid))
    if len(result.left):
        why = "has nowhere to go" if result.code else "is held by somebody"
        raise kernel_error(-12, f"pfn {pfn:#x} of {m.describe_page(pfn)} {why}")


@traced
def pin_user_pages(m: Machine, user: User, index: int, long_term: bool = True) -> Pin:
    """Hold a user's page, or the huge page that it is part of.

    :param user: of anonymous, shmem or file pages; index: of its page, which is brought in.
    :param long_term: for as long as a driver or io_uring has it (FOLL_LONGTERM): it is moved out
        of a Movable zone first.
    :return: what m.unpin takes.
    :raises InvalidArgument: for another user or index; OutOfMemory: if the page cannot be brought
        in, or not be moved out; it is not held then.
    """
    if not isinstance(user, User) or user.m is not m or user.kind not in _PINNABLE:
        kinds = ", ".join(KIND_NAMES[k] for k in _PINNABLE)
        raise kernel_error(-22, f"user: {user!r}; allowed: one of this machine of kind {kinds}")
    check_number("index", index, 0, user.pages - 1)
    while True:
        pfn = _pfn_of(m, user, index, long_term)
        head, nr_pages = _folio(m, pfn)
        _count(m, _ACQUIRED, head)
        if not long_term or is_longterm_pinnable_page(m, head):
            break
        _count(m, _RELEASED, head)
        migrate_longterm_unpinnable_pages(m, head)
    # What is held for a moment is looked up the fast way, which leaves its trace.
    marks = PG_PINNED if long_term else PG_PINNED | PG_REFERENCED
    _page_ref.set_marks(m.memmap_engine, head, marks)
    pin = Pin(head, nr_pages, user.name, index, long_term)
    m.pins.setdefault(head // PAGEBLOCK_NR_PAGES, []).append(pin)
    return pin


@traced
def unpin_user_page(m: Machine, pin: Pin) -> None:
    """Let go of what a pin held; pages whose user is gone are free then.

    :raises InvalidArgument: for a pin that does not hold anything (any more).
    """
    near = m.pins.get(pin.pfn // PAGEBLOCK_NR_PAGES, []) if isinstance(pin, Pin) else []
    if pin not in near:
        raise kernel_error(-22, f"pin: {pin!r}; allowed: one that m.pin returned and nobody undid")
    _count(m, _RELEASED, pin.pfn)
    near.remove(pin)
    if not near:
        del m.pins[pin.pfn // PAGEBLOCK_NR_PAGES]
    huge = pin.nr_pages > 1 and is_huge(m, pin.pfn)
    for pfn in [pin.pfn] if huge else range(pin.pfn, pin.pfn + pin.nr_pages):
        # A huge page that was split meanwhile is held part by part.
        if not pins_of(m, pfn):
            _unhold(m, pfn, PAGEBLOCK_ORDER if huge else 0)


def _unhold(m: Machine, pfn: int, order: int) -> None:
    engine = m.memmap_engine
    if not _page_ref.marks(engine, pfn) & PG_PINNED:
        return
    _page_ref.clear_marks(engine, pfn, PG_PINNED)
    if not _page_ref.marks(engine, pfn) & PG_USER:
        __free_pages(m, pfn, order)
