"""The whole story: adding, onlining, offlining and removing memory (mm/memory_hotplug.c).

Read from top to bottom, the functions stand in the order in which the kernel calls them.
Every step that can fail raises a KernelError after undoing what was done before it.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING

from kmm import _migrate, _page_ref
from kmm import resource as res_
from kmm.arguments import (
    check_addressable,
    check_bytes,
    check_can_online,
    check_group,
    check_integer,
    check_is_online,
    check_kind,
    check_nid,
    check_pages_unused,
    check_pfns,
    check_zone,
)
from kmm.clock import SECOND
from kmm.errors import Busy, KernelError, bug, check_number, check_text, failing_with, kernel_error
from kmm.hugetlb_move import dissolve_free_huge_pages, used_huge_page_across
from kmm.memory_block import (
    MEM_CANCEL_OFFLINE,
    MEM_CANCEL_ONLINE,
    MEM_GOING_OFFLINE,
    MEM_GOING_ONLINE,
    MEM_OFFLINE,
    MEM_ONLINE,
    MMOP_OFFLINE,
    MMOP_ONLINE_KERNEL,
    MMOP_ONLINE_MOVABLE,
    MemoryBlock,
    MemoryNotify,
    block_range,
    create_memory_block_devices,
    device_offline,
    device_online,
    memory_notify,
    memory_notify_ignored,
    remove_memory_block_devices,
    walk_memory_blocks,
)
from kmm.memory_failure import clear_hwpoisoned_pages, lose_hwpoison_marks
from kmm.migrate import MigrationResult
from kmm.migrate_range import do_migrate_range
from kmm.mmzone import MemoryGroup, PgData, Zone
from kmm.node import (
    __register_one_node,
    kcompactd_run,
    kcompactd_stop,
    kswapd_run,
    kswapd_stop,
    node_set_online,
    register_memory_blocks_under_node,
    unregister_one_node,
)
from kmm.page_alloc import FPI_TO_TAIL, allocator_undo, zone_pcp_disable, zone_pcp_enable
from kmm.page_isolation import (
    start_isolate_page_range,
    test_pages_isolated,
    undo_isolate_page_range,
)
from kmm.params import (
    FILL_NONE,
    FILL_VMEMMAP,
    MIGRATE_ISOLATE,
    MIGRATE_UNMOVABLE,
    NR_PAGES_MAX,
    PAGE_SHIFT,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
    PAGES_PER_SUBSECTION,
    PHYSMEM_END,
    PMD_SIZE,
    ZONE_DEVICE,
    ZONE_MOVABLE,
    ZONE_NORMAL,
)
from kmm.sparse import (
    SECTION_IS_EARLY,
    SECTION_IS_ONLINE,
    VmemAltmap,
    offline_mem_sections,
    online_mem_sections,
    sparse_add_section,
    sparse_add_sections,
    sparse_remove_section,
    sparse_remove_sections,
)
from kmm.trace import fallible, note, traced
from kmm.watermarks import (
    init_per_zone_wmark_min,
    setup_zone_pageset,
    writeback_set_ratelimit,
    zone_pcp_reset,
)
from kmm.zonelists import build_all_zonelists

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.resource import Resource

#: After so many rounds what still moves gets nowhere.
MAX_ROUNDS = 1000
MHP_NONE, MHP_MERGE_RESOURCE, MHP_MEMMAP_ON_MEMORY, MHP_NID_IS_MGID = 0, 1, 2, 4
_U64 = (1 << 64) - 1

# -- adding -----------------------------------------------------------------------------


def mhp_range_allowed(m: Machine, start: int, size: int) -> None:
    """Check that a range of bytes lies where the kernel can map memory.

    :raises ArgumentTooBig: with the kernel's log line; so too for a size of 0 or less, which
        the kernel takes for one that wraps around.
    """
    start, size = check_integer("start", start), check_integer("size", size)
    end = start + size
    if 0 <= start < end <= PHYSMEM_END + 1:
        return
    m.printk(
        f"Hotplug memory [{start & _U64:#x}-{end & _U64:#x}] exceeds maximum addressable "
        f"range [0x0-{PHYSMEM_END:#x}]"
    )
    if size <= 0:
        raise kernel_error(-7, f"size: {size}; allowed: whole memory blocks, at least one")
    raise kernel_error(-7, f"range {start:#x}+{size:#x}; allowed: from 0x0 to {PHYSMEM_END:#x}")


@fallible
def register_memory_resource(m: Machine, start: int, size: int, name: str) -> Resource:
    """Enter a range of bytes into the resource tree.

    :raises InvalidArgument: for what is neither numbers nor a name; ArgumentTooBig: beyond the
        mappable range; AlreadyExists: whatever else is wrong.
    """
    check_text("name", name)
    start, size = check_integer("start", start), check_integer("size", size)
    flags = res_.IORESOURCE_SYSTEM_RAM | res_.IORESOURCE_BUSY
    if name != "System RAM":
        flags |= res_.IORESOURCE_SYSRAM_DRIVER_MANAGED
    mhp_range_allowed(m, start, size)
    return res_.__request_region(m.iomem_resource, start, size, name, flags, 0)


@traced
def release_memory_resource(m: Machine, res: Resource) -> None:
    """Take back what register_memory_resource entered, after a failed add."""
    res_.release_resource(res)


def is_whole_blocks(m: Machine, start: int, size: int) -> bool:
    """Whether a range of bytes consists of whole memory blocks, at least one."""
    return size > 0 and start % m.block_size == 0 and size % m.block_size == 0


@fallible
def check_hotplug_memory_range(m: Machine, start: int, size: int) -> None:
    """Check that a range of bytes consists of whole memory blocks.

    :raises InvalidArgument: with the kernel's log line.
    """
    start, size = check_bytes(start, size)
    if not is_whole_blocks(m, start, size):
        m.printk(
            f"Block size [{m.block_size:#x}] unaligned hotplug range: start {start:#x}, "
            f"size {size:#x}"
        )
        raise kernel_error(-22, f"{start:#x}+{size:#x} is not whole blocks of {m.block_size:#x}")


@traced
def free_area_init_core_hotplug(m: Machine, pgdat: PgData) -> None:
    """Make an offline node's zones empty again."""
    for zone in pgdat.zones:
        zone.managed_pages = 0
        zone.pageset_reset()
    pgdat.nr_zones = 0
    pgdat.node_start_pfn = 0
    pgdat.vmstat.clear()


@fallible
def hotadd_init_pgdat(m: Machine, nid: int) -> PgData:
    """Prepare the pgdat of a node that gets its first memory; builds its own zonelists.

    :raises InvalidArgument: for a node that is not possible; else only what a test orders, where
        the kernel's could lack memory for statistics.
    """
    pgdat = m.nodes[check_nid(m, nid)]
    free_area_init_core_hotplug(m, pgdat)
    build_all_zonelists(m, pgdat)
    for zone in pgdat.zones:
        zone.managed_pages = 0
        zone.present_pages = 0
    pgdat.node_present_pages = 0
    return pgdat


@fallible
def __try_online_node(m: Machine, nid: int) -> bool:
    """Prepare a node unless it is online; whether that was needed.

    :raises InvalidArgument: for a node that is not possible; KernelError: what hotadd_init_pgdat
        failed with.
    """
    nid = check_nid(m, nid)
    if nid in m.n_online:
        return False
    try:
        hotadd_init_pgdat(m, nid)
    except KernelError:
        m.printk(f"Cannot online node {nid} due to NULL pgdat")
        raise
    return True


def mhp_supports_memmap_on_memory(m: Machine, size: int) -> bool:
    """Whether a range of this many bytes may hold its own memmap: one block, whole PMDs."""
    vmemmap_size = (size >> PAGE_SHIFT) * m.config.struct_page_size
    return (
        m.memmap_on_memory
        and (size == m.block_size or not m.rules.memmap_on_memory_is_one_block)
        and vmemmap_size % PMD_SIZE == 0
        and (size - vmemmap_size) % (PAGEBLOCK_NR_PAGES << PAGE_SHIFT) == 0
    )


def _check_pfn_span(pfn: int, nr_pages: int, what: str) -> None:
    if pfn % PAGES_PER_SUBSECTION or nr_pages % PAGES_PER_SUBSECTION:
        raise kernel_error(-22, f"Misaligned {what} start: {pfn:#x} end: {pfn + nr_pages - 1:#x}")


def _section_chunk(pfn: int, end: int) -> int:
    """Return how many pages from pfn on lie in one section and before end."""
    return min(end, (pfn // PAGES_PER_SECTION + 1) * PAGES_PER_SECTION) - pfn


@fallible
def __add_pages(
    m: Machine, nid: int, pfn: int, nr_pages: int, altmap: VmemAltmap | None = None
) -> None:
    """Add sections for a range of pages.

    The kernel leaves the sections before a failing one behind; kmm takes them back.

    :param nid: node; pfn: first pfn; nr_pages: pages, both multiples of 512.
    :raises InvalidArgument: for a misaligned range or an impossible node; OutOfRange: beyond the
        addressable memory; AlreadyExists: if a section exists; OutOfMemory: if there is no page
        for a memmap.
    """
    nid = check_number("nid", nid, 0, len(m.nodes) - 1)
    pfn, nr_pages = check_pfns(pfn, nr_pages)
    if altmap is not None:
        check_kind("altmap", altmap, VmemAltmap)
    if pfn + nr_pages > NR_PAGES_MAX:
        raise kernel_error(-34, f"pages up to {pfn + nr_pages:#x} are beyond {NR_PAGES_MAX:#x}")
    _check_pfn_span(pfn, nr_pages, "add")
    if altmap is not None and (altmap.base_pfn != pfn or altmap.free > nr_pages):
        raise kernel_error(-22, "memory add fail, invalid altmap")
    at, end = pfn, pfn + nr_pages
    with allocator_undo(m):
        try:
            while at < end:
                count = sparse_add_sections(m, nid, at, end - at, altmap)
                if not count:
                    count = _section_chunk(at, end)
                    sparse_add_section(m, nid, at, count, altmap)
                at += count
        except KernelError:
            while pfn < at:
                count = _section_chunk(pfn, at)
                sparse_remove_section(m, pfn, count)
                pfn += count
            raise


@fallible
def add_memory_resource(m: Machine, nid: int, res: Resource, mhp_flags: int = MHP_NONE) -> None:
    """Add the memory of a resource that is in the tree already.

    :param nid: node, or memory group id with MHP_NID_IS_MGID.
    :raises KernelError: the kernel's errno; everything is as before then.
    """
    check_kind("res", res, res_.Resource)
    start, size = res.start, res.end - res.start + 1
    nid = check_integer("nid", nid)
    mhp_flags = check_number("mhp_flags", mhp_flags, 0, (1 << 32) - 1)
    check_hotplug_memory_range(m, start, size)
    group: MemoryGroup | None = None
    if mhp_flags & MHP_NID_IS_MGID:
        group = m.memory_groups.get(nid)
        if group is None:
            raise kernel_error(-22, f"no memory group {nid}")
        nid = group.nid
    if nid not in m.nodes:
        m.printk(f"node {nid} was absent from the node_possible_map")
        raise kernel_error(-22, f"node {nid} is not possible")
    new_node = __try_online_node(m, nid)
    altmap: VmemAltmap | None = None
    if mhp_flags & MHP_MEMMAP_ON_MEMORY:
        if not mhp_supports_memmap_on_memory(m, size):
            raise kernel_error(-22, f"memmap on memory needs one block, not {size:#x} bytes")
        pages = size >> PAGE_SHIFT
        altmap = VmemAltmap(start >> PAGE_SHIFT, pages * m.config.struct_page_size >> PAGE_SHIFT)
    with allocator_undo(m):
        m.ops.arch_add_memory(m, nid, start, size, altmap)
        try:
            create_memory_block_devices(m, start, size, altmap.alloc if altmap else 0, group)
        except KernelError:
            m.ops.arch_remove_memory(m, start, size)
            raise
    if new_node:
        node_set_online(m, nid)
        __register_one_node(m, nid)
    register_memory_blocks_under_node(m, nid, start, size)
    if res.name == "System RAM":
        m.firmware_map_add(start, start + size - 1, "System RAM")
    if mhp_flags & MHP_MERGE_RESOURCE:
        res_.merge_system_ram_resource(m.iomem_resource, res)
    if m.mhp_default_online_type:
        _auto_online(m, start, size)


def _auto_online(m: Machine, start: int, size: int) -> None:
    def online(block: MemoryBlock) -> None:
        block.online_type = m.mhp_default_online_type
        device_online(m, block)

    try:
        walk_memory_blocks(m, start, size, online)
    except KernelError as e:
        # The memory stays added; nobody hears of the failure in the kernel either.
        m.note_swallowed("auto-online", e)


@fallible
def __add_memory(m: Machine, nid: int, start: int, size: int, mhp_flags: int = MHP_NONE) -> None:
    """Add a range of bytes as System RAM; the caller holds the hot-plug lock.

    :param nid: node, or memory group id with MHP_NID_IS_MGID.
    :raises KernelError: E2BIG, EEXIST, EINVAL or ENOMEM; everything is as before then.
    """
    _add_named_memory(m, nid, start, size, "System RAM", mhp_flags)


def _add_named_memory(
    m: Machine, nid: int, start: int, size: int, name: str, mhp_flags: int
) -> None:
    # Before the resource is there, so that nothing has to be taken back.
    nid = check_integer("nid", nid)
    mhp_flags = check_number("mhp_flags", mhp_flags, 0, (1 << 32) - 1)
    res = register_memory_resource(m, start, size, name)
    try:
        add_memory_resource(m, nid, res, mhp_flags)
    except KernelError:
        release_memory_resource(m, res)
        raise


@fallible
def add_memory(m: Machine, nid: int, start: int, size: int, mhp_flags: int = MHP_NONE) -> None:
    """Add a range of bytes as System RAM (see __add_memory)."""
    __add_memory(m, nid, start, size, mhp_flags)


@fallible
def add_memory_driver_managed(
    m: Machine, nid: int, start: int, size: int, name: str, mhp_flags: int = MHP_NONE
) -> None:
    """Add memory that a driver manages and that firmware does not list.

    :param name: the resource's name, ``System RAM (driver)``.
    :raises InvalidArgument: for another name; otherwise as __add_memory.
    """
    check_text("name", name)
    if not name.startswith("System RAM (") or not name.endswith(")"):
        raise kernel_error(-22, f"name: {name!r}; allowed: 'System RAM (driver)'")
    _add_named_memory(m, nid, start, size, name, mhp_flags)


# -- which zone -------------------------------------------------------------------------


def default_kernel_zone_for_pfn(m: Machine, nid: int, start_pfn: int, nr_pages: int) -> Zone:
    """Return the first zone up to DMA32 whose span the range touches, else Normal."""
    for zone in m.nodes[nid].zones[:ZONE_NORMAL]:
        if zone.intersects(start_pfn, nr_pages):
            return zone
    return m.nodes[nid].zone(ZONE_NORMAL)


def default_zone_for_pfn(m: Machine, nid: int, start_pfn: int, nr_pages: int) -> Zone:
    """Return the zone that plain ``online`` takes under the contig-zones policy."""
    kernel_zone = default_kernel_zone_for_pfn(m, nid, start_pfn, nr_pages)
    movable_zone = m.nodes[nid].zone(ZONE_MOVABLE)
    in_kernel = kernel_zone.intersects(start_pfn, nr_pages)
    in_movable = movable_zone.intersects(start_pfn, nr_pages)
    if in_kernel != in_movable:
        return kernel_zone if in_kernel else movable_zone
    return movable_zone if m.movable_node_enabled else kernel_zone


def _auto_movable_can_online(
    m: Machine, nid: int | None, group: MemoryGroup | None, nr_pages: int
) -> bool:
    """Whether nr_pages more movable pages keep the ratio, on one node or (None) on all."""
    nodes = [m.nodes[nid]] if nid is not None else list(m.nodes.values())
    kernel_early = movable = 0
    for zone in (z for p in nodes for z in p.zones if z.populated):
        if zone.zone_idx == ZONE_MOVABLE:
            movable += zone.present_pages
        else:
            kernel_early += zone.present_early_pages
    ratio = m.auto_movable_ratio
    required = 0
    for other in m.memory_groups.values():
        if not other.is_dynamic or other is group or (nid is not None and other.nid != nid):
            continue
        # What this group needs beyond its own kernel memory is spoken for.
        needs = other.present_movable_pages * 100 // ratio
        required += max(0, needs - other.present_kernel_pages)
        movable -= other.present_movable_pages
    if kernel_early <= required:
        return False
    kernel_early -= required
    if group is not None and group.is_dynamic:
        kernel_early += group.present_kernel_pages
    return movable + nr_pages <= ratio * kernel_early // 100


def auto_movable_zone_for_pfn(
    m: Machine, nid: int, group: MemoryGroup | None, pfn: int, nr_pages: int
) -> Zone:
    """Return the zone that the auto-movable policy picks for a range."""
    online_pages_ = 0
    max_pages = nr_pages
    kernel = default_kernel_zone_for_pfn
    if not m.auto_movable_ratio:
        return kernel(m, nid, pfn, nr_pages)
    if group is not None and not group.is_dynamic:
        max_pages, online_pages_ = group.max_pages, group.present_movable_pages
        if group.present_kernel_pages:
            return kernel(m, nid, pfn, nr_pages)
    elif group is not None and group.unit_pages != nr_pages:
        max_pages = group.unit_pages
        unit = pfn // max_pages * max_pages
        for start in range(unit, unit + max_pages, PAGES_PER_SECTION):
            if not m.section_flags(start) & SECTION_IS_ONLINE:
                continue
            zone = m.page_zone(start)
            if zone is None or zone.zone_idx != ZONE_MOVABLE:
                return kernel(m, nid, pfn, nr_pages)
            online_pages_ += PAGES_PER_SECTION
    need = max_pages - online_pages_
    if _auto_movable_can_online(m, None, group, need) and (
        not m.auto_movable_numa_aware or _auto_movable_can_online(m, nid, group, need)
    ):
        return m.nodes[nid].zone(ZONE_MOVABLE)
    return kernel(m, nid, pfn, nr_pages)


@traced
def zone_for_pfn_range(
    m: Machine, online_type: int, nid: int, group: MemoryGroup | None, pfn: int, nr_pages: int
) -> Zone:
    """Return the zone that a range is onlined into.

    :param online_type: MMOP_ONLINE, MMOP_ONLINE_KERNEL or MMOP_ONLINE_MOVABLE; MMOP_OFFLINE
        (what a block has that is online) is taken as MMOP_ONLINE.
    :raises InvalidArgument: for another type, a node that is not possible, or a pfn or group that
        is none.
    """
    check_number("online_type", online_type, MMOP_OFFLINE, MMOP_ONLINE_MOVABLE)
    nid = check_nid(m, nid)
    pfn, nr_pages = check_pfns(pfn, nr_pages)
    check_group(m, group)
    if online_type == MMOP_ONLINE_KERNEL:
        return default_kernel_zone_for_pfn(m, nid, pfn, nr_pages)
    if online_type == MMOP_ONLINE_MOVABLE:
        return m.nodes[nid].zone(ZONE_MOVABLE)
    if m.online_policy == "auto-movable":
        return auto_movable_zone_for_pfn(m, nid, group, pfn, nr_pages)
    return default_zone_for_pfn(m, nid, pfn, nr_pages)


# -- onlining ---------------------------------------------------------------------------


@traced
def init_currently_empty_zone(m: Machine, zone: Zone, start_pfn: int) -> None:
    """Make a zone ready for its first pages."""
    pgdat = m.nodes[zone.nid]
    pgdat.nr_zones = max(pgdat.nr_zones, zone.zone_idx + 1)
    zone.zone_start_pfn = start_pfn
    zone.init_free_lists()


@traced
def resize_zone_range(m: Machine, zone: Zone, start_pfn: int, nr_pages: int) -> None:
    """Grow a zone's span over a range (grow_zone_span of old)."""
    zone.grow_span(start_pfn, nr_pages)


@traced
def resize_pgdat_range(m: Machine, pgdat: PgData, start_pfn: int, nr_pages: int) -> None:
    """Grow a node's span over a range (grow_pgdat_span of old)."""
    pgdat.grow_span(start_pfn, nr_pages)


@traced
def memmap_init_range(
    m: Machine, zone: Zone, start_pfn: int, nr_pages: int, mt: int, fill: int = FILL_NONE
) -> None:
    """Initialise the struct pages of a range for a zone."""
    m.memmap_engine.memmap_init_range(start_pfn, nr_pages, zone.index, mt, fill)
    lose_hwpoison_marks(m, start_pfn, nr_pages)


@traced
def move_pfn_range_to_zone(
    m: Machine, zone: Zone, start_pfn: int, nr_pages: int, mt: int, fill: int = FILL_NONE
) -> None:
    """Let a zone and its node span a range, and initialise its memmap.

    :param mt: migratetype of the pageblocks.
    """
    pgdat = m.nodes[zone.nid]
    if not zone.spanned_pages:
        init_currently_empty_zone(m, zone, start_pfn)
    resize_zone_range(m, zone, start_pfn, nr_pages)
    resize_pgdat_range(m, pgdat, start_pfn, nr_pages)
    memmap_init_range(m, zone, start_pfn, nr_pages, mt, fill)


@traced
def adjust_present_page_count(
    m: Machine, zone: Zone, start_pfn: int, group: MemoryGroup | None, nr_pages: int
) -> None:
    """Add nr_pages (which may be negative) to the present counts."""
    if m.section_flags(start_pfn) & SECTION_IS_EARLY:
        zone.present_early_pages += nr_pages
    zone.present_pages += nr_pages
    m.nodes[zone.nid].node_present_pages += nr_pages
    if group is not None:
        if zone.zone_idx == ZONE_MOVABLE:
            group.present_movable_pages += nr_pages
        else:
            group.present_kernel_pages += nr_pages


def generic_online_page(m: Machine, zone: Zone, start_pfn: int, nr_pages: int) -> None:
    """Free the pages of a range; the kernel calls it once for each of the blocks this makes."""
    zone.managed_pages += nr_pages
    m.totalram_pages += nr_pages
    chunks = zone.free_range_core(start_pfn, nr_pages, MIGRATE_ISOLATE, FPI_TO_TAIL)
    note(m, "generic_online_page", chunks)


@traced
def online_pages_range(m: Machine, zone: Zone, start_pfn: int, nr_pages: int) -> None:
    """Hand the range to the allocator in the largest aligned blocks, isolated still."""
    generic_online_page(m, zone, start_pfn, nr_pages)
    online_mem_sections(m, start_pfn, start_pfn + nr_pages)


@traced
def node_states_check_changes_online(
    m: Machine, nr_pages: int, zone: Zone, arg: MemoryNotify
) -> None:
    """Fill in which node states the onlining sets."""
    if zone.zone_idx <= ZONE_NORMAL and zone.nid not in m.n_normal_memory:
        arg.status_change_nid_normal = zone.nid
    if zone.nid not in m.n_memory:
        arg.status_change_nid = zone.nid


@fallible
def online_pages(
    m: Machine, pfn: int, nr_pages: int, zone: Zone, group: MemoryGroup | None = None
) -> None:
    """Bring added pages into a zone and into use; the block's state is the caller's.

    :param pfn: first pfn, a multiple of 512; nr_pages: pages; pfn + nr_pages ends a section.
    :raises InvalidArgument: for a misaligned range; KernelError: what a notifier refused with;
        ImpossibleState: for pages that do not exist or are online already.
    """
    pfn, nr_pages = check_pfns(pfn, nr_pages)
    check_zone(m, zone)
    check_group(m, group)
    if not nr_pages or pfn % PAGEBLOCK_NR_PAGES or (pfn + nr_pages) % PAGES_PER_SECTION:
        raise kernel_error(-22, f"online_pages: misaligned range {pfn:#x}+{nr_pages:#x}")
    check_can_online(m, "online_pages", pfn, nr_pages)
    move_pfn_range_to_zone(m, zone, pfn, nr_pages, MIGRATE_ISOLATE)
    arg = MemoryNotify(pfn, nr_pages)
    node_states_check_changes_online(m, nr_pages, zone, arg)
    try:
        memory_notify(m, MEM_GOING_ONLINE, arg)
    except KernelError:
        memory_notify_ignored(m, MEM_CANCEL_ONLINE, arg)
        remove_pfn_range_from_zone(m, zone, pfn, nr_pages)
        raise
    zone.nr_isolate_pageblock += nr_pages // PAGEBLOCK_NR_PAGES
    need_rebuild = not zone.populated
    if need_rebuild:
        setup_zone_pageset(m, zone)
    online_pages_range(m, zone, pfn, nr_pages)
    adjust_present_page_count(m, zone, pfn, group, nr_pages)
    if arg.status_change_nid_normal >= 0:
        m.n_normal_memory.add(zone.nid)
    if arg.status_change_nid >= 0:
        m.n_memory.add(zone.nid)
    if need_rebuild:
        build_all_zonelists(m, None)
    undo_isolate_page_range(m, zone, pfn, pfn + nr_pages)
    init_per_zone_wmark_min(m)
    kswapd_run(m, zone.nid)
    kcompactd_run(m, zone.nid)
    writeback_set_ratelimit(m)
    memory_notify_ignored(m, MEM_ONLINE, arg)


@fallible
def memory_block_online(m: Machine, block: MemoryBlock) -> None:
    """Online one block: choose the zone, its own memmap first, then the rest.

    :raises KernelError: what online_pages refused with; the block is as before then;
        ImpossibleState: if sections of it do not exist or are online already.
    """
    check_kind("block", block, MemoryBlock)
    start, nr = block_range(m, block)
    vmemmap = block.nr_vmemmap_pages
    zone = zone_for_pfn_range(m, block.online_type, block.nid, block.group, start, nr)
    if vmemmap:
        # Before its own memmap is online; the rest is checked by online_pages.
        check_can_online(m, "memory_block_online", start, nr)
        mhp_init_memmap_on_memory(m, start, vmemmap, zone)
    try:
        online_pages(m, start + vmemmap, nr - vmemmap, zone, block.group)
    except KernelError:
        if vmemmap:
            mhp_deinit_memmap_on_memory(m, start, vmemmap, zone)
        raise
    if vmemmap:
        adjust_present_page_count(m, zone, start, block.group, vmemmap)
    block.zone = zone


@traced
def mhp_init_memmap_on_memory(m: Machine, pfn: int, nr_pages: int, zone: Zone) -> None:
    """Put the pages that hold a block's own memmap into its zone, never to be handed out."""
    move_pfn_range_to_zone(m, zone, pfn, nr_pages, MIGRATE_UNMOVABLE, FILL_VMEMMAP)
    if nr_pages >= PAGES_PER_SECTION:
        online_mem_sections(m, pfn, pfn + nr_pages // PAGES_PER_SECTION * PAGES_PER_SECTION)


@traced
def mhp_deinit_memmap_on_memory(m: Machine, pfn: int, nr_pages: int, zone: Zone) -> None:
    """Undo mhp_init_memmap_on_memory."""
    if nr_pages >= PAGES_PER_SECTION:
        offline_mem_sections(m, pfn, pfn + nr_pages // PAGES_PER_SECTION * PAGES_PER_SECTION)
    remove_pfn_range_from_zone(m, zone, pfn, nr_pages)


# -- offlining --------------------------------------------------------------------------


@traced
def shrink_zone_span(m: Machine, zone: Zone, start_pfn: int, end_pfn: int) -> None:
    """Shrink a zone's span if a range at one of its ends has left; holes inside stay."""
    first, last = zone.zone_start_pfn, zone.zone_end_pfn
    search = m.memmap_engine.shrink_search
    if first == start_pfn:
        found = search(end_pfn, last, zone.index, True)
        zone.spanned_pages = last - found if found >= 0 else 0
        zone.zone_start_pfn = max(found, 0)
    elif last == end_pfn:
        found = search(first, start_pfn - 1, zone.index, False)
        if found >= 0:
            zone.spanned_pages = found - first + 1
        else:
            zone.zone_start_pfn = zone.spanned_pages = 0


@traced
def update_pgdat_span(m: Machine, pgdat: PgData) -> None:
    """Recompute a node's span from its zones."""
    spans = [(z.zone_start_pfn, z.zone_end_pfn) for z in pgdat.zones if z.spanned_pages]
    pgdat.node_start_pfn = min((s for s, _ in spans), default=0)
    pgdat.node_spanned_pages = max((e for _, e in spans), default=0) - pgdat.node_start_pfn


@traced
def remove_pfn_range_from_zone(m: Machine, zone: Zone, start_pfn: int, nr_pages: int) -> None:
    """Take an offline range out of its zone's and node's span."""
    if zone.zone_idx == ZONE_DEVICE:
        return
    shrink_zone_span(m, zone, start_pfn, start_pfn + nr_pages)
    update_pgdat_span(m, m.nodes[zone.nid])


@traced
def node_states_check_changes_offline(
    m: Machine, nr_pages: int, zone: Zone, arg: MemoryNotify
) -> None:
    """Fill in which node states the offlining clears."""
    zones = m.nodes[zone.nid].zones
    kernel = sum(z.present_pages for z in zones[: ZONE_NORMAL + 1])
    if zone.zone_idx <= ZONE_NORMAL and nr_pages >= kernel:
        arg.status_change_nid_normal = zone.nid
    if nr_pages >= kernel + zones[ZONE_MOVABLE].present_pages:
        arg.status_change_nid = zone.nid


@fallible
def walk_system_ram_range(m: Machine, start_pfn: int, nr_pages: int) -> int:
    """Return how many pages of a range are System RAM."""
    parts = res_.walk_system_ram_range(m.iomem_resource, start_pfn, nr_pages)
    return sum(count for _, count in parts)


@traced
def lru_cache_disable(m: Machine) -> None:
    """Let pages go to their LRU lists at once, as they do here anyway: nothing is left to drain."""


@traced
def __offline_isolated_pages(m: Machine, zone: Zone, start_pfn: int, end_pfn: int) -> int:
    """Take the free blocks of a range off the lists; the sections go offline.

    :return: pages taken.
    :raises ImpossibleState: if a page of the range is not free.
    """
    taken = zone.offline_isolated_pages(start_pfn, end_pfn)
    if taken < 0:
        bug("__offline_isolated_pages", f"a page of {start_pfn:#x}-{end_pfn:#x} is not free")
    offline_mem_sections(m, start_pfn, end_pfn)
    return int(taken)


def _isolate_and_empty(
    m: Machine, zone: Zone, start_pfn: int, end_pfn: int, arg: MemoryNotify
) -> None:
    """Isolate the range, ask the notifiers, and move what is used until all of it is free."""
    with failing_with("failure to isolate range"):
        start_isolate_page_range(m, zone, start_pfn, end_pfn)
    try:
        node_states_check_changes_offline(m, end_pfn - start_pfn, zone, arg)
        with failing_with("notifier failure"):
            memory_notify(m, MEM_GOING_OFFLINE, arg)
        _empty_range(m, start_pfn, end_pfn)
    except KernelError:
        undo_isolate_page_range(m, zone, start_pfn, end_pfn)
        memory_notify_ignored(m, MEM_CANCEL_OFFLINE, arg)
        raise


def _empty_range(m: Machine, start_pfn: int, end_pfn: int) -> None:
    """Move used pages out of an isolated range, again and again until it is empty.

    The kernel goes on for ever.  So does the machine, by its own clock, until a signal comes or
    the patience of whoever asked is at an end, which for the kernel is a signal too.

    :raises Busy: for a page that a driver holds; Interrupted: by a signal;
        KernelError: if a free huge page cannot be dissolved.
    """
    deadline = m.clock.now + m.offline_patience
    while True:
        _migrate_all_movable(m, start_pfn, end_pfn, deadline)
        with failing_with("failure to dissolve huge pages"):
            dissolve_free_huge_pages(m, start_pfn, end_pfn)
        try:
            test_pages_isolated(m, start_pfn, end_pfn)
        except Busy as e:
            _check_signal(m, deadline, e)
        else:
            return


def _migrate_all_movable(m: Machine, start_pfn: int, end_pfn: int, deadline: int) -> None:
    """Move pages until none is left that could be."""
    stuck: KernelError | None = None
    for rounds in itertools.count():
        _check_signal(m, deadline, stuck)
        pfn = scan_movable_pages(m, start_pfn, end_pfn)
        if pfn is None:
            return
        result = do_migrate_range(m, pfn, end_pfn)
        stuck = None
        # A pool's pages can change places within the block, as long as one waits.
        if not result.nr_succeeded or rounds > MAX_ROUNDS:
            left = int(result.left[0]) if len(result.left) else pfn
            stuck = kernel_error(-16, _why_left(m, result, left))
            stuck.pfn = left


def _why_left(m: Machine, result: MigrationResult, pfn: int) -> str:
    if not len(result.left):
        return f"pfn {pfn:#x} of {m.describe_page(pfn)} cannot be isolated"
    if result.code:
        return f"pfn {pfn:#x} of {m.describe_page(pfn)} has nowhere to go"
    return f"pfn {pfn:#x} of {m.describe_page(pfn)} is held by somebody"


def _check_signal(m: Machine, deadline: int, stuck: KernelError | None) -> None:
    """Stop when a signal is pending, or time is up for what does not get on."""
    if stuck is not None and not m.signal_pending:
        # Until something happens, one more try would be like the last.
        m.clock.wait_until(deadline)
    why = f"a signal came; {stuck.why}" if stuck else "a signal came"
    if m.signal_pending:
        m.signal_pending = False
    elif stuck is not None and m.clock.now >= deadline:
        why = f"{stuck.why}; given up after {m.offline_patience / SECOND:g} s"
    else:
        return
    error = kernel_error(-4, why)
    error.reason, error.pfn = "signal backoff", stuck.pfn if stuck else None
    raise error


@traced
def scan_movable_pages(m: Machine, start_pfn: int, end_pfn: int) -> int | None:
    """Find the first page of a range that can be moved; None if there is none.

    :raises Busy: if a driver holds an offline page (PageOffline) before that.
    """
    if used_huge_page_across(m, start_pfn) is not None:
        return start_pfn
    found, blocked = _migrate.scan_movable_pages(m.memmap_engine, start_pfn, end_pfn)
    if found == -16:
        m.dump_page(blocked, "unmovable page")
        error = kernel_error(-16, f"unmovable page: pfn {blocked:#x} is a driver's offline page")
        error.reason, error.pfn = "unmovable page", blocked
        raise error
    return found if found >= 0 else None


def _forget_offlined(
    m: Machine,
    zone: Zone,
    start_pfn: int,
    group: MemoryGroup | None,
    nr_pages: int,
    arg: MemoryNotify,
) -> None:
    """Account for pages that are gone, and let zones, lists and daemons follow."""
    zone.managed_pages -= nr_pages
    m.totalram_pages -= nr_pages
    adjust_present_page_count(m, zone, start_pfn, group, -nr_pages)
    init_per_zone_wmark_min(m)
    if not zone.populated:
        zone_pcp_reset(m, zone)
        build_all_zonelists(m, None)
    if arg.status_change_nid_normal >= 0:
        m.n_normal_memory.discard(zone.nid)
    if arg.status_change_nid >= 0:
        m.n_memory.discard(zone.nid)
        kcompactd_stop(m, zone.nid)
        kswapd_stop(m, zone.nid)
    writeback_set_ratelimit(m)
    memory_notify_ignored(m, MEM_OFFLINE, arg)
    remove_pfn_range_from_zone(m, zone, start_pfn, nr_pages)


@fallible
def offline_pages(
    m: Machine, start_pfn: int, nr_pages: int, zone: Zone, group: MemoryGroup | None = None
) -> None:
    """Take pages out of use and out of their zone.

    :param start_pfn: first pfn, a multiple of 512; nr_pages: pages, up to a section's end.
    :raises InvalidArgument: misaligned, holes in System RAM, or several zones;
        Busy: a page that can neither move nor go; KernelError: what a notifier refused with;
        ImpossibleState: for pages that are not online, whose memmap says nothing.
    """
    start_pfn, nr_pages = check_pfns(start_pfn, nr_pages)
    check_zone(m, zone)
    check_group(m, group)
    report = m.offline_report
    with nullcontext() if report is None else report.attempt(start_pfn, nr_pages):
        _offline_pages(m, start_pfn, nr_pages, zone, group)


def _offline_pages(
    m: Machine, start_pfn: int, nr_pages: int, zone: Zone, group: MemoryGroup | None
) -> None:
    end_pfn = start_pfn + nr_pages
    if not nr_pages or start_pfn % PAGEBLOCK_NR_PAGES or end_pfn % PAGES_PER_SECTION:
        raise kernel_error(-22, f"offline_pages: misaligned range {start_pfn:#x}+{nr_pages:#x}")
    with failing_with("memory holes"):
        if walk_system_ram_range(m, start_pfn, nr_pages) != nr_pages:
            raise kernel_error(-22, "memory holes")
    check_is_online(m, "offline_pages", start_pfn, nr_pages)
    if m.page_zone(start_pfn) is not zone or m.page_zone(end_pfn - 1) is not zone:
        with failing_with("multizone range"):
            raise kernel_error(-22, "multizone range")
    zone_pcp_disable(m, zone)
    lru_cache_disable(m)
    arg = MemoryNotify(start_pfn, nr_pages)
    try:
        _isolate_and_empty(m, zone, start_pfn, end_pfn, arg)
        # Broken pages and those that drivers offered go along, whoever thinks to have them.
        _page_ref.forget_users(m.memmap_engine, start_pfn, end_pfn)
        __offline_isolated_pages(m, zone, start_pfn, end_pfn)
        zone.nr_isolate_pageblock -= nr_pages // PAGEBLOCK_NR_PAGES
    finally:
        zone_pcp_enable(m, zone)
    _forget_offlined(m, zone, start_pfn, group, nr_pages, arg)


@fallible
def memory_block_offline(m: Machine, block: MemoryBlock) -> None:
    """Offline one block: the pages of its own memmap are uncounted first.

    :raises InvalidArgument: if its pages lie in several zones; KernelError: as offline_pages.
    """
    check_kind("block", block, MemoryBlock)
    if block.zone is None:
        raise kernel_error(-22, f"memory{block.block_id} lies in several zones or nodes")
    start, nr = block_range(m, block)
    zone, vmemmap = block.zone, block.nr_vmemmap_pages
    if vmemmap:
        adjust_present_page_count(m, zone, start, block.group, -vmemmap)
    try:
        offline_pages(m, start + vmemmap, nr - vmemmap, zone, block.group)
    except KernelError:
        if vmemmap:
            adjust_present_page_count(m, zone, start, block.group, vmemmap)
        raise
    if vmemmap:
        mhp_deinit_memmap_on_memory(m, start, vmemmap, zone)
    block.zone = None


# -- removing ---------------------------------------------------------------------------


@traced
def __remove_pages(m: Machine, pfn: int, nr_pages: int) -> None:
    """Remove the sections of a range of pages; what is not there is passed over with a warning.

    :raises InvalidArgument: for a misaligned range, where the kernel warns and does nothing;
        ImpossibleState: for pages that are online or beyond 64 TiB.
    """
    pfn, nr_pages = check_pfns(pfn, nr_pages)
    _check_pfn_span(pfn, nr_pages, "remove")
    check_pages_unused(m, "__remove_pages", pfn, nr_pages)
    clear_hwpoisoned_pages(m, pfn, nr_pages)
    at, end = pfn, pfn + nr_pages
    while at < end:
        count = sparse_remove_sections(m, at, end - at)
        if not count:
            count = _section_chunk(at, end)
            sparse_remove_section(m, at, count)
        at += count
    m.forget_pages(pfn, nr_pages)


@traced
def try_offline_node(m: Machine, nid: int) -> None:
    """Take a node away if it has neither memory, nor blocks, nor CPUs.

    :raises InvalidArgument: for a node that is not possible.
    """
    nid = check_nid(m, nid)
    if _is_empty(m, nid):
        m.set_node_online(nid, False)
        m.nodes_left_behind.discard(nid)
        unregister_one_node(m, nid)


def _is_empty(m: Machine, nid: int) -> bool:
    if m.nodes[nid].node_spanned_pages or m.cpus_of_node(nid):
        return False
    return not any(block.nid == nid for block in m.memory_blocks.values())


def _check_memblocks_offline(m: Machine, start: int, size: int) -> tuple[list[int], int]:
    """Return the blocks' nodes, in order, and the pages of the first own memmap among them.

    :raises Busy: with the kernel's log line, if a block is online.
    """
    nids: list[int] = []
    vmemmap = 0

    def check(block: MemoryBlock) -> None:
        nonlocal vmemmap
        if block.state != "offline":
            first, last = block.block_id * m.block_size, (block.block_id + 1) * m.block_size - 1
            m.printk(
                f"removing memory fails, because memory [{first:#018x}-{last:#018x}] is onlined"
            )
            raise kernel_error(-16, f"memory{block.block_id} is online")
        nids.append(block.nid)
        vmemmap = vmemmap or block.nr_vmemmap_pages

    walk_memory_blocks(m, start, size, check)
    return nids, vmemmap


@fallible
def try_remove_memory(m: Machine, start: int, size: int) -> None:
    """Remove a range of bytes whose blocks are all offline.

    :raises Busy: if a block is online; InvalidArgument: if blocks that hold their own memmap
        would not be removed one by one; ImpossibleState: for a range that is not whole blocks,
        lies beyond 64 TiB, or whose sections are online without an online block.
    """
    start, size = check_bytes(start, size)
    try:
        check_hotplug_memory_range(m, start, size)
    except KernelError as e:
        bug("try_remove_memory", e.why)
    check_addressable("try_remove_memory", start, size)
    nids, vmemmap = _check_memblocks_offline(m, start, size)
    check_pages_unused(m, "try_remove_memory", start >> PAGE_SHIFT, size >> PAGE_SHIFT)
    if vmemmap and size != m.block_size:
        m.printk(f"Refuse to remove {start:#x} - {start + size:#x},wrong granularity")
        raise kernel_error(-22, "blocks with their own memmap are removed one by one")
    m.firmware_map_remove(start, start + size - 1, "System RAM")
    remove_memory_block_devices(m, start, size)
    m.ops.arch_remove_memory(m, start, size)
    release_mem_region_adjustable(m, start, size)
    if nids:
        try_offline_node(m, nids[-1])
        # Only the last block's node is asked; another one that is empty now stays online.
        m.nodes_left_behind.update(n for n in set(nids) if n in m.n_online and _is_empty(m, n))


@traced
def release_mem_region_adjustable(m: Machine, start: int, size: int) -> None:
    """Delete, trim or split the resource that holds a range of bytes.

    Where no single resource holds all of it, what there is stays, as in the kernel.
    """
    blocks = range(start // m.block_size, (start + size) // m.block_size)
    if res_.release_mem_region_adjustable(m.iomem_resource, start, size):
        m.ram_left_behind.difference_update(blocks)
    else:
        tree, pages = m.iomem_resource, m.block_pages
        m.ram_left_behind.update(
            b for b in blocks if res_.walk_system_ram_range(tree, b * pages, pages)
        )


@traced
def __remove_memory(m: Machine, start: int, size: int) -> None:
    """Remove a range of bytes; the caller has made sure that nothing is online.

    :raises ImpossibleState: if it cannot be removed; the kernel stops there too.
    """
    try:
        try_remove_memory(m, start, size)
    except KernelError as e:
        bug("__remove_memory", str(e))


@fallible
def remove_memory(m: Machine, start: int, size: int) -> None:
    """Remove a range of bytes (see try_remove_memory)."""
    try_remove_memory(m, start, size)


@fallible
def offline_and_remove_memory(m: Machine, start: int, size: int) -> None:
    """Take all blocks of a range of bytes offline, then remove it.

    A failure brings the blocks back online in their zones; one that a notifier then refuses
    stays offline, as in the kernel.

    :raises InvalidArgument: for a misaligned range; KernelError: what an offline failed with;
        ImpossibleState: for a range that ends beyond 64 TiB.
    """
    start, size = check_bytes(start, size)
    if not is_whole_blocks(m, start, size):
        raise kernel_error(-22, f"{start:#x}+{size:#x} is not whole blocks")
    check_addressable("offline_and_remove_memory", start, size)
    offlined: list[tuple[MemoryBlock, int]] = []

    def offline(block: MemoryBlock) -> None:
        movable = block.zone is not None and block.zone.zone_idx == ZONE_MOVABLE
        kind = MMOP_ONLINE_MOVABLE if movable else MMOP_ONLINE_KERNEL
        if device_offline(m, block) == 0:
            offlined.append((block, kind))

    try:
        walk_memory_blocks(m, start, size, offline)
        try_remove_memory(m, start, size)
    except KernelError:
        for block, kind in offlined:
            block.online_type = kind
            try:
                device_online(m, block)
            except KernelError as e:
                m.note_swallowed("offline_and_remove_memory", e)
        raise


# Names of older kernels for the same functions (docs: the table of names).
hotadd_new_pgdat = hotadd_init_pgdat
free_area_init_node = free_area_init_core_hotplug
grow_zone_span = resize_zone_range
grow_pgdat_span = resize_pgdat_range
memmap_init_zone = memmap_init_range
__add_zone = move_pfn_range_to_zone
online_page = generic_online_page
find_next_system_ram = walk_system_ram_range
