"""Sections and their memmap (mm/sparse.c, mm/sparse-vmemmap.c, arch/x86/mm/init_64.c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.errors import KernelError, kernel_error
from kmm.page_alloc import (
    __GFP_NOWARN,
    __GFP_RETRY_MAYFAIL,
    GFP_KERNEL,
    __alloc_pages,
    __free_pages,
)
from kmm.params import (
    PAGES_PER_SECTION,
    PAGES_PER_SUBSECTION,
    PFN_SECTION_SHIFT,
    PMD_SIZE,
)
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

SECTION_MARKED_PRESENT, SECTION_HAS_MEM_MAP = 1, 2
SECTION_IS_ONLINE, SECTION_IS_EARLY = 4, 8

_VMEMMAP_GFP = GFP_KERNEL | __GFP_RETRY_MAYFAIL | __GFP_NOWARN
VMEMMAP_NOT_OURS = 1 << 63  # a chunk whose pages were taken at boot or from the block itself
PMDS_PER_TABLE = 512


@dataclass(slots=True)
class VmemAltmap:
    """Pages of a memory block that hold its own memmap (struct vmem_altmap)."""

    base_pfn: int
    free: int
    alloc: int = 0


def subsection_mask(pfn: int, nr_pages: int) -> int:
    """Return the bits of the subsections (512 pages) that a range inside a section covers."""
    first = (pfn % PAGES_PER_SECTION) // PAGES_PER_SUBSECTION
    count = nr_pages // PAGES_PER_SUBSECTION
    return ((1 << count) - 1) << first


def vmemmap_chunks(m: Machine, pfn: int, nr_pages: int) -> range:
    """Return the 2 MiB chunks of the virtual memmap that describe a range of pages."""
    size = m.config.struct_page_size
    return range(pfn * size // PMD_SIZE, -(-(pfn + nr_pages) * size // PMD_SIZE))


@fallible
def vmemmap_populate(
    m: Machine, pfn: int, nr_pages: int, nid: int, altmap: VmemAltmap | None
) -> None:
    """Back the struct pages of a range with memory of its node where there is any.

    :raises OutOfMemory: with nothing left allocated.
    """
    done: list[int] = []
    try:
        for chunk in vmemmap_chunks(m, pfn, nr_pages):
            if not m.vmemmap_users[chunk]:
                _populate_chunk(m, chunk, nid, altmap)
            m.vmemmap_users[chunk] += 1
            done.append(chunk)
    except KernelError:
        for chunk in reversed(done):
            _drop_chunk(m, chunk)
        raise


def _populate_chunk(m: Machine, chunk: int, nid: int, altmap: VmemAltmap | None) -> None:
    table = chunk // PMDS_PER_TABLE
    if table not in m.vmemmap_tables:
        m.vmemmap_tables[table] = [__alloc_pages(m, _VMEMMAP_GFP, 0, nid), 0]
    try:
        if altmap is not None:
            altmap.alloc += PMD_SIZE >> 12
            m.vmemmap_pfn[chunk] = VMEMMAP_NOT_OURS
        else:
            m.vmemmap_pfn[chunk] = __alloc_pages(m, _VMEMMAP_GFP, 9, nid)
    except KernelError:
        _populate_basepages(m, chunk, nid)
    m.vmemmap_tables[table][1] += 1


def _populate_basepages(m: Machine, chunk: int, nid: int) -> None:
    pages: list[int] = []
    try:
        for _ in range(PMD_SIZE >> 12):
            pages.append(__alloc_pages(m, _VMEMMAP_GFP, 0, nid))
    except KernelError:
        for page in reversed(pages):
            __free_pages(m, page, 0)
        _put_table(m, chunk // PMDS_PER_TABLE)
        raise
    m.vmemmap_basepages[chunk] = pages
    m.vmemmap_pfn[chunk] = VMEMMAP_NOT_OURS


def _put_table(m: Machine, table: int) -> None:
    page, used = m.vmemmap_tables[table]
    if not used and page >= 0:
        del m.vmemmap_tables[table]
        __free_pages(m, page, 0)


def _drop_chunk(m: Machine, chunk: int) -> None:
    m.vmemmap_users[chunk] -= 1
    if m.vmemmap_users[chunk]:
        return
    pfn = int(m.vmemmap_pfn[chunk])
    m.vmemmap_pfn[chunk] = 0
    if chunk in m.vmemmap_basepages:
        for page in m.vmemmap_basepages.pop(chunk):
            __free_pages(m, page, 0)
    elif not pfn & VMEMMAP_NOT_OURS:
        __free_pages(m, pfn, 9)
    table = chunk // PMDS_PER_TABLE
    m.vmemmap_tables[table][1] -= 1
    _put_table(m, table)


def vmemmap_free(m: Machine, pfn: int, nr_pages: int) -> None:
    """Give the backing of a range's struct pages back."""
    for chunk in vmemmap_chunks(m, pfn, nr_pages):
        _drop_chunk(m, chunk)


@fallible
def sparse_add_section(
    m: Machine, nid: int, start_pfn: int, nr_pages: int, altmap: VmemAltmap | None
) -> None:
    """Make a section, or subsections of one, exist: bitmap, memmap, flags; not online.

    :param start_pfn: first pfn; nr_pages: pages, both multiples of 512, inside one section.
    :raises AlreadyExists: if a page of the range exists.
    :raises OutOfMemory: if there is no page for the memmap; nothing is changed.
    """
    section = start_pfn >> PFN_SECTION_SHIFT
    record = m.sections[section]
    mask = subsection_mask(start_pfn, nr_pages)
    have = int(record["subsection_map"])
    if not mask:
        raise kernel_error(-22, f"section {section}: no subsection in the range")
    if have & mask:
        raise kernel_error(-17, f"section {section} exists")
    if not (have and int(record["flags"]) & SECTION_IS_EARLY):
        vmemmap_populate(m, start_pfn, nr_pages, nid, altmap)
    record["subsection_map"] = have | mask
    if not have:
        record["pageblock_flags"] = 0
        record["nid"] = nid
    record["flags"] = int(record["flags"]) | SECTION_MARKED_PRESENT | SECTION_HAS_MEM_MAP


@traced
def sparse_remove_section(m: Machine, start_pfn: int, nr_pages: int) -> None:
    """Make a section, or subsections of one, vanish with its memmap."""
    record = m.sections[start_pfn >> PFN_SECTION_SHIFT]
    mask = subsection_mask(start_pfn, nr_pages)
    have = int(record["subsection_map"])
    if have & mask != mask:
        m.printk(f"section already deactivated ({start_pfn:#x} + {nr_pages})")
        return
    left = have & ~mask
    early = int(record["flags"]) & SECTION_IS_EARLY
    record["subsection_map"] = left
    if not early or not left:
        vmemmap_free(m, start_pfn, nr_pages)
    if not left:
        record["flags"] = 0
        record["pageblock_flags"] = 0
        record["nid"] = 0


@traced
def online_mem_sections(m: Machine, start_pfn: int, end_pfn: int) -> None:
    """Mark the sections of a range online."""
    first, last = start_pfn >> PFN_SECTION_SHIFT, -(-end_pfn // PAGES_PER_SECTION)
    m.sections["flags"][first:last] |= SECTION_IS_ONLINE


@traced
def offline_mem_sections(m: Machine, start_pfn: int, end_pfn: int) -> None:
    """Mark the sections of a range offline."""
    first, last = start_pfn >> PFN_SECTION_SHIFT, -(-end_pfn // PAGES_PER_SECTION)
    m.sections["flags"][first:last] &= 0xFFFF ^ SECTION_IS_ONLINE


# Names in older kernels.
__add_section = sparse_add_section
sparse_add_one_section = sparse_add_section
sparse_remove_one_section = sparse_remove_section
