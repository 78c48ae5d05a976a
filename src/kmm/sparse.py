"""Sections and their memmap (mm/sparse.c, mm/sparse-vmemmap.c, arch/x86/mm/init_64.c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm.errors import KernelError, kernel_error
from kmm.gfp import __GFP_NOWARN, __GFP_RETRY_MAYFAIL, GFP_KERNEL
from kmm.page_alloc import __alloc_pages, __free_pages
from kmm.params import (
    PAGE_SIZE,
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
PMDS_PER_TABLE = PTES_PER_TABLE = 512
SUBSECTIONS_PER_SECTION = PAGES_PER_SECTION // PAGES_PER_SUBSECTION
ALL_SUBSECTIONS = (1 << SUBSECTIONS_PER_SECTION) - 1
PTE_TABLE = -1  # among a chunk's base pages, the one that is their page table


@dataclass(slots=True)
class VmemAltmap:
    """Pages of a memory block that hold its own memmap (struct vmem_altmap)."""

    base_pfn: int
    free: int
    alloc: int = 0


def subsection_mask(pfn: int, nr_pages: int) -> int:
    """Return the bits of the subsections (512 pages) that a range inside a section touches."""
    first = pfn % PAGES_PER_SECTION // PAGES_PER_SUBSECTION
    last = -(-(pfn % PAGES_PER_SECTION + nr_pages) // PAGES_PER_SUBSECTION)
    return (1 << last) - (1 << first) if nr_pages else 0


def vmemmap_chunks(m: Machine, pfn: int, nr_pages: int) -> range:
    """Return the 2 MiB chunks of the virtual memmap that describe a range of pages."""
    size = m.config.struct_page_size
    return range(pfn * size // PMD_SIZE, -(-(pfn + nr_pages) * size // PMD_SIZE))


def vmemmap_users_of(m: Machine, chunk: int, pfn: int, nr_pages: int) -> int:
    """Return how many subsections of a range have struct pages in a chunk."""
    size = m.config.struct_page_size * PAGES_PER_SUBSECTION
    first = max(pfn // PAGES_PER_SUBSECTION, chunk * PMD_SIZE // size)
    last = min((pfn + nr_pages) // PAGES_PER_SUBSECTION, -(-(chunk + 1) * PMD_SIZE // size))
    return last - first


def section_mark_present(m: Machine, section: int) -> None:
    """Note how far sections have ever reached (mm/sparse.c, __highest_present_section_nr)."""
    m.highest_present_section_nr = max(m.highest_present_section_nr, section)


def sections_seen(m: Machine) -> npt.NDArray[np.void]:
    """Return the records of all sections up to the highest that was ever there."""
    return m.sections[: m.highest_present_section_nr + 1]


def chunks_seen(m: Machine) -> slice:
    """Return where in vmemmap_pfn and vmemmap_users anything has ever been."""
    pages = (m.highest_present_section_nr + 1) << PFN_SECTION_SHIFT
    return slice(-(-pages * m.config.struct_page_size // PMD_SIZE))


def _virtual_pages(m: Machine, chunk: int, pfn: int, nr_pages: int) -> range:
    """Return the base pages of the virtual memmap that a range has in a chunk, by number."""
    size = m.config.struct_page_size
    first, last = pfn * size // PAGE_SIZE, (pfn + nr_pages) * size // PAGE_SIZE
    return range(max(first, chunk * PTES_PER_TABLE), min(last, (chunk + 1) * PTES_PER_TABLE))


@fallible
def vmemmap_populate(
    m: Machine, pfn: int, nr_pages: int, nid: int, altmap: VmemAltmap | None
) -> None:
    """Back the struct pages of a range with memory of its node where there is any.

    Large pages are for whole sections; less than one gets base pages.

    :raises OutOfMemory: with nothing left allocated.
    """
    section_mark_present(m, (pfn + nr_pages - 1) >> PFN_SECTION_SHIFT)
    done: list[int] = []
    try:
        for chunk in vmemmap_chunks(m, pfn, nr_pages):
            table = chunk // PMDS_PER_TABLE
            if table not in m.vmemmap_tables:
                m.vmemmap_tables[table] = [__alloc_pages(m, _VMEMMAP_GFP, 0, nid), 0]
            try:
                if nr_pages < PAGES_PER_SECTION or not _populate_large(m, chunk, nid, altmap):
                    _populate_basepages(m, chunk, nid, _virtual_pages(m, chunk, pfn, nr_pages))
            except KernelError:
                _put_table(m, table)
                raise
            if not m.vmemmap_users[chunk]:
                m.vmemmap_tables[table][1] += 1
            m.vmemmap_users[chunk] += vmemmap_users_of(m, chunk, pfn, nr_pages)
            done.append(chunk)
    except KernelError:
        for chunk in reversed(done):
            _drop_chunk(m, chunk, pfn, nr_pages)
        raise


def _populate_large(m: Machine, chunk: int, nid: int, altmap: VmemAltmap | None) -> bool:
    """Back a chunk with one large page; False if it needs base pages."""
    if m.vmemmap_users[chunk]:
        return chunk not in m.vmemmap_basepages
    if altmap is not None:
        altmap.alloc += PMD_SIZE >> 12
        m.vmemmap_pfn[chunk] = VMEMMAP_NOT_OURS
        return True
    try:
        m.vmemmap_pfn[chunk] = __alloc_pages(m, _VMEMMAP_GFP, 9, nid)
    except KernelError:
        return False
    return True


def _populate_basepages(m: Machine, chunk: int, nid: int, virtual: range) -> None:
    """Back a part of a chunk page by page, with a page for the table of them."""
    if m.vmemmap_users[chunk] and chunk not in m.vmemmap_basepages:
        return  # mapped by a large page already
    pages = m.vmemmap_basepages.setdefault(chunk, {})
    done: list[int] = []
    try:
        for number in virtual if PTE_TABLE in pages else (PTE_TABLE, *virtual):
            pages[number] = __alloc_pages(m, _VMEMMAP_GFP, 0, nid)
            done.append(number)
    except KernelError:
        for number in reversed(done):
            __free_pages(m, pages.pop(number), 0)
        if not pages:
            del m.vmemmap_basepages[chunk]
        raise
    m.vmemmap_pfn[chunk] = VMEMMAP_NOT_OURS


def _put_table(m: Machine, table: int) -> None:
    page, used = m.vmemmap_tables[table]
    if not used and page >= 0:
        del m.vmemmap_tables[table]
        __free_pages(m, page, 0)


def _drop_chunk(m: Machine, chunk: int, pfn: int, nr_pages: int) -> None:
    m.vmemmap_users[chunk] -= vmemmap_users_of(m, chunk, pfn, nr_pages)
    left = bool(m.vmemmap_users[chunk])
    pages = m.vmemmap_basepages.get(chunk)
    if pages is not None:
        for number in _virtual_pages(m, chunk, pfn, nr_pages):
            __free_pages(m, pages.pop(number), 0)
    if left:
        return
    if pages is not None:
        __free_pages(m, pages.pop(PTE_TABLE), 0)
        del m.vmemmap_basepages[chunk]
    elif not int(m.vmemmap_pfn[chunk]) & VMEMMAP_NOT_OURS:
        __free_pages(m, int(m.vmemmap_pfn[chunk]), 9)
    m.vmemmap_pfn[chunk] = 0
    table = chunk // PMDS_PER_TABLE
    m.vmemmap_tables[table][1] -= 1
    _put_table(m, table)


def vmemmap_free(m: Machine, pfn: int, nr_pages: int) -> None:
    """Give the backing of a range's struct pages back."""
    for chunk in vmemmap_chunks(m, pfn, nr_pages):
        _drop_chunk(m, chunk, pfn, nr_pages)


def _sections_are_chunks(m: Machine, pfn: int) -> bool:
    """Whether a section starts at pfn and each has one chunk of memmap to itself."""
    size = m.config.struct_page_size * PAGES_PER_SECTION
    return pfn % PAGES_PER_SECTION == 0 and size == PMD_SIZE


def sparse_add_sections(
    m: Machine, nid: int, start_pfn: int, nr_pages: int, altmap: VmemAltmap | None
) -> int:
    """Add whole new sections from start_pfn on at once, as sparse_add_section would one by one.

    :param start_pfn: first pfn; nr_pages: pages.
    :return: pages of the sections that were added; those that need more care are left.
    """
    if m.kprobes is not None or altmap is not None or not _sections_are_chunks(m, start_pfn):
        return 0
    first, count = start_pfn >> PFN_SECTION_SHIFT, nr_pages >> PFN_SECTION_SHIFT
    used = np.flatnonzero(
        m.sections["subsection_map"][first : first + count] | m.vmemmap_users[first : first + count]
    )
    end = first + (int(used[0]) if used.size else count)
    m.records.expect_sections(first, end - first)
    at = first
    while at < end:
        stop = min(end, (at // PMDS_PER_TABLE + 1) * PMDS_PER_TABLE)
        added = _add_sections_of_a_table(m, nid, at, stop - at)
        at += added
        if at < stop:
            break
    return (at - first) << PFN_SECTION_SHIFT


def _add_sections_of_a_table(m: Machine, nid: int, first: int, count: int) -> int:
    """Add sections whose memmap one page table maps; how many found a large page for it."""
    section_mark_present(m, first + count - 1)
    table = first // PMDS_PER_TABLE
    if table not in m.vmemmap_tables:
        m.vmemmap_tables[table] = [__alloc_pages(m, _VMEMMAP_GFP, 0, nid), 0]
    pages = m.alloc_pages_bulk(count, 9, _VMEMMAP_GFP, nid)
    done = slice(first, first + len(pages))
    m.vmemmap_pfn[done] = pages
    m.vmemmap_users[done] = SUBSECTIONS_PER_SECTION
    m.vmemmap_tables[table][1] += len(pages)
    _put_table(m, table)
    sections = m.sections[done]
    sections["subsection_map"] = ALL_SUBSECTIONS
    sections["pageblock_flags"] = 0
    sections["nid"] = nid
    sections["flags"] = SECTION_MARKED_PRESENT | SECTION_HAS_MEM_MAP
    return len(pages)


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


def sparse_remove_sections(m: Machine, start_pfn: int, nr_pages: int) -> int:
    """Remove whole sections from start_pfn on at once, as sparse_remove_section one by one.

    :return: pages of the sections that were removed, at most those whose memmap one page table
        maps; those that need more care, or are not there, are left.
    """
    size = m.config.struct_page_size
    if (
        m.kprobes is not None
        or start_pfn % PAGES_PER_SECTION
        or size * PAGES_PER_SECTION != PMD_SIZE
    ):
        return 0
    first = start_pfn >> PFN_SECTION_SHIFT
    count = min(nr_pages >> PFN_SECTION_SHIFT, PMDS_PER_TABLE - first % PMDS_PER_TABLE)
    records = m.sections[first : first + count]
    special = np.flatnonzero(
        (records["subsection_map"] != ALL_SUBSECTIONS)
        | (records["flags"] & SECTION_IS_EARLY != 0)
        | (m.vmemmap_users[first : first + count] != SUBSECTIONS_PER_SECTION)
        | (m.vmemmap_pfn[first : first + count] & np.uint64(VMEMMAP_NOT_OURS) != 0)
    )
    count = int(special[0]) if special.size else count
    if count:
        _remove_sections_of_a_table(m, first, first + count)
    return count << PFN_SECTION_SHIFT


def _remove_sections_of_a_table(m: Machine, first: int, end: int) -> None:
    done = slice(first, end)
    m.free_pages_bulk(m.vmemmap_pfn[done], 9)
    m.vmemmap_pfn[done] = 0
    m.vmemmap_users[done] = 0
    table = first // PMDS_PER_TABLE
    m.vmemmap_tables[table][1] -= end - first
    _put_table(m, table)
    sections = m.sections[done]
    sections["subsection_map"] = 0
    sections["pageblock_flags"] = 0
    sections["nid"] = 0
    sections["flags"] = 0


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
    if not early:
        vmemmap_free(m, start_pfn, nr_pages)
    elif not left:
        # Boot made the memmap of the whole section, holes included.
        vmemmap_free(m, start_pfn // PAGES_PER_SECTION * PAGES_PER_SECTION, PAGES_PER_SECTION)
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
