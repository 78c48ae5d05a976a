"""Zones, nodes and memory groups (include/linux/mmzone.h, include/linux/memory_hotplug.h)."""

from __future__ import annotations

from dataclasses import dataclass, field

from kmm._buddy import BuddyZone
from kmm._memmap import MemMap
from kmm.params import MAX_NR_ZONES, ZONE_NAMES


class Zone(BuddyZone):
    """One zone of one node; the counters live in the engine."""

    def __init__(self, memmap: MemMap, index: int, zone_idx: int, nr_cpus: int, nid: int) -> None:
        self.nid = nid
        self.name = ZONE_NAMES[zone_idx]
        self.early_ranges: list[tuple[int, int]] = []
        self.vmstat: dict[str, int] = {}
        self.numa_stat_off = False

    @property
    def populated(self) -> bool:
        """Whether any page of the zone is present (populated_zone)."""
        return bool(self.present_pages)

    @property
    def zone_end_pfn(self) -> int:
        """The pfn behind the span."""
        return self.zone_start_pfn + self.spanned_pages

    def high_wmark_pages(self) -> int:
        """The high watermark with the boost, in pages."""
        return self.watermark_high + self.watermark_boost

    def low_wmark_pages(self) -> int:
        """The low watermark with the boost, in pages."""
        return self.watermark_low + self.watermark_boost

    def min_wmark_pages(self) -> int:
        """The min watermark with the boost, in pages."""
        return self.watermark_min + self.watermark_boost

    def grow_span(self, start_pfn: int, nr_pages: int) -> None:
        """Let the zone span a range too."""
        end = max(start_pfn + nr_pages, self.zone_end_pfn)
        if not self.spanned_pages or start_pfn < self.zone_start_pfn:
            self.zone_start_pfn = start_pfn
        self.spanned_pages = end - self.zone_start_pfn

    def intersects(self, start_pfn: int, nr_pages: int) -> bool:
        """Whether a range of pages touches the span, holes included (zone_intersects)."""
        if not self.spanned_pages:
            return False
        return start_pfn < self.zone_end_pfn and start_pfn + nr_pages > self.zone_start_pfn


@dataclass(slots=True, eq=False)
class PgData:
    """One possible node (pg_data_t)."""

    node_id: int
    zones: list[Zone]
    node_start_pfn: int = 0
    node_spanned_pages: int = 0
    node_present_pages: int = 0
    nr_zones: int = 0
    totalreserve_pages: int = 0
    zonelist: list[Zone] = field(default_factory=list)
    nofallback: list[Zone] = field(default_factory=list)
    fallback_order: list[int] = field(default_factory=list)
    #: What the order was made from: the nodes with memory then, and how often each came first.
    order_from: tuple[frozenset[int], dict[int, int]] = (frozenset(), {})
    vmstat: dict[str, int] = field(default_factory=dict)

    def zone(self, idx: int) -> Zone:
        """The zone with this index (0 DMA ... 4 Device)."""
        return self.zones[idx]

    def grow_span(self, start_pfn: int, nr_pages: int) -> None:
        """Let the node span a range too."""
        end = max(start_pfn + nr_pages, self.node_start_pfn + self.node_spanned_pages)
        if not self.node_spanned_pages or start_pfn < self.node_start_pfn:
            self.node_start_pfn = start_pfn
        self.node_spanned_pages = end - self.node_start_pfn

    @property
    def managed_pages(self) -> int:
        """Pages that the allocator of this node manages."""
        return sum(z.managed_pages for z in self.zones)

    @property
    def populated(self) -> bool:
        """Whether any zone has present pages."""
        return any(z.present_pages for z in self.zones)


@dataclass(slots=True, eq=False)
class MemoryGroup:
    """Blocks that one device added together (struct memory_group)."""

    mgid: int
    nid: int
    is_dynamic: bool
    max_pages: int = 0
    unit_pages: int = 0
    present_kernel_pages: int = 0
    present_movable_pages: int = 0
    blocks: set[int] = field(default_factory=set)


def zone_index(nid: int, zone_idx: int) -> int:
    """The zone's place in the engine's table."""
    return nid * MAX_NR_ZONES + zone_idx
