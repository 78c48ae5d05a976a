"""A machine from the texts of a real one's /proc and /sys.

The texts are those of one moment of its life: boot_ram tells which memory was there at boot.  What
they do not tell starts anew: DIMMs are in no slot, blocks in no memory group, no block holds its
own memmap, the pages on per-CPU lists are single ones, and the user has set no min_free_kbytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kmm import boot, freelists, mm_init
from kmm.boot_ram import RAM, Entry, added_later, firmware_map, parse_memmap
from kmm.config import MAX_DISTANCE, check_config, config_from_dict
from kmm.errors import ConfigError, ValidationError, shown
from kmm.firmware import pxm_to_node_map, ram_layout
from kmm.hugetlb_init import hugetlb_init, load_pools
from kmm.machine_files import collect
from kmm.memory_block import MemoryBlock
from kmm.memory_hotplug import update_pgdat_span
from kmm.mmzone import Zone
from kmm.notifiers import register_boot_notifiers
from kmm.params import (
    LOCAL_DISTANCE,
    MAX_DMA32_PFN,
    MAX_NR_ZONES,
    MAX_ORDER,
    MIGRATE_TYPES,
    NR_PAGES_MAX,
    ONLINE_POLICIES,
    ONLINE_TYPES,
    PAGE_SHIFT,
    REMOTE_DISTANCE,
    THP_MIN_PAGES,
    THP_MODES,
    ZONE_MOVABLE,
    ZONE_NAMES,
    MachineConfig,
    NodeConfig,
    parse_list,
)
from kmm.procfs import load_direct_map
from kmm.resource import Resource
from kmm.saved_machine import (
    MEMORY,
    NODE,
    Range,
    SavedMachine,
    ZoneKey,
    merge_ranges,
    parse_saved,
)
from kmm.swapfile import swapon_at_boot
from kmm.validate import validate
from kmm.vm_sysctl import INT_MAX, load_tunables
from kmm.vmstat import (
    ENGINE_NUMA_ITEMS,
    NODE_STAT_ITEMS,
    NUMA_STAT_ITEMS,
    ZONE_STAT_ITEMS,
    load_numa_events,
    load_vm_events,
)
from kmm.watermarks import (
    MAX_STAT_THRESHOLD,
    calculate_totalreserve_pages,
    writeback_set_ratelimit,
)
from kmm.zoneinfo import pageset_counts, zone_number
from kmm.zonelists import build_zonelists, nr_free_zone_pages

if TYPE_CHECKING:
    from kmm.machine import Machine

MODULE = "/sys/module/memory_hotplug/parameters/"
VM = "/proc/sys/vm/"
_POOLS = "/sys/kernel/mm/hugepages/"
_GIGANTIC = _POOLS + "hugepages-1048576kB/"
_COUNTER_MAX = (1 << 63) - 1


def read_tree(root: str | os.PathLike[str] = "/") -> dict[str, str]:
    """Collect what Machine.from_files takes.

    :param root: as machine_files.collect; links may be files there.
    :return: path to text; a link or directory has the text ``link``, and a file that exists but
        cannot be read, an empty one.
    :raises ConfigError: as machine_files.collect.
    """
    found = collect(root)
    return found.files | dict.fromkeys(found.unreadable, "")


def config_from_files(
    files: Mapping[str, str], saved: SavedMachine, later: list[Resource]
) -> MachineConfig:
    """Describe the machine that files come from as far as they tell.

    :param files: path to text; saved: what they say of memory; later: RAM that was plugged in.
    :raises ConfigError: if a list of CPUs or the distances are not understood.
    """
    nodes = []
    for nid in range(saved.nr_nodes):
        path = f"{NODE}node{nid}/cpulist"
        cpus = parse_list(files.get(path, ""), path)
        early = sum(
            end - start
            for (node, _), parts in saved.ranges.items()
            for start, end in _cut(parts, later)[0]
            if node == nid
        )
        nodes.append(NodeConfig(cpus, early << PAGE_SHIFT))
    if not any(n.cpus for n in nodes):
        nodes[0] = NodeConfig((0,), nodes[0].memory)
    total = sum(n.memory for n in nodes)
    return MachineConfig(
        memory=total,
        maxmem=max(total * 4, 1 << 40),
        cpus=max(cpu for n in nodes for cpu in n.cpus) + 1,
        nodes=tuple(nodes),
        distances=_distances(files, saved.nr_nodes),
        srat="numbered",
        cmdline=files.get("/proc/cmdline", "").strip(),
    )


def _distances(files: Mapping[str, str], nr_nodes: int) -> tuple[tuple[int, ...], ...]:
    online = _online(files, nr_nodes)
    possible = range(nr_nodes)
    matrix = [[LOCAL_DISTANCE if a == b else REMOTE_DISTANCE for b in possible] for a in possible]
    for nid in online:
        path = f"{NODE}node{nid}/distance"
        for other, d in zip(online, files.get(path, "").split(), strict=False):
            if not re.fullmatch(r"[0-9]{1,3}", d) or not LOCAL_DISTANCE <= int(d) <= MAX_DISTANCE:
                raise ConfigError(
                    f"{path}: {shown(d)}; allowed: numbers from {LOCAL_DISTANCE} to {MAX_DISTANCE}"
                )
            matrix[nid][other] = int(d)
    return tuple(tuple(row) for row in matrix)


def _online(files: Mapping[str, str], nr_nodes: int) -> tuple[int, ...]:
    online = parse_list(files.get(NODE + "online", ""), NODE + "online")
    if online and max(online) >= nr_nodes:
        raise ConfigError(f"{NODE}online: node {max(online)}; allowed: 0 to {nr_nodes - 1}")
    return online


def boot_from_files(
    m: Machine, files: Mapping[str, str], config: MachineConfig | Mapping[str, Any] | None
) -> None:
    """Build the machine that the texts describe.

    :param files, config: see Machine.from_files.
    :raises ConfigError: naming the file, what is wrong in it and what is allowed.
    """
    if not isinstance(files, Mapping):
        raise ConfigError(
            f"files: {shown(files)}; allowed: paths and their texts, as "
            f"kmm.from_files.read_tree({files if isinstance(files, str) else '/'!r}) collects them"
        )
    if config is not None and not isinstance(config, MachineConfig):
        config = config_from_dict(config)
    elif config is not None and config.srat != "numbered":
        config = check_config(config)
    saved = parse_saved(files, None if config is None else _nr_nodes(config))
    entries = parse_memmap(files)
    with_memmap = files.get(MODULE + "memmap_on_memory", "").strip() == "Y"
    page_size = (config or MachineConfig()).struct_page_size
    later = added_later(
        saved,
        entries,
        _described_ram(config) if config else [],
        saved.block_pages * page_size >> PAGE_SHIFT if with_memmap else 0,
    )
    entries = entries or _firmware_entries(saved, config, later)
    first = next(iter(saved.zones))[0]
    config = config or config_from_files(files, saved, later)
    config = replace(
        config,
        zones=tuple(ZONE_NAMES.index(name) for nid, name in saved.zones if nid == first),
        probe=MEMORY + "probe" in files,
        memory_failure=MEMORY + "soft_offline_page" in files,
        pdpe1gb=_has_gigantic_pools(files, config),
    )
    m._prepare(config)
    m.firmware_map, m.firmware_map_next = entries, max(entries, default=-1) + 1
    _build(m, files, saved, later)
    swapon_at_boot(m)


def _build(
    m: Machine, files: Mapping[str, str], saved: SavedMachine, later: list[Resource]
) -> None:
    m.iomem_resource = saved.iomem
    m.block_size = saved.block_size
    boot.apply_cmdline(m)
    _parameters(m, files)
    _blocks(m, saved, later)
    for key in saved.zones:
        if zone_number(saved.zones, key, "present"):
            _zone(m, saved, key, files)
    _finish(m, files)
    _check(m)


def _nr_nodes(config: MachineConfig) -> int:
    return max(pxm_to_node_map(config).values(), default=0) + 1


def _firmware_entries(
    saved: SavedMachine, config: MachineConfig | None, later: list[Resource]
) -> dict[int, Entry]:
    entries = boot.e820(*ram_layout(config)) if config else firmware_map(saved.iomem, later)
    entries += [(r.start, r.end, r.name) for r in later if r.name == RAM]
    return dict(enumerate(entries))


def _has_gigantic_pools(files: Mapping[str, str], config: MachineConfig) -> bool:
    """Whether the kernel has a pool of 1 GiB pages, which the files of its pools tell."""
    pools = [path for path in files if path.startswith(_POOLS)]
    return any(path.startswith(_GIGANTIC) for path in pools) if pools else config.pdpe1gb


def _described_ram(config: MachineConfig) -> list[Range]:
    low, high = (n >> PAGE_SHIFT for n in ram_layout(config))
    return [(0, low), (MAX_DMA32_PFN, MAX_DMA32_PFN + high)]


def _parameters(m: Machine, files: Mapping[str, str]) -> None:
    def one_of(path: str, words: Sequence[str], default: str) -> str:
        word = files.get(path, "").strip() or default
        if word not in words:
            raise ConfigError(f"{path}: {shown(word)}; allowed: {', '.join(words)}")
        return word

    default = ONLINE_TYPES[m.mhp_default_online_type]
    word = one_of(MEMORY + "auto_online_blocks", ONLINE_TYPES, default)
    m.mhp_default_online_type = ONLINE_TYPES.index(word)
    m.online_policy = one_of(MODULE + "online_policy", ONLINE_POLICIES, m.online_policy)
    path = MODULE + "auto_movable_ratio"
    word = files.get(path, "").strip() or str(m.auto_movable_ratio)
    if not re.fullmatch(r"[0-9]{1,10}", word) or int(word) >= 1 << 32:
        raise ConfigError(f"{path}: {shown(word)}; allowed: a number below 2^32")
    m.auto_movable_ratio = int(word)
    aware = one_of(MODULE + "auto_movable_numa_aware", ("Y", "N"), "Y")
    m.auto_movable_numa_aware = aware == "Y"
    m.memmap_on_memory = one_of(MODULE + "memmap_on_memory", ("Y", "N"), "N") == "Y"
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if text := files.get(path, "").strip():
        match = re.search(r"\[(\w+)\]", text)
        if not match or match[1] not in THP_MODES:
            raise ConfigError(
                f"{path}: {shown(text)}; allowed: one of {', '.join(THP_MODES)} in []"
            )
        m.vm.thp_enabled = match[1]


def _cut(parts: list[Range], later: list[Resource]) -> tuple[list[Range], list[Range]]:
    """Split ranges of pages in those that were there at boot and those plugged in later."""
    early, added = [], []
    for start, end in parts:
        at = start
        for line in later:
            first, last = line.start >> PAGE_SHIFT, (line.end + 1) >> PAGE_SHIFT
            if first < end and at < last:
                if at < first:
                    early.append((at, first))
                added.append((max(at, first), min(end, last)))
                at = min(end, last)
        if at < end:
            early.append((at, end))
    return early, merge_ranges(added)


def _blocks(m: Machine, saved: SavedMachine, later: list[Resource]) -> None:
    """Create the block devices, and give each zone its pages, as the block files say."""
    known: list[tuple[int, int, int]] = []
    for key, parts in sorted(saved.ranges.items()):
        zone = m.nodes[key[0]].zone(ZONE_NAMES.index(key[1]))
        early, added = _cut(parts, later)
        known += [(start, end, zone.nid) for start, end in early]
        if early:
            mm_init.claim_ranges(m, zone, early)
        if added:
            mm_init.claim_ranges(m, zone, added, False)
    for block in saved.blocks:
        nid = block.nodes[0]
        zone_of = m.nodes[nid].zone(ZONE_NAMES.index(block.zone)) if block.zone else None
        m.memory_blocks[block.block_id] = MemoryBlock(
            block.block_id, block.state, nid, nodes=block.nodes, zone=zone_of
        )
        m.max_pfn = max(m.max_pfn, block.ram[-1][1])
        if block.state == "offline":
            early, _ = _cut(list(block.ram), later)
            known += [(start, end, nid) for start, end in early]
            mm_init.offline_block(m, block.block_id, nid, bool(early))
    if known:
        m.numa_meminfo = [(s << PAGE_SHIFT, e << PAGE_SHIFT, nid) for s, e, nid in sorted(known)]


def _zone(m: Machine, saved: SavedMachine, key: ZoneKey, files: Mapping[str, str]) -> None:
    def number(name: str, low: int = 0, high: int = NR_PAGES_MAX) -> int:
        return zone_number(saved.zones, key, name, low, high)

    zone = m.nodes[key[0]].zone(ZONE_NAMES.index(key[1]))
    # The kernel lets a zone span everything between its node's first and last page.
    zone.zone_start_pfn, zone.spanned_pages = number("start_pfn"), number("spanned")
    update_pgdat_span(m, m.nodes[zone.nid])
    zone.managed_pages = number("managed", 0, zone.present_pages)
    m.totalram_pages += zone.managed_pages
    boost = number("boost")
    zone.watermark_boost = boost
    zone.watermark_min = number("min", boost) - boost
    zone.watermark_low = number("low", boost + zone.watermark_min) - boost
    zone.watermark_high = number("high", boost + zone.watermark_low) - boost
    zone.lowmem_reserve = _protection(m, zone, saved.zones[key].get("protection", ""))
    zone.pageset_update(
        number("pageset high", 0, INT_MAX), number("pageset batch", 1, INT_MAX), True
    )
    zone.stat_threshold = number("vm stats threshold", 0, MAX_STAT_THRESHOLD)
    for name in saved.zones[key]:
        if name in ENGINE_NUMA_ITEMS:
            zone.vm_events = {name: number(name, 0, _COUNTER_MAX)}
        elif name in ZONE_STAT_ITEMS or name in NUMA_STAT_ITEMS:
            zone.vmstat[name] = number(name, 0, _COUNTER_MAX)
        elif name in NODE_STAT_ITEMS:
            # Kernels before 5.14 count some of them by zone.
            vmstat = m.nodes[zone.nid].vmstat
            vmstat[name] = vmstat.get(name, 0) + number(name, 0, _COUNTER_MAX)
    counts = freelists.parse_counts(files, zone) or [[0] * MAX_ORDER for _ in range(MIGRATE_TYPES)]
    blocks = freelists.parse_block_counts(files, zone)
    cached = pageset_counts(files["/proc/zoneinfo"], key)[: m.nr_cpus]
    freelists.lay_out(m, zone, saved.ranges[key], counts, blocks, cached)


def _protection(m: Machine, zone: Zone, text: str) -> list[int]:
    reserve = [0] * MAX_NR_ZONES
    for idx, word in zip(m.config.zones, re.findall(r"[0-9]+", text), strict=False):
        if len(word) > freelists.MAX_DIGITS:
            raise ConfigError(
                f"/proc/zoneinfo: node {zone.nid} zone {zone.name}: protection {shown(word)}; "
                f"allowed: numbers of pages"
            )
        reserve[idx] = int(word)
    return reserve


def _finish(m: Machine, files: Mapping[str, str]) -> None:
    mm_init.finish_nodes(m)
    if "kthreads" in files:
        m.kthreads = set(files["kthreads"].split())
    for nid in _online(files, len(m.nodes)):
        m.set_node_online(nid)
        m.node_devices.add(nid)
    m.vm.thp_available = m.totalram_pages >= THP_MIN_PAGES
    for nid in sorted(m.nodes):
        build_zonelists(m, m.nodes[nid])
    m.vm_total_pages = nr_free_zone_pages(m, ZONE_MOVABLE)
    register_boot_notifiers(m)
    hugetlb_init(m, fill=False)
    load_pools(m, files)
    load_tunables(m, files, VM)
    load_vm_events(m, files.get("/proc/vmstat", ""))
    load_numa_events(m, files)
    load_direct_map(m, files.get("/proc/meminfo", ""))
    calculate_totalreserve_pages(m)
    writeback_set_ratelimit(m)
    m.log.clear()
    m.uevents.clear()


def _check(m: Machine) -> None:
    # Texts that are well formed can still contradict each other.
    try:
        validate(m)
    except ValidationError as e:
        raise ConfigError(f"the files contradict each other: {str(e)[:200]}") from None
