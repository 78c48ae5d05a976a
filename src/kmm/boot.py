"""From a configuration to a running machine: RAM, zones, reserved memory, block devices."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kmm.arch_x86_64 import probe_memory_block_size
from kmm.config import parse_cmdline
from kmm.dax_bus import SOFT_RESERVED, hmem_init
from kmm.errors import ConfigError, KernelError
from kmm.firmware import device_memory, ram_layout, soft_reserved
from kmm.hugetlb_init import hugetlb_init
from kmm.mm_init import (
    ZoneLayout,
    finish_nodes,
    populate_zone,
    register_boot_blocks,
    span_holes,
)
from kmm.notifiers import register_boot_notifiers
from kmm.params import (
    KERNEL_END,
    KERNEL_SECTIONS,
    MAX_DMA32_PFN,
    MAX_DMA_PFN,
    ONLINE_POLICIES,
    ONLINE_TYPES,
    PAGE_SHIFT,
    RESERVED_PAGES,
    THP_MIN_PAGES,
    ZONE_DMA,
    ZONE_DMA32,
    ZONE_NORMAL,
    GiB,
    MiB,
    TiB,
)
from kmm.resource import parse_iomem, walk_system_ram_range
from kmm.swapfile import swapon_at_boot
from kmm.sysfs_entry import kstrtobool, kstrtoull
from kmm.watermarks import init_per_zone_wmark_min, writeback_set_ratelimit
from kmm.zonelists import build_all_zonelists

if TYPE_CHECKING:
    from kmm.machine import Machine

# What the q35 board's ACPI tables take at the top of low memory, bytes.
ACPI_TABLES = 0x20000
# What the board keeps free of RAM below 1 TiB, as AMD's HyperTransport needs it.
HYPERTRANSPORT = 0xFD00000000
# Pages that a running kernel has taken on a node at least, as guests with small nodes show.
KERNEL_PAGES = 1786


def boot(m: Machine) -> None:
    """Boot a machine from its configuration."""
    low, high = ram_layout(m.config)
    m.iomem_resource = parse_iomem(iomem_text(m, low, high))
    for start, end, kind in e820(low, high):
        m.firmware_map_add(start, end, kind)
    special = [(start, end, m.pxm_to_node[pxm]) for start, end, pxm in soft_reserved(m.config)]
    for start, end, _ in special:
        m.firmware_map_add(start, end - 1, SOFT_RESERVED)
    m.numa_meminfo = numa_meminfo(m, low, high) + special
    apply_cmdline(m)
    end = 4 * GiB + high if high else low
    m.block_size = m.config.block_size or probe_memory_block_size(end, m.config.hypervisor)
    m.max_pfn = (4 * GiB + high if high else low - ACPI_TABLES) >> PAGE_SHIFT
    m.printk(f"x86/mm: Memory block size: {m.block_size // MiB}MB")
    for layout in zone_layouts(m):
        populate_zone(m, layout)
    span_holes(m)
    finish_nodes(m)
    m.vm.thp_available = m.totalram_pages >= THP_MIN_PAGES
    build_all_zonelists(m, None)
    init_per_zone_wmark_min(m)
    writeback_set_ratelimit(m)
    register_boot_blocks(m)
    register_boot_notifiers(m)
    hugetlb_init(m)
    swapon_at_boot(m)
    hmem_init(m, special)


def e820(low: int, high: int) -> list[tuple[int, int, str]]:
    """Return (start, last byte, kind) of the map that firmware hands over.

    :param low: bytes of RAM below 4 GiB; high: above.
    """
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
    if 4 * GiB + high <= HYPERTRANSPORT:
        out.append((HYPERTRANSPORT, TiB - 1, "Reserved"))
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
        rows += [(1, start, end, name) for name, start, end in KERNEL_SECTIONS]
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
    rows += [(0, start, end - 1, SOFT_RESERVED) for start, end, _ in soft_reserved(m.config)]
    base, length = device_memory(m.config)
    window = max(base + length, 4 * GiB)
    # A machine with more than a terabyte covers what QEMU else keeps for HyperTransport.
    if window + 32 * GiB <= HYPERTRANSPORT:
        rows.append((0, window, window + 32 * GiB - 1, "PCI Bus 0000:00"))
        rows.append((0, HYPERTRANSPORT, TiB - 1, "Reserved"))
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
                m.auto_movable_ratio = kstrtoull(value or "", 32)
        elif name == "memory_hotplug.auto_movable_numa_aware":
            m.auto_movable_numa_aware = _boolean(value, m.auto_movable_numa_aware)
        elif name == "movable_node":
            m.movable_node_enabled = True
        elif name == "acpi_no_memhotplug":
            m.acpi_memhotplug = False
        elif name == "transparent_hugepage" and value in ("always", "madvise", "never"):
            m.vm.thp_enabled = value


def _boolean(value: str | None, default: bool) -> bool:
    """Return a parameter's truth; alone it means yes, a bad word leaves the default."""
    try:
        return True if value is None else kstrtobool(value)
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
    _share_out_used(layouts)
    return layouts


def system_ram(m: Machine) -> list[tuple[int, int]]:
    """Return (pfn, pages) of every whole page of System RAM, in address order."""
    return walk_system_ram_range(m.iomem_resource, 0, 1 << 40)


def node_of_pfn(m: Machine, pfn: int) -> tuple[int, int]:
    """Return a boot page's node and the pfn where that node's range ends.

    :raises ConfigError: if the page is in no node's range.
    """
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
            lay.reserved = min(pages // 64, max(pages - 1024, 0))
    if big:
        first = max(
            (lay for lay in big if lay.zone_idx == ZONE_DMA32),
            default=big[0],
            key=lambda lay: lay.ranges[-1][1],
        )
        room = sum(e - s for s, e in first.ranges) - first.reserved
        first.reserved += min(RESERVED_PAGES, room // 2)


def _share_out_used(layouts: list[ZoneLayout]) -> None:
    # Slabs come from the highest zone of each node; they keep its first block from going offline.
    for lay in {lay.nid: lay for lay in layouts}.values():
        pages = sum(e - s for s, e in lay.ranges)
        lay.used = min(KERNEL_PAGES, max(0, pages - lay.reserved) // 4)
