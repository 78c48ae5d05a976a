"""Recounts a machine the slow way and stops at the first two accounts that disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm.memory_block import MemoryBlock
from kmm.mmzone import MemoryGroup, PgData
from kmm.page_writeback import check_dirty
from kmm.params import (
    FILL_VMEMMAP,
    PAGE_SHIFT,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
    PAGES_PER_SUBSECTION,
    PG_HWPOISON,
    PMD_SIZE,
    ZONE_MOVABLE,
    ZONE_NORMAL,
)
from kmm.resource import IORESOURCE_BUSY, IORESOURCE_SYSTEM_RAM, check_tree, walk_system_ram_range
from kmm.sparse import (
    ALL_SUBSECTIONS,
    PMDS_PER_TABLE,
    SECTION_HAS_MEM_MAP,
    SECTION_IS_EARLY,
    SECTION_IS_ONLINE,
    VMEMMAP_NOT_OURS,
    chunks_seen,
    sections_seen,
    vmemmap_chunks,
)
from kmm.swapfile import check_swap
from kmm.validate_compaction import check_compaction
from kmm.validate_hugetlb import check_hugetlb
from kmm.validate_users import check_users
from kmm.validate_zone import _equal, _true, check_recomputed, check_zone, unmanaged_pages

if TYPE_CHECKING:
    from kmm.acpi_memhotplug import AcpiDevice
    from kmm.machine import Machine


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
    for block, section in _odd_sections(m):
        _check_section(m, block, section)
    flags = sections_seen(m)["flags"]
    above = m.sections["flags"][len(flags) :]
    _true(not above.any(), f"a section above {len(flags) - 1}, the highest that was ever there")
    present = np.flatnonzero(flags & 1) // (m.block_pages // PAGES_PER_SECTION)
    strays = set(np.unique(present).tolist()) - set(m.memory_blocks)
    _true(not strays, f"sections of block {min(strays, default=0)} exist without memory block")


def _odd_sections(m: Machine) -> list[tuple[MemoryBlock, int]]:
    """Return the blocks' sections but for those that plainly agree with their block.

    A section does so if it is there in whole, online as its block is, on its block's one node.
    """
    blocks = list(m.memory_blocks.values())
    nr = m.block_pages // PAGES_PER_SECTION
    ids = np.array([b.block_id for b in blocks], dtype=np.int64)
    sections = (ids[:, None] * nr + np.arange(nr)).reshape(-1)
    flags = m.sections["flags"][sections]
    online = np.repeat([b.state == "online" for b in blocks], nr)
    nids = np.repeat([b.nodes[0] if len(b.nodes) == 1 else -1 for b in blocks], nr)
    plain = flags & 3 == 3
    plain &= (flags & SECTION_IS_ONLINE != 0) == online
    plain &= m.sections["subsection_map"][sections] == ALL_SUBSECTIONS
    plain &= m.sections["nid"][sections] == nids
    return [(blocks[i // nr], int(sections[i])) for i in np.flatnonzero(~plain).tolist()]


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
    _check_subsections(m, section, early)
    nid = int(m.sections["nid"][section])
    _true(nid in block.nodes, f"section {section}: node {nid}, but its block lies on {block.nodes}")


def _check_subsections(m: Machine, section: int, early: bool) -> None:
    """A block's section is there in whole, one of boot at least where it has RAM."""
    first = section * PAGES_PER_SECTION
    want = (1 << 64) - 1
    if early:
        ram = walk_system_ram_range(m.iomem_resource, first, PAGES_PER_SECTION)
        want = 0
        for pfn, nr in ram:
            end = -(-(pfn + nr - first) // PAGES_PER_SUBSECTION)
            want |= (1 << end) - (1 << (pfn - first) // PAGES_PER_SUBSECTION)
    have = int(m.sections["subsection_map"][section])
    _equal(f"section {section}: missing subsections", want & ~have, 0)


def check_vmemmap(m: Machine) -> None:
    """Each present section's memmap is backed, by pages that are in use, and nothing else is."""
    present = np.flatnonzero(sections_seen(m)["flags"] & SECTION_HAS_MEM_MAP)
    starts = present * PAGES_PER_SECTION * m.config.struct_page_size // PMD_SIZE
    ends = -(-(present + 1) * PAGES_PER_SECTION * m.config.struct_page_size // PMD_SIZE)
    seen = chunks_seen(m)
    above = m.vmemmap_users[seen.stop :].any() or m.vmemmap_pfn[seen.stop :].any()
    _true(not above, "memmap above that of the highest section that was ever there")
    users, pages = m.vmemmap_users[seen], m.vmemmap_pfn[seen]
    described = np.zeros(len(users), dtype=bool)
    for i in range(int((ends - starts).max(initial=0))):
        described[(starts + i)[starts + i < ends]] = True
    backed, mapped = users != 0, pages != 0
    _equal("2 MiB pieces of memmap", _differ(backed, described), _differ(described, backed))
    _equal("mapped pieces of memmap", _differ(mapped, described), _differ(described, mapped))
    tables = np.unique(np.flatnonzero(backed) // PMDS_PER_TABLE, return_counts=True)
    want = dict(zip(tables[0].tolist(), tables[1].tolist(), strict=True))
    _equal("memmap's page tables", {t: n for t, (_, n) in m.vmemmap_tables.items()}, want)
    ours = mapped & (pages & np.uint64(VMEMMAP_NOT_OURS) == 0)
    own = [(p, 9) for p in pages[ours].tolist()]
    own += [(p, 0) for base in m.vmemmap_basepages.values() for p in base.values()]
    own += [(p, 0) for p, _ in m.vmemmap_tables.values() if p >= 0]
    for pfn, order in own:
        _true(m.memmap_engine.is_allocated(pfn, order), f"memmap's page {pfn:#x} is not in use")


def _differ(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> list[int]:
    """Return the first few of what only one has, for a message that fits a line."""
    found: list[int] = np.flatnonzero(one & ~other)[:4].tolist()
    return found


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
    for cs in m.cpusets.values():
        above = m.top_cpuset_mems if cs.parent is None else cs.parent.effective_mems
        have = set(cs.mems_allowed & above) or set(above)
        _equal(f"nodes of cpuset {cs.name}", set(cs.effective_mems), have)


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
        _check_order(m, pgdat)
        own = [z.index for z in pgdat.zonelist if z.nid == nid]
        _equal(f"node {nid}: its own zonelist", [z.index for z in pgdat.nofallback], own)


def _check_order(m: Machine, pgdat: PgData) -> None:
    """Nearest nodes first, and of each its zones from the highest down."""
    nid, order = pgdat.node_id, pgdat.fallback_order
    nodes, load = pgdat.order_from

    def far(n: int) -> tuple[int, int]:
        away = m.node_distance(nid, n) + (n < nid) + bool(m.cpus_of_node(n))
        return away * 1024 + load.get(n, 0), n

    _equal(f"node {nid}: fallback order", order, [nid, *sorted(nodes - {nid}, key=far)])
    zones = [z.index for n in order for z in reversed(m.nodes[n].zones) if z.populated]
    _equal(f"node {nid}: zonelist", [z.index for z in pgdat.zonelist], zones)


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
        _equal(f"{name}: node", block.nid, block.nodes[0] if block.nodes else -1)
        if block.group is not None:
            _true(block_id in block.group.blocks, f"{name}: its group does not list it")
        _check_own_memmap(m, block, name)
    for mgid, group in m.memory_groups.items():
        _check_group(m, mgid, group)


def _check_own_memmap(m: Machine, block: MemoryBlock, name: str) -> None:
    """A block holds its own memmap in whole or not at all."""
    own, start = block.nr_vmemmap_pages, block.block_id * m.block_pages
    if own:
        whole = m.block_pages * m.config.struct_page_size >> PAGE_SHIFT
        _equal(f"{name}: pages of its own memmap", own, whole)
        for chunk in vmemmap_chunks(m, start, m.block_pages):
            ours = not int(m.vmemmap_pfn[chunk]) & VMEMMAP_NOT_OURS
            _true(not ours, f"{name}: its memmap lies elsewhere, not in its own {own} pages")
    if block.state == "online":
        first = start // PAGEBLOCK_NR_PAGES
        state = m.pageblocks["state"][first : first + m.block_pages // PAGEBLOCK_NR_PAGES]
        there = int(np.count_nonzero(state & 0x7F == FILL_VMEMMAP)) * PAGEBLOCK_NR_PAGES
        _equal(f"{name}: pages set aside for its own memmap", own, there)


def _check_group(m: Machine, mgid: int, group: MemoryGroup) -> None:
    name = f"memory group {mgid}"
    _equal(f"{name}: id", group.mgid, mgid)
    strays = {b for b in group.blocks if b not in m.memory_blocks}
    _true(not strays, f"{name}: lists memory{min(strays, default=0)}, which is not there")
    blocks = [m.memory_blocks[b] for b in sorted(group.blocks)]
    for block in blocks:
        _true(block.group is group, f"{name}: lists memory{block.block_id}, which is not in it")
    zones = [b.zone for b in blocks if b.zone is not None]
    movable = sum(z.zone_idx == ZONE_MOVABLE for z in zones)
    counted = (group.present_movable_pages, group.present_kernel_pages)
    want = (movable * m.block_pages, (len(zones) - movable) * m.block_pages)
    _equal(f"{name}: present", counted, want)


def check_firmware(m: Machine) -> None:
    """Slots, ACPI devices, the blocks they are linked with, and the firmware's map."""
    for dimm_id, dimm in m.dimms.items():
        held = m.acpi_devices[dimm.slot].dimm
        _true(held is dimm, f"DIMM {dimm_id}: is not in slot {dimm.slot}")
    for device in m.acpi_devices:
        if device.dimm is not None:
            known = m.dimms.get(device.dimm.dimm_id) is device.dimm
            _true(known, f"{device.name}: its DIMM {device.dimm.dimm_id} is not there")
        if device.mgid >= 0:
            _true(device.mgid in m.memory_groups, f"{device.name}: no memory group {device.mgid}")
        _check_links(m, device)
    linked = {(b, d.name) for d in m.acpi_devices for b in d.physical_nodes}
    for block_id, block in m.memory_blocks.items():
        if block.firmware_node is not None:
            there = (block_id, block.firmware_node) in linked
            _true(there, f"memory{block_id}: {block.firmware_node} is not linked with it")
    for number, (start, end, _) in m.firmware_map.items():
        good = number < m.firmware_map_next and start <= end
        _true(good, f"firmware map: entry {number}, {start:#x}-{end:#x}")


def _check_links(m: Machine, device: AcpiDevice) -> None:
    for block_id in device.physical_nodes:
        block = m.memory_blocks.get(block_id)
        linked = block is not None and block.firmware_node == device.name
        _true(linked, f"{device.name}: linked with memory{block_id}, which is not with it")
        if block is None or block.group is None:
            continue  # added through another door before the device came
        _equal(f"memory{block_id}: its device's group", device.mgid, block.group.mgid)
        start, last = block_id * m.block_size, (block_id + 1) * m.block_size - 1
        mapped = any(s <= start and last <= e for s, e, _ in m.firmware_map.values())
        _true(mapped, f"memory{block_id}: not in the firmware map")


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
    _equal("totalreserve_pages", m.totalreserve_pages, reserve)
    if m.recomputed & {"watermarks", "reserves"}:
        for nid in m.n_online:
            _check_totalreserve(m, m.nodes[nid])
    marked = sum(int(m.memmap["flags"][p]) & PG_HWPOISON != 0 for p in m.hwpoison)
    _equal("poisoned pages", marked, len(m.hwpoison))
    _true(m.num_poisoned_pages >= marked, f"num_poisoned_pages {m.num_poisoned_pages}: too few")
    top = max((z.zone_end_pfn for z in zones if z.spanned_pages), default=0)
    _true(m.max_pfn >= top, f"max_pfn {m.max_pfn:#x} is below the end of memory {top:#x}")


def _check_totalreserve(m: Machine, pgdat: PgData) -> None:
    """What a node keeps; a boost may have come since, or gone when kswapd had worked for it."""

    def keeps(boosted: bool) -> int:
        return sum(
            min(
                max(z.lowmem_reserve[z.zone_idx :])
                + z.watermark_high
                + (z.watermark_boost if boosted else 0),
                z.managed_pages,
            )
            for z in pgdat.zones
        )

    low, high = keeps(False), keeps(True)
    if m.kswapds:
        high = pgdat.managed_pages
    have = pgdat.totalreserve_pages
    _true(low <= have <= high, f"node {pgdat.node_id}: totalreserve_pages {have}, not {low}")


def validate(m: Machine) -> None:
    """Run every check.

    :raises ValidationError: at the first disagreement, naming both accounts.
    """
    check_resources(m)
    check_sections(m)
    check_blocks(m)
    check_firmware(m)
    taken = unmanaged_pages(m)
    for zone in m.all_zones():
        check_zone(m, zone, taken[zone.index])
    for pgdat in m.nodes.values():
        check_node(m, pgdat)
    check_node_states(m)
    for zone in m.all_zones():
        if zone.nid in m.n_online:
            check_recomputed(m, zone)
    check_vmemmap(m)
    check_zonelists(m)
    check_hugetlb(m)
    check_compaction(m)
    check_totals(m)
    check_dirty(m)
    check_swap(m)
    check_users(m)
    check_sysfs(m)
