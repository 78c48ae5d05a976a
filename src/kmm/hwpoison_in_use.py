"""Retiring pages that programs use (mm/memory-failure.c).

Nobody is killed: as by default, a program would be when it touches the page again.  Its slot is
empty, and what the page held is lost unless a file's backing store has it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from kmm import _migrate, _page_ref
from kmm._memory import page_owner
from kmm.debug import head_of, page_flags
from kmm.errors import KernelError, bug, kernel_error
from kmm.gfp import __GFP_COMP, __GFP_HIGHMEM, __GFP_MOVABLE, __GFP_RETRY_MAYFAIL, GFP_USER
from kmm.gup import GUP_PIN_COUNTING_BIAS, pins_of
from kmm.migrate import MigrationTarget, alloc_migration_target, is_huge, migrate_pages
from kmm.page_alloc import __free_pages
from kmm.page_writeback import folio_wait_writeback
from kmm.params import (
    PAGEBLOCK_NR_PAGES,
    PG_DIRTY,
    PG_HWPOISON,
    PG_PINNED,
    PG_WRITEBACK,
    USER_ANON,
    USER_FILE,
    USER_SHMEM,
    ZONE_MOVABLE,
)
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User

IGNORED, FAILED, RECOVERED = "Ignored", "Failed", "Recovered"


@traced
def action_result(m: Machine, pfn: int, kind: str, result: str) -> None:
    """Log what became of a broken page."""
    m.printk(f"Memory failure: {pfn:#x}: recovery action for {kind}: {result}")


def isolate(m: Machine, pfn: int) -> bool:
    """Take one page, or the huge page that starts there, off its list; whether it could be."""
    out, refused = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    return _migrate.isolate_range(m.memmap_engine, pfn, pfn + 1, out, refused)[0] == 1


def try_to_split_thp_page(m: Machine, pfn: int) -> bool:
    """Split the huge page that a page is part of, if it is part of one; False if it is held."""
    head = head_of(m, pfn)
    if not is_huge(m, head):
        return True
    if _page_ref.marks(m.memmap_engine, head) & PG_PINNED or not isolate(m, head):
        m.count_vm_event("thp_split_page_failed")
        return False
    _migrate.split_isolated(m, head)
    parts = np.arange(head, head + PAGEBLOCK_NR_PAGES, dtype=np.uint64)
    _migrate.putback_movable_pages(m.memmap_engine, parts)
    return True


def _owner(m: Machine, pfn: int) -> tuple[User | None, int]:
    number, index = page_owner(m.memmap_engine, pfn)
    return m.users_by_number.get(number), index


def _give_up(m: Machine, user: User, index: int, pfn: int) -> None:
    """Take a broken page from its user; it goes to nobody, once nobody holds it any more."""
    user.engine.detach(m, index)
    _page_ref.set_marks(m.memmap_engine, pfn, PG_HWPOISON)
    if not _page_ref.marks(m.memmap_engine, pfn) & PG_PINNED:
        __free_pages(m, pfn, 0)


def handle_in_use(m: Machine, pfn: int) -> tuple[str, str]:
    """Take a broken page away from who uses it; what it was called, and what came of it.

    Anonymous pages are unmapped, a file's truncated; shmem keeps its page, so that whoever reads
    it learns of the failure.
    """
    if not try_to_split_thp_page(m, pfn):
        marks = int(m.memmap["flags"][pfn])
        m.memmap_engine.set_page_flags(pfn, marks | PG_HWPOISON)
        return "unsplit thp", IGNORED
    folio_wait_writeback(m, pfn)
    user, index = _owner(m, pfn)
    if user is None:
        _page_ref.set_marks(m.memmap_engine, pfn, PG_HWPOISON)
        return "clean LRU page", RECOVERED
    # An anonymous page that was mapped is written to as soon as it comes.
    dirty = user.kind == USER_ANON or bool(_page_ref.marks(m.memmap_engine, pfn) & PG_DIRTY)
    kind = f"{'dirty' if dirty else 'clean'} LRU page"
    if user.kind == USER_FILE and not dirty and user.engine.mapped:
        m.printk(
            f"Memory failure: {pfn:#x}: corrupted page was clean: dropped without side effects"
        )
    if user.kind == USER_SHMEM:
        _page_ref.delete_from_lru(m.memmap_engine, pfn)
        _page_ref.set_marks(m.memmap_engine, pfn, PG_HWPOISON)
    else:
        _give_up(m, user, index, pfn)
    pins = len(pins_of(m, pfn))
    if pins and user.kind != USER_ANON:
        users = pins * GUP_PIN_COUNTING_BIAS
        m.printk(f"Memory failure: {pfn:#x}: {kind} still referenced by {users} users")
        return kind, FAILED
    return kind, RECOVERED


def _invalidate_inode_page(m: Machine, pfn: int) -> bool:
    """Drop a file's page that nobody maps or holds and that is clean; whether it was one."""
    user, index = _owner(m, pfn)
    if user is None or user.kind != USER_FILE or user.engine.mapped:
        return False
    if _page_ref.marks(m.memmap_engine, pfn) & (PG_DIRTY | PG_WRITEBACK | PG_PINNED):
        return False
    _give_up(m, user, index, pfn)
    return True


@traced
def soft_offline_in_use_page(m: Machine, pfn: int) -> None:
    """Move what a page holds elsewhere, so that nobody uses it any more.

    :raises Busy: if somebody holds it; OutOfMemory: if it has nowhere to go.
    """
    if not try_to_split_thp_page(m, pfn):
        m.printk(f"soft offline: {pfn:#x}: thp split failed")
        raise kernel_error(-errno.EBUSY, f"pfn {pfn:#x} is part of a huge page that is held")
    folio_wait_writeback(m, pfn)
    if _invalidate_inode_page(m, pfn):
        m.printk(f"soft_offline: {pfn:#x}: invalidated")
        return
    code = _migrate_and_poison(m, pfn)
    if code:
        flags = page_flags(m, pfn, without=("lru",))
        m.printk(f"soft offline: {pfn:#x}: page migration failed {code}, type {flags}")
        why = "has nowhere to go" if code < 0 else "is held by somebody"
        raise kernel_error(code if code < 0 else -errno.EBUSY, f"pfn {pfn:#x} {why}")


def _migrate_and_poison(m: Machine, pfn: int) -> int:
    """Move a page; 0, or how many could not be moved, or a negative errno."""
    zone = m.page_zone(pfn)
    if zone is None:
        bug("soft_offline_page", f"pfn {pfn:#x} is in no zone")
    gfp = GFP_USER | __GFP_MOVABLE | __GFP_RETRY_MAYFAIL | __GFP_COMP
    if zone.zone_idx == ZONE_MOVABLE:
        gfp |= __GFP_HIGHMEM
    target = MigrationTarget(gfp, zone.nid)
    if _owner(m, pfn)[0] is None or not isolate(m, pfn):
        m.count_vm_event("pgmigrate_fail")
        return 1
    one = np.array([pfn], dtype=np.uint64)
    if _page_ref.marks(m.memmap_engine, pfn) & PG_PINNED:
        user, _ = _owner(m, pfn)
        if user is not None and user.kind == USER_ANON:
            # Unmapped and mapped again, it knows itself what the page table knew.
            _page_ref.set_marks(m.memmap_engine, pfn, PG_DIRTY)
        return len(migrate_pages(m, one, target).left)
    try:
        to = alloc_migration_target(m, pfn, target)
    except KernelError:
        _migrate.putback_movable_pages(m.memmap_engine, one)
        m.count_vm_event("pgmigrate_fail")
        return -errno.ENOMEM
    _migrate.migrate_to(m, pfn, to, m.this_cpu, poison=True)
    return 0
