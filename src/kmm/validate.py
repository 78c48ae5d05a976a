"""Recounts a machine the slow way and stops at the first two accounts that disagree."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kmm import procfs
from kmm.errors import ValidationError
from kmm.memory_block import MemoryBlock, sections_of
from kmm.mmzone import PgData, Zone
from kmm.params import (
    MAX_ORDER,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    MIGRATETYPE_NAMES,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
    PMD_SIZE,
    ZONE_MOVABLE,
    ZONE_NORMAL,
)
from kmm.resource import IORESOURCE_BUSY, IORESOURCE_SYSTEM_RAM, check_tree, walk_system_ram_range
from kmm.sparse import (
    PMDS_PER_TABLE,
    SECTION_HAS_MEM_MAP,
    SECTION_IS_EARLY,
    SECTION_IS_ONLINE,
    VMEMMAP_NOT_OURS,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

PCP_LISTS = 14
# A zone with fewer pages may get no watermark from its share of min_free_kbytes.
MANAGED_WITHOUT_MARKS = 10000


def _equal(what: str, have: object, want: object) -> None:
    if have != want:
        raise ValidationError(f"{what}: {have}, but recounted {want}")


def _true(ok: bool, what: str) -> None:
    if not ok:
        raise ValidationError(what)


def check_resources(m: Machine) -> None:
    """Resource tree in order; every block has its number, and its memory is System RAM."""
    check_tree(m.iomem_resource)
    for block_id, block in m.memory_blocks.items():
        _equal(f"memory{block_id}: id", block.block_id, block_id)
        start = block_id * m.block_pages
        parts = walk_system_ram_range(m.iomem_resource, start, m.block_pages)
        covered = sum(n for _, n in parts)
        early = m.section_flags(start) & SECTION_IS_EARLY
        _true(
            covered == m.block_pages or (bool(early) and covered > 0),
            f"memory{block_id}: {covered} of its pages are System RAM",
        )
    wanted = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY
    for _, res in m.iomem_resource.walk():
        if res.flags & wanted == wanted and res.name.startswith("System RAM"):
            first = res.start // m.block_size
            for block_id in range(first, res.end // m.block_size + 1):
                _true(
                    (block_id in m.memory_blocks) != (block_id in m.ram_left_behind),
                    f"System RAM {res.start:#x}-{res.end:#x}: no memory{block_id}",
                )


def check_sections(m: Machine) -> None:
    """Section flags agree with block states; a present section belongs to a block."""
    for block in m.memory_blocks.values():
        for section in sections_of(m, block):
            _check_section(m, block, section)
    present = np.flatnonzero(m.sections["flags"] & 1) // (m.block_pages // PAGES_PER_SECTION)
    strays = set(np.unique(present).tolist()) - set(m.memory_blocks)
    _true(not strays, f"sections of block {min(strays, default=0)} exist without memory block")


def _check_section(m: Machine, block: MemoryBlock, section: int) -> None:
    flags = int(m.sections["flags"][section])
    early = bool(flags & SECTION_IS_EARLY)
    if early and not flags & 1:
        return
    if not flags:
        # A boot block may have sections without any memory.
        first = section * PAGES_PER_SECTION
        ram = walk_system_ram_range(m.iomem_resource, first, PAGES_PER_SECTION)
        _true(not ram, f"section {section}: has System RAM but does not exist")
        return
    _true(flags & 3 == 3, f"section {section}: flags {flags:#x} without memmap")
    vmemmap_only = (
        block.nr_vmemmap_pages
        and (section + 1) * PAGES_PER_SECTION
        <= block.block_id * m.block_pages + block.nr_vmemmap_pages
    )
    online = bool(flags & SECTION_IS_ONLINE)
    if not vmemmap_only:
        _equal(f"section {section}: online", online, block.state == "online")
    _true(int(m.sections["subsection_map"][section]) != 0, f"section {section}: no subsection")
    nid = int(m.sections["nid"][section])
    _true(nid in block.nodes, f"section {section}: node {nid}, but its block lies on {block.nodes}")


def check_vmemmap(m: Machine) -> None:
    """Each present section's memmap is backed, by pages that are in use, and nothing else is."""
    present = np.flatnonzero(m.sections["flags"] & SECTION_HAS_MEM_MAP)
    starts = present * PAGES_PER_SECTION * m.config.struct_page_size // PMD_SIZE
    ends = -(-(present + 1) * PAGES_PER_SECTION * m.config.struct_page_size // PMD_SIZE)
    described = {
        c for s, e in zip(starts.tolist(), ends.tolist(), strict=True) for c in range(s, e)
    }
    backed = set(np.flatnonzero(m.vmemmap_users).tolist())
    _equal("2 MiB pieces of memmap", _differ(backed, described), _differ(described, backed))
    mapped = set(np.flatnonzero(m.vmemmap_pfn).tolist())
    _equal("mapped pieces of memmap", _differ(mapped, described), _differ(described, mapped))
    tables = Counter(chunk // PMDS_PER_TABLE for chunk in backed)
    _equal("memmap's page tables", {t: n for t, (_, n) in m.vmemmap_tables.items()}, dict(tables))
    own = [
        (int(p), 9) for p in m.vmemmap_pfn[m.vmemmap_pfn != 0].tolist() if not p & VMEMMAP_NOT_OURS
    ]
    own += [(p, 0) for pages in m.vmemmap_basepages.values() for p in pages.values()]
    own += [(p, 0) for p, _ in m.vmemmap_tables.values() if p >= 0]
    for pfn, order in own:
        _true(m.memmap_engine.is_allocated(pfn, order), f"memmap's page {pfn:#x} is not in use")


def _differ(one: set[int], other: set[int]) -> list[int]:
    """Return the first few of what only one has, for a message that fits a line."""
    return sorted(one - other)[:4]


def _online_pages_of(m: Machine, zone: Zone) -> int:
    """Count the present pages of a zone: online pageblocks of it, less holes in System RAM."""
    if not zone.spanned_pages:
        return 0
    first = zone.zone_start_pfn // PAGEBLOCK_NR_PAGES
    last = -(-zone.zone_end_pfn // PAGEBLOCK_NR_PAGES)
    mine = np.flatnonzero(m.pageblocks["zone"][first:last] == zone.index + 1) + first
    flags = m.sections["flags"][mine >> 6]
    online = flags & SECTION_IS_ONLINE != 0
    early = flags & SECTION_IS_EARLY != 0
    count = int(np.count_nonzero(online & ~early)) * PAGEBLOCK_NR_PAGES
    # Boot memory has holes inside its sections; only there the resource tree is asked.
    boot = mine[online & early]
    for run in np.split(boot, np.flatnonzero(np.diff(boot) != 1) + 1):
        if len(run):
            start, nr = int(run[0]) * PAGEBLOCK_NR_PAGES, len(run) * PAGEBLOCK_NR_PAGES
            count += sum(n for _, n in walk_system_ram_range(m.iomem_resource, start, nr))
    return count


def check_zone(m: Machine, zone: Zone) -> None:
    """Spans, present, managed and free counts of a zone, and its lists against the records."""
    name = f"node {zone.nid} zone {zone.name}"
    _equal(f"{name}: present", zone.present_pages, _online_pages_of(m, zone))
    _true(zone.present_pages <= zone.spanned_pages, f"{name}: present exceeds spanned")
    _true(zone.populated or not zone.spanned_pages, f"{name}: has a span but no pages")
    if zone.populated and not zone.early_ranges:
        # A span that hot-plug made begins and ends at pages of the zone; one made at boot, where
        # the zone's addresses do.
        for end, pfn in (("first", zone.zone_start_pfn), ("last", zone.zone_end_pfn - 1)):
            _true(m.page_zone(pfn) is zone, f"{name}: the {end} page of its span is not in it")
    _true(0 <= zone.managed_pages <= zone.present_pages, f"{name}: managed {zone.managed_pages}")
    check_free_lists(m, zone, name)
    isolated = _isolated_blocks(m, zone)
    _equal(f"{name}: isolated pageblocks", zone.nr_isolate_pageblock, isolated)
    _check_marks(m, zone, name)


def _check_marks(m: Machine, zone: Zone, name: str) -> None:
    _true(
        zone.watermark_min <= zone.watermark_low <= zone.watermark_high,
        f"{name}: watermarks out of order",
    )
    _true(
        zone.watermark_high > 0 or zone.managed_pages < MANAGED_WITHOUT_MARKS,
        f"{name}: no watermarks",
    )
    for cpu in range(m.nr_cpus):
        count, high, batch, _ = zone.pcp_state(cpu)
        listed = 0
        for pindex in range(PCP_LISTS):
            order = 9 if pindex >= 12 else pindex // 3
            listed += len(zone.pcp_list(cpu, pindex)) << order
        _equal(f"{name}: pages on the lists of CPU {cpu}", count, listed)
        if zone.populated:
            want = (zone.pageset_high, zone.pageset_batch)
            _equal(f"{name}: CPU {cpu} high and batch", (high, batch), want)


def _isolated_blocks(m: Machine, zone: Zone) -> int:
    if procfs.pageblock_counts(m, zone)[MIGRATE_ISOLATE] == 0:
        return 0
    first = zone.zone_start_pfn
    return sum(
        m.memmap_engine.get_pageblock_migratetype(pfn) == MIGRATE_ISOLATE
        for pfn in range(first, zone.zone_end_pfn, PAGEBLOCK_NR_PAGES)
        if m.page_zone(pfn) is zone and m.section_flags(pfn) & SECTION_IS_ONLINE
    )


def check_free_lists(m: Machine, zone: Zone, name: str) -> None:
    """Free lists against the page records, order by order and type by type."""
    found, pcp = zone.recount()
    counts = zone.free_counts()
    free = 0
    for mt, mask in enumerate(zone.free_masks()):
        orders = sum(1 << order for order in range(MAX_ORDER) if counts[mt][order])
        _equal(f"{name}: orders of {MIGRATETYPE_NAMES[mt]} with free blocks", mask, orders)
    for order in range(MAX_ORDER):
        for mt in range(MIGRATE_TYPES):
            what = f"{name}: free blocks of order {order}, {MIGRATETYPE_NAMES[mt]}"
            _equal(what, counts[mt][order], found[mt][order])
            if counts[mt][order]:
                _check_list(zone, order, mt, what)
            if mt != MIGRATE_ISOLATE:
                free += counts[mt][order] << order
    _equal(f"{name}: free pages", zone.nr_free_pages, free)
    _equal(f"{name}: pages on per-CPU lists", zone.pcp_pages(), pcp)
    _true(free + pcp <= zone.managed_pages, f"{name}: more free pages than managed ones")


def _check_list(zone: Zone, order: int, mt: int, what: str) -> None:
    pfns = zone.free_list(order, mt)
    _true(len(set(pfns)) == len(pfns), f"{what}: a block is listed twice")
    for pfn in pfns:
        _true(pfn % (1 << order) == 0, f"{what}: pfn {pfn:#x} is misaligned")
        _true(
            zone.zone_start_pfn <= pfn < zone.zone_end_pfn,
            f"{what}: pfn {pfn:#x} lies outside the zone",
        )


def check_node(m: Machine, pgdat: PgData) -> None:
    """A node's span and present pages."""
    nid = pgdat.node_id
    name = f"node {nid}"
    zones = pgdat.zones
    _equal(f"{name}: present", pgdat.node_present_pages, sum(z.present_pages for z in zones))
    spans = [(z.zone_start_pfn, z.zone_end_pfn) for z in zones if z.spanned_pages]
    first = min((s for s, _ in spans), default=0)
    spanned = max((e for _, e in spans), default=0) - first
    if spans or nid in m.n_online:
        have = (pgdat.node_start_pfn, pgdat.node_spanned_pages)
        _equal(f"{name}: start and span", have, (first, spanned))


def check_node_states(m: Machine) -> None:
    """Which nodes are online, have memory, daemons, directories, and are in the top cpuset."""
    kernel = {n for n, p in m.nodes.items() if any(z.populated for z in p.zones[: ZONE_NORMAL + 1])}
    memory = kernel | {n for n, p in m.nodes.items() if p.zones[ZONE_MOVABLE].populated}
    _equal("nodes with normal memory", m.n_normal_memory, kernel)
    _equal("nodes with memory", m.n_memory, memory)
    owned = {n for b in m.memory_blocks.values() for n in b.nodes}
    with_cpus = {n for n in m.nodes if m.cpus_of_node(n)}
    _equal("online nodes", m.n_online, owned | with_cpus | memory | m.nodes_left_behind)
    _equal("nodes with a directory", m.node_devices, m.n_online)
    daemons = {f"{name}{nid}" for nid in memory for name in ("kswapd", "kcompactd")}
    _equal("daemons", sorted(m.kthreads), sorted(daemons))
    # Where a refusal kept an event from it, the kernel's is stale too, until the next one.
    if not any(n.name == "cpuset" and n.missed for n in m.memory_notifiers):
        _equal("top cpuset's nodes", m.top_cpuset_mems, m.n_memory)


def check_zonelists(m: Machine) -> None:
    """Every populated zone is on every online node's list, and nothing else has pages there."""
    populated = {z.index for z in m.all_zones() if z.populated}
    for nid in m.n_online:
        pgdat = m.nodes[nid]
        listed = [z.index for z in pgdat.zonelist]
        _true(len(set(listed)) == len(listed), f"node {nid}: a zone is on its zonelist twice")
        _equal(
            f"node {nid}: populated zones on the zonelist",
            sorted(listed),
            sorted(populated),
        )
        own = [z.index for z in pgdat.zonelist if z.nid == nid]
        _equal(f"node {nid}: its own zonelist", [z.index for z in pgdat.nofallback], own)


def check_blocks(m: Machine) -> None:
    """Block devices: state, zone, node and group."""
    for block_id, block in m.memory_blocks.items():
        name = f"memory{block_id}"
        _true(block.state in ("online", "offline"), f"{name}: state {block.state}")
        _true(block.state == "online" or block.zone is None, f"{name}: offline but in a zone")
        _true(all(n in m.node_devices for n in block.nodes), f"{name}: linked to an absent node")
        if block.zone is not None:
            last = (block_id + 1) * m.block_pages - 1
            pfn = block_id * m.block_pages
            early = m.section_flags(pfn) & SECTION_IS_EARLY
            ends = [pfn] if early else [pfn, last]
            for p in ends:
                have = m.page_zone(p)
                _true(
                    have is block.zone or (bool(early) and have is None),
                    f"{name}: page {p:#x} is in another zone",
                )
        if block.group is not None:
            _true(block_id in block.group.blocks, f"{name}: its group does not list it")
    for group in m.memory_groups.values():
        online = [m.memory_blocks[b] for b in group.blocks if m.memory_blocks[b].zone is not None]
        movable = sum(b.zone.zone_idx == ZONE_MOVABLE for b in online if b.zone is not None)
        counted = (group.present_movable_pages, group.present_kernel_pages)
        want = (movable * m.block_pages, (len(online) - movable) * m.block_pages)
        _equal(f"memory group {group.mgid}: present", counted, want)


def check_sysfs(m: Machine) -> None:
    """The tree shows what the state says."""
    names = set(m.listdir("/sys/devices/system/memory"))
    blocks = {n for n in names if n[6:].isdigit()}
    _equal("sysfs memory blocks", blocks, {f"memory{b}" for b in m.memory_blocks})
    for block_id, block in m.memory_blocks.items():
        state = m.read(f"/sys/devices/system/memory/memory{block_id}/state").strip()
        _equal(f"memory{block_id}/state", state, block.state)
    nodes = {n for n in m.listdir("/sys/devices/system/node") if n[4:].isdigit()}
    _equal("sysfs nodes", nodes, {f"node{n}" for n in m.n_online})


def check_totals(m: Machine) -> None:
    """Sums over the machine."""
    zones = m.all_zones()
    _equal("totalram_pages", m.totalram_pages, sum(z.managed_pages for z in zones))
    reserve = sum(m.nodes[n].totalreserve_pages for n in m.n_online)
    if m.totalreserve_pages:
        _equal("totalreserve_pages", m.totalreserve_pages, reserve)
    top = max((z.zone_end_pfn for z in zones if z.spanned_pages), default=0)
    _true(m.max_pfn >= top, f"max_pfn {m.max_pfn:#x} is below the end of memory {top:#x}")


def validate(m: Machine) -> None:
    """Run every check.

    :raises ValidationError: at the first disagreement, naming both accounts.
    """
    check_resources(m)
    check_sections(m)
    check_blocks(m)
    for zone in m.all_zones():
        check_zone(m, zone)
    for pgdat in m.nodes.values():
        check_node(m, pgdat)
    check_node_states(m)
    check_vmemmap(m)
    check_zonelists(m)
    check_totals(m)
    check_sysfs(m)
