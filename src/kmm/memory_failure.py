"""Taking single pages out of use on request (mm/memory-failure.c, sysfs doors).

``m.num_poisoned_pages`` is what /proc/meminfo shows as HardwareCorrupted; ``m.hwpoison`` holds
the pages that bear the mark.  They part where the kernel's do: onlining a block again wipes the
marks of its pages and leaves the count.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kmm import _buddy
from kmm._memory import page_owner
from kmm.errors import EHWPOISON, kernel_error
from kmm.page_alloc import drain_all_pages, zone_pcp_disable, zone_pcp_enable
from kmm.params import (
    FILL_RESERVED,
    FILL_VMEMMAP,
    KPF_BUDDY,
    NR_PAGES_MAX,
    PAGE_SHIFT,
    PG_DIRTY,
    PG_HWPOISON,
    PG_OWNER_PRIV,
    PG_RESERVED,
    USER_ANON,
    USER_FILE,
    USER_SHMEM,
)
from kmm.sparse import SECTION_HAS_MEM_MAP, SECTION_IS_ONLINE
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

# What a page is whose own record is still zero, by the fill of its pageblock.
_OF_FILL = {FILL_RESERVED: PG_RESERVED, FILL_VMEMMAP: PG_RESERVED | PG_OWNER_PRIV}


@traced
def get_hwpoison_page(m: Machine, pfn: int) -> bool:
    """Whether a page can be handled: it is free; pages parked on per-CPU lists go back first."""
    zone = m.page_zone(pfn)
    if zone is not None:
        zone_pcp_disable(m, zone)
        zone_pcp_enable(m, zone)
        if int(m.kpageflags(pfn, 1)[0]) & KPF_BUDDY:
            return True
    m.printk(f"Memory failure: {pfn:#x}: unhandlable page.")
    return False


def _mark(m: Machine, pfn: int) -> None:
    """Set the mark of a page that stays in use, without hiding what it is otherwise."""
    flags = int(m.memmap["flags"][pfn])
    if not flags:
        flags = _OF_FILL.get(int(m.pageblocks["state"][pfn >> 9]) & 0x7F, 0)
    m.memmap_engine.set_page_flags(pfn, flags | PG_HWPOISON)


def _take_page_off_buddy(m: Machine, pfn: int) -> None:
    _buddy.take_page_off_buddy(m.memmap_engine, pfn)


def _take_from_user(m: Machine, pfn: int) -> str | None:
    """Take a page on an LRU list from its user; what it was in words, None if there is no such.

    A huge page is split before, and the other pages of it stay with the user.
    """
    number, index = page_owner(m.memmap_engine, pfn)
    user = m.users_by_number.get(number)
    if user is None or user.kind not in (USER_ANON, USER_SHMEM, USER_FILE):
        return None
    user.engine.split(m, index)
    flags = int(m.memmap["flags"][pfn])
    # An anonymous page that was mapped is written to as soon as it comes.
    dirty = user.kind == USER_ANON or flags & PG_DIRTY
    user.engine.detach(m, index)
    _mark(m, pfn)
    return "dirty LRU page" if dirty else "clean LRU page"


@traced
def soft_offline_page(m: Machine, pfn: int) -> None:
    """Retire a page that may break soon; one that is marked already is done with.

    :raises NoSuchDeviceOrAddress: no memory there; InputOutputError: its block is offline, or it
        is in use (what programs use would be migrated, which is not modelled yet).
    """
    if pfn >= NR_PAGES_MAX or not m.section_flags(pfn) & SECTION_HAS_MEM_MAP:
        raise kernel_error(-errno.ENXIO, f"no memory at pfn {pfn:#x}")
    if not m.section_flags(pfn) & SECTION_IS_ONLINE:
        raise kernel_error(-errno.EIO, f"the block of pfn {pfn:#x} is offline")
    if pfn in m.hwpoison:
        m.printk(f"soft_offline_page: {pfn:#x} page already poisoned")
        return
    if not get_hwpoison_page(m, pfn):
        raise kernel_error(-errno.EIO, f"pfn {pfn:#x} is in use")
    drain_all_pages(m, m.page_zone(pfn))
    _take_page_off_buddy(m, pfn)
    m.hwpoison.add(pfn)
    m.num_poisoned_pages += 1


@traced
def memory_failure(m: Machine, pfn: int) -> None:
    """Treat a page as broken: it is marked and counted, whether or not it can be taken away.

    :raises NoSuchDeviceOrAddress: no online memory there; HardwarePoisoned: marked already;
        Busy: it is in use, and keeps the mark.  What is on an LRU list is taken from its user, to
        whom it is as if it had never been there (a task dies as soon as it touches it).
    """
    if pfn >= NR_PAGES_MAX or not m.section_flags(pfn) & SECTION_IS_ONLINE:
        m.printk(f"Memory failure: {pfn:#x}: memory outside kernel control")
        raise kernel_error(-errno.ENXIO, f"no online memory at pfn {pfn:#x}")
    if pfn in m.hwpoison:
        m.printk(f"Memory failure: {pfn:#x}: already hardware poisoned")
        raise kernel_error(-EHWPOISON, f"pfn {pfn:#x}")
    m.hwpoison.add(pfn)
    m.num_poisoned_pages += 1
    what = _take_from_user(m, pfn)
    if what is not None:
        m.printk(f"Memory failure: {pfn:#x}: recovery action for {what}: Recovered")
        return
    if not get_hwpoison_page(m, pfn):
        _mark(m, pfn)
        m.printk(f"Memory failure: {pfn:#x}: recovery action for unknown page: Ignored")
        raise kernel_error(-errno.EBUSY, f"pfn {pfn:#x} is in use")
    _take_page_off_buddy(m, pfn)
    m.printk(f"Memory failure: {pfn:#x}: recovery action for free buddy page: Recovered")


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
