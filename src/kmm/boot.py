"""From a configuration to a running machine: RAM, zones, reserved memory, block devices."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmm.arch_x86_64 import probe_memory_block_size
from kmm.config import parse_cmdline
from kmm.errors import ConfigError, KernelError
from kmm.firmware import device_memory, ram_layout
from kmm.memory_block import MemoryBlock
from kmm.memory_hotplug import resize_pgdat_range, resize_zone_range
from kmm.mmzone import Zone
from kmm.notifiers import register_boot_notifiers
from kmm.params import (
    MAX_DMA32_PFN,
    MAX_DMA_PFN,
    MIGRATE_MOVABLE,
    ONLINE_POLICIES,
    ONLINE_TYPES,
    PAGE_SHIFT,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
    THP_MIN_PAGES,
    ZONE_DMA,
    ZONE_DMA32,
    ZONE_NORMAL,
    GiB,
    MiB,
)
from kmm.resource import parse_iomem
from kmm.sparse import PMDS_PER_TABLE, VMEMMAP_NOT_OURS, vmemmap_chunks
from kmm.sysfs_entry import kstrtobool, kstrtoull
from kmm.watermarks import init_per_zone_wmark_min, setup_zone_pageset, writeback_set_ratelimit
from kmm.zonelists import build_all_zonelists

if TYPE_CHECKING:
    from kmm.machine import Machine

ACPI_TABLES = 0x20000
KERNEL_START, KERNEL_END = 0x1000000, 0x4400000
# Pages that a 1 GiB guest of the reference kernel keeps besides its memmap (software I/O TLB,
# hash tables, image, initrd), as its boot messages show.
RESERVED_PAGES = 28505

_EARLY_FLAGS = 1 | 2 | 4 | 8  # present, has memmap, online, early


@dataclass(slots=True)
class ZoneLayout:
    """Where a zone's boot pages lie, and what of them is free; pfns and pages."""

    nid: int
    zone_idx: int
    ranges: list[tuple[int, int]] = field(default_factory=list)
    reserved: int = 0


def boot(m: Machine) -> None:
    """Boot a machine from its configuration."""
    low, high = ram_layout(m.config)
    m.iomem_resource = parse_iomem(iomem_text(m, low, high))
    for start, end, kind in _e820(low, high):
        m.firmware_map_add(start, end, kind)
    m.numa_meminfo = numa_meminfo(m, low, high)
    apply_cmdline(m)
    end = 4 * GiB + high if high else low
    m.block_size = m.config.block_size or probe_memory_block_size(end)
    m.max_pfn = (4 * GiB + high if high else low - ACPI_TABLES) >> PAGE_SHIFT
    m.printk(f"x86/mm: Memory block size: {m.block_size // MiB}MB")
    for layout in zone_layouts(m):
        _populate(m, layout)
    _span_holes(m)
    finish_nodes(m)
    m.vm.thp_available = m.totalram_pages >= THP_MIN_PAGES
    build_all_zonelists(m, None)
    init_per_zone_wmark_min(m)
    writeback_set_ratelimit(m)
    register_boot_blocks(m)
    register_boot_notifiers(m)


def _e820(low: int, high: int) -> list[tuple[int, int, str]]:
    out = [
        (0, 0x9FBFF, "System RAM"),
        (0x9FC00, 0x9FFFF, "Reserved"),
        (0xF0000, 0xFFFFF, "Reserved"),
        (0x100000, low - ACPI_TABLES - 1, "System RAM"),
        (low - ACPI_TABLES, low - 1, "Reserved"),
        (0xB0000000, 0xBFFFFFFF, "Reserved"),
        (0xFED1C000, 0xFED1FFFF, "Reserved"),
        (0xFFFC0000, 0xFFFFFFFF, "Reserved"),
    ]
    if high:
        out.append((4 * GiB, 4 * GiB + high - 1, "System RAM"))
    out.append((0xFD00000000, 0xFFFFFFFFFF, "Reserved"))
    return out


def iomem_text(m: Machine, low: int, high: int) -> str:
    """Return /proc/iomem at boot.

    :param low: bytes of RAM below 4 GiB; high: above.
    """
    rows = [
        (0, 0, 0xFFF, "Reserved"),
        (0, 0x1000, 0x9FBFF, "System RAM"),
        (0, 0x9FC00, 0x9FFFF, "Reserved"),
        (0, 0xA0000, 0xBFFFF, "PCI Bus 0000:00"),
        (0, 0xC0000, 0xC05FF, "Video ROM"),
        (0, 0xF0000, 0xFFFFF, "Reserved"),
        (1, 0xF0000, 0xFFFFF, "System ROM"),
        (0, 0x100000, low - ACPI_TABLES - 1, "System RAM"),
    ]
    if low > KERNEL_END:
        rows += [
            (1, 0x1000000, 0x1E01D31, "Kernel code"),
            (1, 0x2000000, 0x28EAFFF, "Kernel rodata"),
            (1, 0x2A00000, 0x2C4897F, "Kernel data"),
            (1, 0x3310000, 0x43FFFFF, "Kernel bss"),
        ]
    rows += [
        (0, low - ACPI_TABLES, low - 1, "Reserved"),
        (0, low, 0xAFFFFFFF, "PCI Bus 0000:00"),
        (0, 0xB0000000, 0xBFFFFFFF, "PCI MMCONFIG 0000 [bus 00-ff]"),
        (1, 0xB0000000, 0xBFFFFFFF, "Reserved"),
        (2, 0xB0000000, 0xBFFFFFFF, "pnp 00:05"),
        (0, 0xC0000000, 0xFEBFFFFF, "PCI Bus 0000:00"),
        (1, 0xFEBFF000, 0xFEBFFFFF, "0000:00:1f.2"),
        (0, 0xFEC00000, 0xFEC003FF, "IOAPIC 0"),
        (0, 0xFED00000, 0xFED003FF, "HPET 0"),
        (1, 0xFED00000, 0xFED003FF, "PNP0103:00"),
        (0, 0xFED1C000, 0xFED1FFFF, "Reserved"),
        (0, 0xFEE00000, 0xFEE00FFF, "Local APIC"),
        (0, 0xFFFC0000, 0xFFFFFFFF, "Reserved"),
    ]
    if high:
        rows.append((0, 4 * GiB, 4 * GiB + high - 1, "System RAM"))
    base, length = device_memory(m.config)
    window = max(base + length, 4 * GiB)
    # A machine with more than a terabyte covers what QEMU else keeps for HyperTransport.
    if window + 32 * GiB <= 0xFD00000000:
        rows.append((0, window, window + 32 * GiB - 1, "PCI Bus 0000:00"))
        rows.append((0, 0xFD00000000, 0xFFFFFFFFFF, "Reserved"))
    return "".join(f"{'  ' * d}{s:08x}-{e:08x} : {name}\n" for d, s, e, name in rows)


def numa_meminfo(m: Machine, low: int, high: int) -> list[tuple[int, int, int]]:
    """Return (start, end, node) of the RAM at boot, bytes, in address order."""
    pieces = [(0, low)] + ([(4 * GiB, 4 * GiB + high)] if high else [])
    out = []
    for pxm, node in enumerate(m.config.nodes):
        left = node.memory
        while left:
            start, end = pieces[0]
            take = min(left, end - start)
            out.append((start, start + take, m.pxm_to_node[pxm]))
            left -= take
            pieces[0] = (start + take, end)
            if start + take == end:
                pieces.pop(0)
    return sorted(out)


def apply_cmdline(m: Machine) -> None:
    """Honour the kernel parameters that matter here; unknown ones and bad words are ignored."""
    for name, value in m.config.cmdline_items or parse_cmdline(m.config.cmdline):
        if name == "memhp_default_state" and value in ONLINE_TYPES:
            m.mhp_default_online_type = ONLINE_TYPES.index(value)
        elif name == "memory_hotplug.memmap_on_memory":
            m.memmap_on_memory = _boolean(value, m.memmap_on_memory)
        elif name == "memory_hotplug.online_policy" and value in ONLINE_POLICIES:
            m.online_policy = value
        elif name == "memory_hotplug.auto_movable_ratio":
            with suppress(KernelError):
                m.auto_movable_ratio = kstrtoull(value, 32)
        elif name == "memory_hotplug.auto_movable_numa_aware":
            m.auto_movable_numa_aware = _boolean(value, m.auto_movable_numa_aware)
        elif name == "movable_node":
            m.movable_node_enabled = True
        elif name == "acpi_no_memhotplug":
            m.acpi_memhotplug = False
        elif name == "transparent_hugepage" and value in ("always", "madvise", "never"):
            m.vm.thp_enabled = value


def _boolean(value: str, default: bool) -> bool:
    """Return a parameter's truth; alone it means yes, a bad word leaves the default."""
    try:
        return kstrtobool(value) if value else True
    except KernelError:
        return default


def zone_of_pfn(pfn: int) -> tuple[int, int]:
    """Return a boot page's zone index and the pfn where that zone ends."""
    if pfn < MAX_DMA_PFN:
        return ZONE_DMA, MAX_DMA_PFN
    if pfn < MAX_DMA32_PFN:
        return ZONE_DMA32, MAX_DMA32_PFN
    return ZONE_NORMAL, 1 << 62


def zone_layouts(m: Machine) -> list[ZoneLayout]:
    """Split the RAM at boot into the zones of its nodes."""
    found: dict[tuple[int, int], ZoneLayout] = {}
    for pfn, count in system_ram(m):
        at, end = pfn, pfn + count
        while at < end:
            nid, node_end = node_of_pfn(m, at)
            idx, zone_end = zone_of_pfn(at)
            stop = min(end, node_end, zone_end)
            found.setdefault((nid, idx), ZoneLayout(nid, idx)).ranges.append((at, stop))
            at = stop
    layouts = [found[key] for key in sorted(found)]
    _share_out_reserved(layouts)
    return layouts


def system_ram(m: Machine) -> list[tuple[int, int]]:
    """Return (pfn, pages) of every whole page of System RAM, in address order."""
    from kmm.resource import walk_system_ram_range

    return walk_system_ram_range(m.iomem_resource, 0, 1 << 40)


def node_of_pfn(m: Machine, pfn: int) -> tuple[int, int]:
    """Return a boot page's node and the pfn where that node's range ends."""
    for start, end, nid in m.numa_meminfo:
        if start >> PAGE_SHIFT <= pfn < end >> PAGE_SHIFT:
            return nid, end >> PAGE_SHIFT
    raise ConfigError(f"machine: page {pfn:#x} is System RAM but in no node")


def _share_out_reserved(layouts: list[ZoneLayout]) -> None:
    # Each node keeps its memmap; the rest lies where the boot allocator works, at the top of
    # low memory.
    big = [lay for lay in layouts if lay.zone_idx != ZONE_DMA]
    for lay in layouts:
        pages = sum(e - s for s, e in lay.ranges)
        if lay.zone_idx == ZONE_DMA:
            lay.reserved = sum(e - s for s, e in lay.ranges if e <= 0x100)
        else:
            lay.reserved = min(pages // 64, pages - 1024)
    if big:
        first = max(
            (lay for lay in big if lay.zone_idx == ZONE_DMA32),
            default=big[0],
            key=lambda lay: lay.ranges[-1][1],
        )
        room = sum(e - s for s, e in first.ranges) - first.reserved
        first.reserved += min(RESERVED_PAGES, room // 2)


def _populate(m: Machine, lay: ZoneLayout) -> None:
    zone = m.nodes[lay.nid].zone(lay.zone_idx)
    claim_ranges(m, zone, lay.ranges)
    taken = reserve(m, lay.ranges, lay.reserved)
    zone.managed_pages = zone.present_pages - lay.reserved
    m.totalram_pages += zone.managed_pages
    for start, end in lay.ranges:
        at = start
        for r_start, r_end in [*sorted(t for t in taken if start <= t[0] < end), (end, end)]:
            if r_start > at:
                zone.free_range_core(at, r_start - at, MIGRATE_MOVABLE, 2)
            at = r_end
    setup_zone_pageset(m, zone)


def claim_ranges(m: Machine, zone: Zone, ranges: list[tuple[int, int]], early: bool = True) -> None:
    """Give boot pages to a zone: spans, present counts, sections, pageblocks.

    :param ranges: (first pfn, pfn behind the last), ascending.
    """
    pgdat = m.nodes[zone.nid]
    for start, end in ranges:
        resize_zone_range(m, zone, start, end - start)
        resize_pgdat_range(m, pgdat, start, end - start)
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
            0,
        )
        for section in range(start // PAGES_PER_SECTION, -(-end // PAGES_PER_SECTION)):
            _early_section(m, section, zone.nid, early)
    zone.early_ranges.extend(ranges)
    pgdat.nr_zones = max(pgdat.nr_zones, zone.zone_idx + 1)


def _early_section(m: Machine, section: int, nid: int, early: bool) -> None:
    record = m.sections[section]
    if not int(record["flags"]):
        record["subsection_map"] = (1 << 64) - 1
        record["nid"] = nid
        for chunk in vmemmap_chunks(m, section * PAGES_PER_SECTION, PAGES_PER_SECTION):
            if not m.vmemmap_users[chunk]:
                m.vmemmap_pfn[chunk] = VMEMMAP_NOT_OURS
                m.vmemmap_tables.setdefault(chunk // PMDS_PER_TABLE, [-1, 0])[1] += 1
            m.vmemmap_users[chunk] += 1
    record["flags"] = _EARLY_FLAGS if early else _EARLY_FLAGS & ~8


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
        mark_used(m, s, e, 1)
    return taken


def mark_used(m: Machine, start: int, end: int, fill: int) -> None:
    """Mark pages as used at boot: 1 reserved, 3 handed out by the kernel.

    Whole pageblocks say so in their own record, the rest page by page.
    """
    pfn = start
    while pfn < end:
        if pfn % PAGEBLOCK_NR_PAGES == 0 and pfn + PAGEBLOCK_NR_PAGES <= end:
            m.pageblocks["state"][pfn // PAGEBLOCK_NR_PAGES] |= fill
            pfn += PAGEBLOCK_NR_PAGES
        else:
            # 1 << 13 is PG_reserved, 1 << 14 PG_slab of the page record.
            m.memmap_engine.set_page_state(pfn, 1 << 13 if fill == 1 else 1 << 14, 1)
            pfn += 1


def _span_holes(m: Machine) -> None:
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
            m.n_online.add(nid)
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
