"""Taking single pages out of use on request (mm/memory-failure.c, sysfs doors)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kmm import _buddy
from kmm.errors import kernel_error
from kmm.params import NR_PAGES_MAX, PAGE_SHIFT
from kmm.sparse import SECTION_HAS_MEM_MAP, SECTION_IS_ONLINE

if TYPE_CHECKING:
    from kmm.machine import Machine


def _take(m: Machine, pfn: int) -> None:
    if _buddy.take_page_off_buddy(m.memmap_engine, pfn) < 0:
        raise kernel_error(-errno.EBUSY, f"pfn {pfn:#x} is in use")


def soft_offline(m: Machine, addr: int) -> None:
    """Retire the free page at a physical address (bytes).

    :raises NoSuchDeviceOrAddress: no memory there; InputOutputError: its block is offline;
        Busy: the page is in use.
    """
    pfn = addr >> PAGE_SHIFT
    if pfn >= NR_PAGES_MAX or not m.section_flags(pfn) & SECTION_HAS_MEM_MAP:
        raise kernel_error(-errno.ENXIO, f"no memory at {addr:#x}")
    if not m.section_flags(pfn) & SECTION_IS_ONLINE:
        raise kernel_error(-errno.EIO, f"the block at {addr:#x} is offline")
    _take(m, pfn)


def hard_offline(m: Machine, addr: int) -> None:
    """Treat the page at a physical address (bytes) as broken.

    :raises NoSuchDeviceOrAddress: no online memory there; Busy: the page is in use.
    """
    pfn = addr >> PAGE_SHIFT
    if pfn >= NR_PAGES_MAX or not m.section_flags(pfn) & SECTION_IS_ONLINE:
        m.printk(f"Memory failure: {pfn:#x}: memory outside kernel control")
        raise kernel_error(-errno.ENXIO, f"no online memory at {addr:#x}")
    _take(m, pfn)
    m.printk(f"Memory failure: {pfn:#x}: recovery action for free buddy page: Recovered")
