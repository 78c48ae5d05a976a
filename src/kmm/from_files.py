"""A machine from the texts of a real one's /proc and /sys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmm import boot, freelists, mm_init
from kmm.config import config_from_dict
from kmm.errors import ConfigError
from kmm.firmware import ram_layout
from kmm.memory_block import MemoryBlock
from kmm.memory_hotplug import update_pgdat_span
from kmm.mmzone import Zone
from kmm.notifiers import register_boot_notifiers
from kmm.params import (
    MIGRATE_TYPES,
    ONLINE_POLICIES,
    ONLINE_TYPES,
    PAGE_SHIFT,
    THP_MIN_PAGES,
    THP_MODES,
    ZONE_MOVABLE,
    ZONE_NAMES,
    ZONE_NORMAL,
    MachineConfig,
    NodeConfig,
    parse_list,
)
from kmm.procfs import NODE_STAT_ITEMS
from kmm.resource import parse_iomem, walk_system_ram_range
from kmm.vm_sysctl import load_tunables
from kmm.watermarks import calculate_totalreserve_pages, writeback_set_ratelimit
from kmm.zonelists import build_zonelists, nr_free_zone_pages

if TYPE_CHECKING:
    from kmm.machine import Machine

MEMORY, NODE = "/sys/devices/system/memory/", "/sys/devices/system/node/"
MODULE = "/sys/module/memory_hotplug/parameters/"
VM = "/proc/sys/vm/"
REQUIRED = ("/proc/iomem", "/proc/zoneinfo")

ZoneFields = dict[str, str]


_TREE = (
    "proc/iomem proc/zoneinfo proc/buddyinfo proc/pagetypeinfo proc/meminfo proc/cmdline "
    "proc/sys/vm/* sys/devices/system/memory/* sys/devices/system/memory/memory*/state "
    "sys/devices/system/memory/memory*/valid_zones sys/devices/system/memory/memory*/node* "
    "sys/devices/system/node/* sys/devices/system/node/node*/cpulist "
    "sys/devices/system/node/node*/distance sys/module/memory_hotplug/parameters/* "
    "sys/kernel/mm/transparent_hugepage/enabled"
).split()


def read_tree(root: str | os.PathLike[str] = "/") -> dict[str, str]:
    """Collect from a directory what Machine.from_files takes.

    :param root: ``/`` for the machine that this runs on, or a directory with a saved copy of
        its ``/proc`` and ``/sys``; links may be files there.
    :return: path to text; a link or directory has the text ``link``, and a file that exists but
        cannot be read, an empty one.
    :raises ConfigError: if the directory has none of the files.
    """
    base = Path(root)
    files: dict[str, str] = {}
    for pattern in _TREE:
        for path in sorted(base.glob(pattern)):
            name = "/" + str(path.relative_to(base))
            if path.is_symlink() or path.is_dir():
                files[name] = "link"
                continue
            try:
                files[name] = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
            except OSError:
                files[name] = ""
    if not files:
        raise ConfigError(f"{root}: no /proc and /sys files of a machine in it")
    return files


def parse_zoneinfo(text: str) -> dict[tuple[int, str], ZoneFields]:
    """Return the fields of each zone of a /proc/zoneinfo text.

    :raises ConfigError: if a line before the first zone, or a zone's name, is not understood.
    """
    out: dict[tuple[int, str], ZoneFields] = {}
    cur: ZoneFields | None = None
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"Node (\d+), zone +(\w+)\s*$", line)
        if head:
            if head[2] not in ZONE_NAMES:
                raise ConfigError(
                    f"/proc/zoneinfo: line {number}: zone {head[2]!r}; allowed: "
                    + ", ".join(ZONE_NAMES)
                )
            cur = out[int(head[1]), head[2]] = {}
            continue
        if cur is None:
            if line.strip():
                raise ConfigError(f"/proc/zoneinfo: line {number}: {line!r} before any zone")
            continue
        match = re.match(r"\s*(pages free|[\w ]+?):?\s+(\(.*\)|-?\d+)\s*$", line)
        if match:
            key = match[1].strip()
            # One CPU's figures stand for all: the kernel sets them alike.
            cur.setdefault(key if key != "high" or "high" not in cur else "pageset high", match[2])
    if not out:
        raise ConfigError("/proc/zoneinfo: no zone in it")
    return out


def config_from_files(files: Mapping[str, str]) -> MachineConfig:
    """Describe the machine that files come from as far as they tell."""
    possible = parse_list(files.get(NODE + "possible", "0"), NODE + "possible")
    nodes = []
    for nid in possible:
        cpus = parse_list(files.get(f"{NODE}node{nid}/cpulist", ""), f"{NODE}node{nid}/cpulist")
        nodes.append(NodeConfig(cpus))
    if not any(n.cpus for n in nodes):
        nodes[0] = NodeConfig((0,))
    zones = parse_zoneinfo(files["/proc/zoneinfo"])
    total = 0
    for (nid, _), z in zones.items():
        size = int(z.get("present", 0)) << PAGE_SHIFT
        nodes[nid] = NodeConfig(nodes[nid].cpus, nodes[nid].memory + size)
        total += size
    nr_cpus = max(cpu for n in nodes for cpu in n.cpus) + 1
    return MachineConfig(
        memory=total,
        maxmem=max(total * 4, 1 << 40),
        cpus=nr_cpus,
        nodes=tuple(nodes),
        distances=_distances(files, possible),
        srat="full",
        cmdline=files.get("/proc/cmdline", "").strip(),
    )


def _distances(files: Mapping[str, str], possible: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    online = parse_list(files.get(NODE + "online", ""), NODE + "online")
    matrix = [[10 if a == b else 20 for b in possible] for a in possible]
    for nid in online:
        text = files.get(f"{NODE}node{nid}/distance", "")
        for other, d in zip(online, text.split(), strict=False):
            if not d.isdigit():
                raise ConfigError(f"{NODE}node{nid}/distance: {d!r}; allowed: numbers")
            matrix[nid][other] = int(d)
    return tuple(tuple(row) for row in matrix)


def boot_from_files(
    m: Machine, files: Mapping[str, str], config: MachineConfig | Mapping[str, Any] | None
) -> None:
    """Build the machine that the texts describe (see Machine.from_files)."""
    for path in REQUIRED:
        if not files.get(path, "").strip():
            raise ConfigError(f"{path}: missing; needed: {', '.join(REQUIRED)}")
    if config is None:
        config = config_from_files(files)
    elif not isinstance(config, MachineConfig):
        config = config_from_dict(config)
    zones = parse_zoneinfo(files["/proc/zoneinfo"])
    first = next(iter(zones))[0]
    shown = tuple(ZONE_NAMES.index(name) for nid, name in zones if nid == first)
    config = replace(
        config,
        zones=shown,
        probe=MEMORY + "probe" in files,
        memory_failure=MEMORY + "soft_offline_page" in files,
        struct_page_size=_struct_page_size(files, zones),
    )
    m._prepare(config)
    m.iomem_resource = parse_iomem(files["/proc/iomem"])
    for start, end, kind in boot.e820(*ram_layout(config)):
        m.firmware_map_add(start, end, kind)
    boot.apply_cmdline(m)
    _parameters(m, files)
    _blocks(m, files, zones)
    for (nid, name), fields in zones.items():
        zone = m.nodes[nid].zone(ZONE_NAMES.index(name))
        if int(fields.get("present", 0)):
            _zone(m, zone, fields, files)
    _finish(m, files)


def _struct_page_size(files: Mapping[str, str], zones: dict[tuple[int, str], ZoneFields]) -> int:
    """Read off the first "Total pages" of the boot messages how large a memmap was reckoned.

    The kernel subtracts the memmap's pages there; more pages than 64 bytes each would leave
    mean a kernel without memory cgroups, whose struct page has 56.
    """
    match = re.search(r"Total pages: (\d+)", files.get("dmesg", ""))
    if not match:
        return 64
    left = 0
    for z in zones.values():
        present, spanned = int(z.get("present", 0)), int(z.get("spanned", 0))
        # Large holes have no memmap, so the kernel then reckons with the present pages.
        described = present if spanned > present + (present >> 4) else spanned
        left += present - -(-described * 64 // 4096)
    return 56 if int(match[1]) > left else 64


def _parameters(m: Machine, files: Mapping[str, str]) -> None:
    def text(path: str) -> str:
        return files.get(path, "").strip()

    try:
        size = int(text(MEMORY + "block_size_bytes") or "8000000", 16)
    except ValueError:
        value = text(MEMORY + "block_size_bytes")
        raise ConfigError(f"{MEMORY}block_size_bytes: {value!r}; allowed: hex digits") from None
    m.block_size = size
    if (word := text(MEMORY + "auto_online_blocks")) in ONLINE_TYPES:
        m.mhp_default_online_type = ONLINE_TYPES.index(word)
    if (word := text(MODULE + "online_policy")) in ONLINE_POLICIES:
        m.online_policy = word
    if (word := text(MODULE + "auto_movable_ratio")).isdigit():
        m.auto_movable_ratio = int(word)
    m.auto_movable_numa_aware = text(MODULE + "auto_movable_numa_aware") != "N"
    m.memmap_on_memory = text(MODULE + "memmap_on_memory") == "Y"
    if match := re.search(r"\[(\w+)\]", text("/sys/kernel/mm/transparent_hugepage/enabled")):
        m.vm.thp_enabled = match[1] if match[1] in THP_MODES else "always"


def _blocks(m: Machine, files: Mapping[str, str], zones: dict[tuple[int, str], ZoneFields]) -> None:
    """Create the block devices, and give each zone its pages, as the block files say."""
    ids = sorted(
        int(match[1]) for path in files if (match := re.match(MEMORY + r"memory(\d+)/state$", path))
    )
    if not ids:
        # A kernel without memory hot-plug has no block devices; its RAM is online all the same.
        ids = _blocks_with_ram(m)
    ranges: dict[int, list[tuple[int, int]]] = {}
    for block_id in ids:
        _block(m, files, zones, block_id, ranges)
    for index, parts in sorted(ranges.items()):
        mm_init.claim_ranges(m, m.all_zones()[index], _merge(parts))
    meminfo = []
    for zone in m.all_zones():
        for start, end in zone.early_ranges:
            meminfo.append((start << PAGE_SHIFT, end << PAGE_SHIFT, zone.nid))
            m.max_pfn = max(m.max_pfn, end)
    m.numa_meminfo = sorted(meminfo)


def _blocks_with_ram(m: Machine) -> list[int]:
    ram = boot.system_ram(m)
    size = m.block_pages
    return sorted({b for p, n in ram for b in range(p // size, (p + n - 1) // size + 1)})


def _merge(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def _block(
    m: Machine,
    files: Mapping[str, str],
    zones: dict[tuple[int, str], ZoneFields],
    block_id: int,
    ranges: dict[int, list[tuple[int, int]]],
) -> None:
    base = f"{MEMORY}memory{block_id}/"
    state = files.get(base + "state", "online").strip()
    if state not in ("online", "offline"):
        raise ConfigError(f"{base}state: {state!r}; allowed: online, offline")
    nids = tuple(
        sorted(int(match[1]) for path in files if (match := re.match(base + r"node(\d+)$", path)))
    ) or tuple(sorted({nid for nid, _ in zones}))
    block = m.memory_blocks[block_id] = MemoryBlock(block_id, state, nids[0], nodes=nids)

    ram = walk_system_ram_range(m.iomem_resource, block_id * m.block_pages, m.block_pages)
    if state == "offline":
        mm_init.offline_block(m, block_id, nids[0])
        return
    word = (files.get(base + "valid_zones", "").split() or ["none"])[0]
    if word in ZONE_NAMES:
        block.zone = m.nodes[nids[0]].zone(ZONE_NAMES.index(word))
        ranges.setdefault(block.zone.index, []).extend((p, p + n) for p, n in ram)
        return
    for pfn, count in ram:
        _split_by_span(m, zones, nids, pfn, pfn + count, ranges)


def _split_by_span(
    m: Machine,
    zones: dict[tuple[int, str], ZoneFields],
    nids: tuple[int, ...],
    start: int,
    end: int,
    ranges: dict[int, list[tuple[int, int]]],
) -> None:
    """Share a block of several zones out: by the zones' spans and the addresses they allow."""
    at = start
    while at < end:
        best: tuple[int, int, int] | None = None
        for (nid, name), z in zones.items():
            idx = ZONE_NAMES.index(name)
            first = int(z.get("start_pfn", 0))
            last = first + int(z.get("spanned", 0))
            if nid in nids and first <= at < last and idx <= ZONE_MOVABLE:
                # A kernel zone whose addresses fit wins over Movable.
                rank = (idx > ZONE_NORMAL, -idx)
                if best is None or rank < (best[0] > ZONE_NORMAL, -best[0]):
                    best = (idx, nid, last)
        if best is None:
            at += 1
            continue
        stop = min(end, best[2])
        ranges.setdefault(m.nodes[best[1]].zone(best[0]).index, []).append((at, stop))
        at = stop


def _zone(m: Machine, zone: Zone, fields: ZoneFields, files: Mapping[str, str]) -> None:
    def number(key: str) -> int:
        return int(fields.get(key, 0))

    if number("present") != zone.present_pages:
        raise ConfigError(
            f"/proc/zoneinfo: node {zone.nid} zone {zone.name}: present {number('present')}; "
            f"/proc/iomem and the memory blocks make it {zone.present_pages}"
        )
    # The kernel lets a zone span everything between its node's first and last page.
    zone.zone_start_pfn, zone.spanned_pages = number("start_pfn"), number("spanned")
    update_pgdat_span(m, m.nodes[zone.nid])
    zone.managed_pages = number("managed")
    m.totalram_pages += zone.managed_pages
    boost = number("boost")
    zone.watermark_boost = boost
    zone.watermark_min = number("min") - boost
    zone.watermark_low = number("low") - boost
    zone.watermark_high = number("high") - boost
    numbers = [int(n) for n in re.findall(r"\d+", fields.get("protection", ""))]
    reserve = [0] * 5
    for idx, value in zip(m.config.zones, numbers, strict=False):
        reserve[idx] = value
    zone.lowmem_reserve = reserve
    zone.pageset_update(number("pageset high"), max(number("batch"), 1), True)
    zone.stat_threshold = number("vm stats threshold")
    for key in fields:
        if key.startswith(("nr_zone_", "numa_")) or key in ("nr_mlock", "nr_bounce", "nr_zspages"):
            zone.vmstat[key] = number(key)
        elif key in NODE_STAT_ITEMS:
            m.nodes[zone.nid].vmstat[key] = number(key)
    counts = freelists.parse_counts(files, zone) or [[0] * 11 for _ in range(MIGRATE_TYPES)]
    freelists.lay_out(m, zone, counts, freelists.parse_block_counts(files, zone))


def _finish(m: Machine, files: Mapping[str, str]) -> None:
    mm_init.finish_nodes(m)
    if "kthreads" in files:
        m.kthreads = set(files["kthreads"].split())
    for nid in parse_list(files.get(NODE + "online", ""), NODE + "online"):
        m.n_online.add(nid)
        m.node_devices.add(nid)
    m.vm.thp_available = m.totalram_pages >= THP_MIN_PAGES
    for nid in sorted(m.nodes):
        build_zonelists(m, m.nodes[nid])
    m.vm_total_pages = nr_free_zone_pages(m, ZONE_MOVABLE)
    register_boot_notifiers(m)
    load_tunables(m, files, VM)
    calculate_totalreserve_pages(m)
    writeback_set_ratelimit(m)
    m.log.clear()
    m.uevents.clear()
