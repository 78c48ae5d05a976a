"""Taking ranges out of the allocator's hands (mm/page_isolation.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm import _scan
from kmm.errors import KernelError, kernel_error
from kmm.mmzone import Zone
from kmm.params import MIGRATE_MOVABLE, PAGEBLOCK_NR_PAGES
from kmm.trace import fallible, note, traced

if TYPE_CHECKING:
    from kmm.machine import Machine


def _blocked(pfn: int, why: str) -> KernelError:
    error = kernel_error(-16, why)
    error.pfn = pfn
    return error


@fallible
def start_isolate_page_range(m: Machine, zone: Zone, start_pfn: int, end_pfn: int) -> None:
    """Isolate all pageblocks of a range.

    :param start_pfn: first pfn; end_pfn: pfn behind the last; multiples of 512.
    :raises Busy: a page can neither move nor go; what was isolated comes back as Movable.
    """
    blocked = _scan.start_isolate_page_range(zone, start_pfn, end_pfn)
    if blocked == -1:
        note(m, "isolate_single_pageblock", 2)
    elif blocked < -1:
        note(m, "isolate_single_pageblock", 2)
        raise _blocked(-2 - blocked, f"pfn {-2 - blocked:#x} is huge, and reaches beyond")
    else:
        _note_refusal(m, zone, start_pfn, end_pfn, blocked)
        m.dump_page(blocked, "unmovable page")
        raise _blocked(blocked, f"pfn {blocked:#x} is unmovable")


def _note_refusal(m: Machine, zone: Zone, start_pfn: int, end_pfn: int, blocked: int) -> None:
    """Record how far isolation came, and its undo, which the engine has done already.

    The first and the last pageblock are isolated on their own, those between one after another.

    :param blocked: the pfn in the way.
    """
    pageblock = blocked - blocked % PAGEBLOCK_NR_PAGES
    if pageblock == start_pfn:
        note(m, "isolate_single_pageblock", 1)
        return
    note(m, "isolate_single_pageblock", 2)
    if pageblock != end_pfn - PAGEBLOCK_NR_PAGES:
        undo_isolate_page_range(m, zone, start_pfn, pageblock)
    note(m, "unset_migratetype_isolate", 1)


@traced
def undo_isolate_page_range(
    m: Machine, zone: Zone, start_pfn: int, end_pfn: int, mt: int = MIGRATE_MOVABLE
) -> None:
    """Give isolated pageblocks back to the allocator with migratetype ``mt``."""
    note(m, "unset_migratetype_isolate", (end_pfn - start_pfn) // PAGEBLOCK_NR_PAGES)
    _scan.undo_isolate_page_range(zone, start_pfn, end_pfn, mt)


@fallible
def test_pages_isolated(m: Machine, start_pfn: int, end_pfn: int) -> None:
    """Check that every page of an isolated range is free.

    :raises Busy: with the first page that is not.
    """
    found = _scan.test_pages_isolated(m.memmap_engine, start_pfn, end_pfn)
    if found >= 0:
        raise _blocked(found, f"pfn {found:#x} is in use")
