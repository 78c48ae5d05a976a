"""Taking single pages out of use on request (mm/memory-failure.c, sysfs doors).

``m.num_poisoned_pages`` is what /proc/meminfo shows as HardwareCorrupted; ``m.hwpoison`` holds
the pages that bear the mark.  They part where the kernel's do: onlining a block again wipes the
marks of its pages and leaves the count.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kmm import _buddy, _page_ref
from kmm.debug import head_of
from kmm.errors import EHWPOISON, kernel_error
from kmm.hwpoison_in_use import (
    IGNORED,
    RECOVERED,
    action_result,
    handle_in_use,
    soft_offline_in_use_page,
)
from kmm.page_alloc import drain_all_pages, zone_pcp_disable, zone_pcp_enable
from kmm.params import (
    FILL_RESERVED,
    FILL_VMEMMAP,
    KPF_BUDDY,
    NR_PAGES_MAX,
    PAGE_SHIFT,
    PG_HWPOISON,
    PG_LRU,
    PG_MOVABLE_OPS,
    PG_OWNER_PRIV,
    PG_RESERVED,
)
from kmm.sparse import SECTION_HAS_MEM_MAP, SECTION_IS_ONLINE
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

# What a page is whose own record is still zero, by the fill of its pageblock.
_OF_FILL = {FILL_RESERVED: PG_RESERVED, FILL_VMEMMAP: PG_RESERVED | PG_OWNER_PRIV}


def _hwpoison_handlable(m: Machine, pfn: int, soft: bool) -> bool:
    """Whether a page in use is one that programs use, so that something can be done about it."""
    marks = _page_ref.marks(m.memmap_engine, head_of(m, pfn))
    if marks & PG_LRU or (soft and marks & PG_MOVABLE_OPS):
        return True
    return _page_ref.is_orphan(m.memmap_engine, head_of(m, pfn))


@traced
def get_hwpoison_page(m: Machine, pfn: int, soft: bool = False) -> str:
    """Return what a page is to those who retire it: ``free``, ``used`` or ``unhandlable``.

    Pages parked on per-CPU lists go back first.

    :param soft: for soft_offline_page, which also takes what a driver can move.
    """
    if _hwpoison_handlable(m, pfn, soft):
        return "used"
    zone = m.page_zone(pfn)
    if zone is not None:
        zone_pcp_disable(m, zone)
        zone_pcp_enable(m, zone)
        if int(m.kpageflags(pfn, 1)[0]) & KPF_BUDDY:
            return "free"
    m.printk(f"Memory failure: {pfn:#x}: unhandlable page.")
    return "unhandlable"


def _mark(m: Machine, pfn: int) -> None:
    """Set the mark of a page that stays in use, without hiding what it is otherwise."""
    flags = int(m.memmap["flags"][pfn])
    if not flags:
        flags = _OF_FILL.get(int(m.pageblocks["state"][pfn >> 9]) & 0x7F, 0)
    m.memmap_engine.set_page_flags(pfn, flags | PG_HWPOISON)


def _take_page_off_buddy(m: Machine, pfn: int) -> None:
    _buddy.take_page_off_buddy(m.memmap_engine, pfn)


@traced
def soft_offline_page(m: Machine, pfn: int) -> None:
    """Retire a page that may break soon; one that is marked already is done with.

    What programs use is moved elsewhere first; a clean page of a file is dropped.

    :raises NoSuchDeviceOrAddress: no memory there; InputOutputError: its block is offline, or the
        kernel uses it; Busy: it is held by somebody; OutOfMemory: it has nowhere to go.
    """
    if pfn >= NR_PAGES_MAX or not m.section_flags(pfn) & SECTION_HAS_MEM_MAP:
        raise kernel_error(-errno.ENXIO, f"no memory at pfn {pfn:#x}")
    if not m.section_flags(pfn) & SECTION_IS_ONLINE:
        raise kernel_error(-errno.EIO, f"the block of pfn {pfn:#x} is offline")
    if pfn in m.hwpoison:
        m.printk(f"soft_offline_page: {pfn:#x} page already poisoned")
        return
    what = get_hwpoison_page(m, pfn, soft=True)
    if what == "unhandlable":
        raise kernel_error(-errno.EIO, f"pfn {pfn:#x} is in use")
    if what == "used":
        soft_offline_in_use_page(m, pfn)
    else:
        drain_all_pages(m, m.page_zone(pfn))
        _take_page_off_buddy(m, pfn)
    m.hwpoison.add(pfn)
    m.num_poisoned_pages += 1


@traced
def memory_failure(m: Machine, pfn: int) -> None:
    """Treat a page as broken: it is marked and counted, whether or not it can be taken away.

    :raises NoSuchDeviceOrAddress: no online memory there; HardwarePoisoned: marked already;
        Busy: nothing could be done about its user, and it keeps the mark.
    """
    if pfn >= NR_PAGES_MAX or not m.section_flags(pfn) & SECTION_IS_ONLINE:
        m.printk(f"Memory failure: {pfn:#x}: memory outside kernel control")
        raise kernel_error(-errno.ENXIO, f"no online memory at pfn {pfn:#x}")
    if pfn in m.hwpoison:
        m.printk(f"Memory failure: {pfn:#x}: already hardware poisoned")
        raise kernel_error(-EHWPOISON, f"pfn {pfn:#x}")
    m.hwpoison.add(pfn)
    m.num_poisoned_pages += 1
    what = get_hwpoison_page(m, pfn)
    if what == "free":
        _take_page_off_buddy(m, pfn)
        action_result(m, pfn, "free buddy page", RECOVERED)
        return
    if what == "used":
        kind, result = handle_in_use(m, pfn)
    else:
        kind, result = "unknown page", IGNORED
        _mark(m, pfn)
    action_result(m, pfn, kind, result)
    if result != RECOVERED:
        raise kernel_error(-errno.EBUSY, f"pfn {pfn:#x} is in use")


def _marked(m: Machine, pfn: int, nr_pages: int) -> set[int]:
    return {p for p in m.hwpoison if pfn <= p < pfn + nr_pages}


@traced
def clear_hwpoisoned_pages(m: Machine, pfn: int, nr_pages: int) -> None:
    """Stop counting the marked pages of a range that is being removed."""
    marked = _marked(m, pfn, nr_pages)
    m.hwpoison -= marked
    m.num_poisoned_pages -= len(marked)


def lose_hwpoison_marks(m: Machine, pfn: int, nr_pages: int) -> None:
    """Forget the marks of a range whose struct pages are initialised anew; the count stays."""
    m.hwpoison -= _marked(m, pfn, nr_pages)


def soft_offline_page_store(m: Machine, addr: int) -> None:
    """Write a physical address (bytes) to ``soft_offline_page`` (see soft_offline_page)."""
    soft_offline_page(m, addr >> PAGE_SHIFT)


def hard_offline_page_store(m: Machine, addr: int) -> None:
    """Write a physical address (bytes) to ``hard_offline_page`` (see memory_failure)."""
    memory_failure(m, addr >> PAGE_SHIFT)
