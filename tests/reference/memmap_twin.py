"""Readable twins of the memmap's walks, page by page; used by tests only."""

from __future__ import annotations

from kmm import Machine
from kmm.mmzone import Zone

PAGEBLOCK = 512


def belongs(m: Machine, zone: Zone, pfn: int) -> bool:
    """Whether a page is online and in the zone."""
    return bool(m.section_flags(pfn) & 4) and m.page_zone(pfn) is zone


def first_page(m: Machine, zone: Zone, start: int, end: int) -> int:
    """Walk upward in steps of a pageblock to the zone's first page, -1 if there is none."""
    return next((p for p in range(start, end, PAGEBLOCK) if belongs(m, zone, p)), -1)


def last_page(m: Machine, zone: Zone, start: int, last: int) -> int:
    """Walk downward in steps of a pageblock from the last page, -1 if none is the zone's."""
    return next((p for p in range(last, start - 1, -PAGEBLOCK) if belongs(m, zone, p)), -1)


def page_flags(m: Machine, zones: list[Zone], start: int, count: int) -> list[int]:
    """Return kpageflags of hot-added memory: NOPAGE, free, self-hosted memmap, or in use."""
    free: set[int] = set()
    for zone in zones:
        for order in range(11):
            for mt in range(5):
                for head in zone.free_list(order, mt):
                    free.update(range(head, head + (1 << order)))
    out = []
    for pfn in range(start, start + count):
        block = m.memory_blocks.get(pfn // m.block_pages)
        if block is None or block.state != "online":
            out.append(1 << 20)
        elif pfn % m.block_pages < block.nr_vmemmap_pages:
            out.append(1 << 32 | 1 << 37)
        else:
            out.append(1 << 10 if pfn in free else 0)
    return out
