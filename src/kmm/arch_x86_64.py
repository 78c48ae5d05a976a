"""What x86-64 does of its own: direct map, limits, block size, address to node (arch/x86/mm)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.arguments import check_bytes, check_pfns
from kmm.errors import kernel_error
from kmm.memory_hotplug import __add_pages, __remove_pages
from kmm.params import PAGE_SHIFT, PHYSMEM_END, GiB, MiB
from kmm.sparse import VmemAltmap
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine


def probe_memory_block_size(end_of_ram: int, hypervisor: bool = True) -> int:
    """Return the memory block size in bytes.

    :param end_of_ram: first byte behind the RAM at boot.
    :param hypervisor: whether the kernel runs as a guest.
    """
    if end_of_ram < 64 * GiB:
        return 128 * MiB
    if not hypervisor:
        return 2 * GiB
    size = 2 * GiB
    while size > 128 * MiB and end_of_ram % size:
        size //= 2
    return size


def memory_add_physaddr_to_nid(m: Machine, addr: int) -> int:
    """Return the node of an address that had RAM at boot, else the node of the first such RAM."""
    for start, end, nid in m.numa_meminfo:
        if start <= addr < end:
            return nid
    return m.numa_meminfo[0][2]


@traced
def init_memory_mapping(m: Machine, start: int, end: int) -> None:
    """Map a range of bytes; kmm counts no page tables."""


@fallible
def add_pages(m: Machine, nid: int, pfn: int, nr_pages: int, altmap: VmemAltmap | None) -> None:
    """Add a range of pages and let max_pfn follow; it never falls again.

    :raises OutOfRange: beyond the addressable memory; otherwise as __add_pages.
    """
    pfn, nr_pages = check_pfns(pfn, nr_pages)
    if (pfn + nr_pages) << PAGE_SHIFT > PHYSMEM_END + 1:
        raise kernel_error(-34, f"pages up to {pfn + nr_pages:#x} are beyond {PHYSMEM_END:#x}")
    try:
        __add_pages(m, nid, pfn, nr_pages, altmap)
    finally:
        m.max_pfn = max(m.max_pfn, pfn + nr_pages)


@fallible
def arch_add_memory(
    m: Machine, nid: int, start: int, size: int, altmap: VmemAltmap | None = None
) -> None:
    """Map a range of bytes and add its pages to a node.

    :param start: first byte; size: bytes; altmap: pages of the range that hold its memmap.
    :raises KernelError: as __add_pages.
    """
    start, size = check_bytes(start, size)
    init_memory_mapping(m, start, start + size)
    add_pages(m, nid, start >> PAGE_SHIFT, size >> PAGE_SHIFT, altmap)


@traced
def arch_remove_memory(m: Machine, start: int, size: int) -> None:
    """Remove the pages of a range of bytes and its mapping (see __remove_pages)."""
    start, size = check_bytes(start, size)
    __remove_pages(m, start >> PAGE_SHIFT, size >> PAGE_SHIFT)
