"""What boot makes of RAM: sections, zones with their pages, node states, block devices.

Models mm/mm_init.c, the early part of mm/sparse.c and the boot part of mm/page_alloc.c.  All
that is here runs before a machine's story begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kmm.memory_block import MemoryBlock
from kmm.mmzone import Zone
from kmm.page_alloc import FPI_TO_TAIL
from kmm.params import (
    FILL_KERNEL,
    FILL_NONE,
    FILL_RESERVED,
    KERNEL_END,
    KERNEL_START,
    MAX_DMA32_PFN,
    MAX_DMA_PFN,
    MIGRATE_MOVABLE,
    PAGE_SHIFT,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
    PAGES_PER_SUBSECTION,
    PG_RESERVED,
    PG_SLAB,
    PMD_SIZE,
    ZONE_NORMAL,
)
from kmm.sparse import (
    ALL_SUBSECTIONS,
    PMDS_PER_TABLE,
    SECTION_HAS_MEM_MAP,
    SECTION_IS_EARLY,
    SECTION_IS_ONLINE,
    SECTION_MARKED_PRESENT,
    VMEMMAP_NOT_OURS,
    section_mark_present,
    subsection_mask,
    vmemmap_chunks,
)
from kmm.watermarks import setup_zone_pageset

if TYPE_CHECKING:
    from kmm.machine import Machine

_OFFLINE_FLAGS = SECTION_MARKED_PRESENT | SECTION_HAS_MEM_MAP
_EARLY_FLAGS = _OFFLINE_FLAGS | SECTION_IS_ONLINE | SECTION_IS_EARLY


@dataclass(slots=True)
class ZoneLayout:
    """Where a zone's boot pages lie, how many are never freed, and how many taken once free."""

    nid: int
    zone_idx: int
    ranges: list[tuple[int, int]] = field(default_factory=list)
    reserved: int = 0
    used: int = 0


def populate_zone(m: Machine, lay: ZoneLayout) -> None:
    """Give a zone its boot pages and free those that are not in use (memblock_free_all)."""
    zone = m.nodes[lay.nid].zone(lay.zone_idx)
    claim_ranges(m, zone, lay.ranges)
    taken = reserve(m, lay.ranges, lay.reserved)
    zone.managed_pages = zone.present_pages - lay.reserved
    m.totalram_pages += zone.managed_pages
    used = lay.used
    for start, end in lay.ranges:
        at = start
        for r_start, r_end in [*sorted(t for t in taken if start <= t[0] < end), (end, end)]:
            if r_start > at:
                # The lowest pages head the free list, so they are the first to be taken.
                kept = min(used, r_start - at)
                mark_used(m, at, at + kept, FILL_KERNEL)
                used -= kept
                zone.free_range_core(at + kept, r_start - at - kept, MIGRATE_MOVABLE, FPI_TO_TAIL)
            at = r_end
    setup_zone_pageset(m, zone)


def claim_ranges(m: Machine, zone: Zone, ranges: list[tuple[int, int]], early: bool = True) -> None:
    """Give pages to a zone before the story begins: spans, present counts, sections, pageblocks.

    :param ranges: (first pfn, pfn behind the last), ascending; early: whether boot found them.
    """
    pgdat = m.nodes[zone.nid]
    for start, end in ranges:
        zone.grow_span(start, end - start)
        pgdat.grow_span(start, end - start)
        zone.present_pages += end - start
        zone.present_early_pages += (end - start) if early else 0
        pgdat.node_present_pages += end - start
        first = start // PAGEBLOCK_NR_PAGES
        last = -(-end // PAGEBLOCK_NR_PAGES)
        m.memmap_engine.memmap_init_range(
            first * PAGEBLOCK_NR_PAGES,
            (last - first) * PAGEBLOCK_NR_PAGES,
            zone.index,
            MIGRATE_MOVABLE,
            FILL_NONE,
        )
        _early_sections(m, start, end, zone.nid, early)
    if early:
        zone.early_ranges.extend(ranges)
    pgdat.nr_zones = max(pgdat.nr_zones, zone.zone_idx + 1)


def _early_sections(m: Machine, start: int, end: int, nid: int, early: bool) -> None:
    """Make the sections that a range of pages touches exist, online, as far as they do not yet.

    :param start: first pfn; end: pfn behind the last; early: whether boot found them.
    """
    first, last = start // PAGES_PER_SECTION, -(-end // PAGES_PER_SECTION)
    records = m.sections[first:last]
    # In arrays, as a large machine has half a million of them; only the ends can be partial.
    maps = np.full(last - first, ALL_SUBSECTIONS, dtype=np.uint64)
    if first < last:
        begin, stop = start - first * PAGES_PER_SECTION, end - (last - 1) * PAGES_PER_SECTION
        maps[0] &= np.uint64(subsection_mask(begin, PAGES_PER_SECTION - begin))
        maps[-1] &= np.uint64(subsection_mask(0, stop))
    records["subsection_map"] |= maps
    fresh = np.flatnonzero(records["flags"] == 0)
    records["nid"][fresh] = nid
    for run in np.split(fresh, np.flatnonzero(np.diff(fresh) != 1) + 1):
        if run.size:
            # Whole sections get a memmap, also for subsections that are not there.
            _early_memmap(m, first + int(run[0]), first + int(run[-1]) + 1)
    records["flags"] = _EARLY_FLAGS if early else _EARLY_FLAGS & ~SECTION_IS_EARLY


def _early_memmap(m: Machine, first: int, last: int) -> None:
    """Back the memmap of sections (first to the one before last) with pages taken at boot."""
    section_mark_present(m, last - 1)
    pfn, nr = first * PAGES_PER_SECTION, (last - first) * PAGES_PER_SECTION
    chunks = vmemmap_chunks(m, pfn, nr)
    users = m.vmemmap_users[chunks.start : chunks.stop]
    new = chunks.start + np.flatnonzero(users == 0)
    m.vmemmap_pfn[new] = VMEMMAP_NOT_OURS
    tables, counts = np.unique(new // PMDS_PER_TABLE, return_counts=True)
    for table, count in zip(tables.tolist(), counts.tolist(), strict=True):
        m.vmemmap_tables.setdefault(table, [-1, 0])[1] += count
    # As vmemmap_users_of counts for each of them.
    size = m.config.struct_page_size * PAGES_PER_SUBSECTION
    numbers = np.arange(chunks.start, chunks.stop, dtype=np.int64)
    begin = np.maximum(pfn // PAGES_PER_SUBSECTION, numbers * PMD_SIZE // size)
    end = np.minimum((pfn + nr) // PAGES_PER_SUBSECTION, -(-(numbers + 1) * PMD_SIZE // size))
    users += (end - begin).astype(users.dtype)


def offline_block(m: Machine, block_id: int, nid: int, early: bool = False) -> None:
    """Make the sections of a block that is offline when the machine's story begins.

    :param early: whether boot found the block's memory.
    """
    start = block_id * m.block_pages
    _early_sections(m, start, start + m.block_pages, nid, early)
    first, last = start // PAGES_PER_SECTION, (start + m.block_pages) // PAGES_PER_SECTION
    m.sections["flags"][first:last] = _OFFLINE_FLAGS | (SECTION_IS_EARLY if early else 0)


def reserve(m: Machine, ranges: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Mark pages that were never freed: below 1 MiB, the kernel image, then from the top down.

    :param count: pages to reserve.
    :return: the ranges that were taken, whole pageblocks but for the last and the lowest.
    """
    taken: list[tuple[int, int]] = []
    image = (KERNEL_START >> PAGE_SHIFT, KERNEL_END >> PAGE_SHIFT)
    for start, end in ranges:
        low = (start, min(end, 0x100))
        for s, e in (low, (max(start, image[0]), min(end, image[1]))):
            if e > s and e - s <= count:
                taken.append((s, e))
                count -= e - s
    for start, end in reversed(ranges):
        floor = max([e for s, e in taken if start <= s < end], default=start)
        s = max(floor, end - count)
        if s < end and count:
            taken.append((s, end))
            count -= end - s
    for s, e in taken:
        mark_used(m, s, e, FILL_RESERVED)
    return taken


def mark_used(m: Machine, start: int, end: int, fill: int) -> None:
    """Mark pages as used at boot: FILL_RESERVED, or FILL_KERNEL for what the kernel took.

    Whole pageblocks say so in their own record, the rest page by page.
    """
    first, last = -(-start // PAGEBLOCK_NR_PAGES), end // PAGEBLOCK_NR_PAGES
    single = [range(start, end)]
    if first < last:
        m.pageblocks["state"][first:last] |= fill
        single = [range(start, first * PAGEBLOCK_NR_PAGES), range(last * PAGEBLOCK_NR_PAGES, end)]
    flag = PG_RESERVED if fill == FILL_RESERVED else PG_SLAB
    for pfns in single:
        for pfn in pfns:
            m.memmap_engine.set_page_flags(pfn, flag)


def span_holes(m: Machine) -> None:
    """Let each boot zone span all that its addresses allow between its node's ends."""
    limits = ((0, MAX_DMA_PFN), (MAX_DMA_PFN, MAX_DMA32_PFN), (MAX_DMA32_PFN, 1 << 62))
    for pgdat in m.nodes.values():
        first, last = pgdat.node_start_pfn, pgdat.node_start_pfn + pgdat.node_spanned_pages
        for zone, (low, high) in zip(pgdat.zones, limits, strict=False):
            if zone.populated:
                zone.zone_start_pfn = max(first, low)
                zone.spanned_pages = min(last, high) - zone.zone_start_pfn


def finish_nodes(m: Machine) -> None:
    """Set node states and start the daemons, as they are after boot."""
    for nid, pgdat in m.nodes.items():
        if pgdat.populated or m.cpus_of_node(nid):
            m.set_node_online(nid)
            m.node_devices.add(nid)
        if pgdat.populated:
            m.n_memory.add(nid)
            m.kthreads |= {f"kswapd{nid}", f"kcompactd{nid}"}
        if any(z.populated for z in pgdat.zones[: ZONE_NORMAL + 1]):
            m.n_normal_memory.add(nid)
    m.top_cpuset_mems = set(m.n_memory)


def register_boot_blocks(m: Machine) -> None:
    """Create the block devices of the RAM at boot, online, with their zone if it is one."""
    by_block: dict[int, set[tuple[int, int]]] = {}
    for zone in m.all_zones():
        for start, end in zone.early_ranges:
            for block in range(start // m.block_pages, (end - 1) // m.block_pages + 1):
                by_block.setdefault(block, set()).add((zone.nid, zone.zone_idx))
    for block_id, zones in sorted(by_block.items()):
        nids = tuple(sorted({nid for nid, _ in zones}))
        only = next(iter(zones)) if len(zones) == 1 else None
        m.memory_blocks[block_id] = MemoryBlock(
            block_id,
            "online",
            nids[0],
            nodes=nids,
            zone=m.nodes[only[0]].zone(only[1]) if only else None,
        )
