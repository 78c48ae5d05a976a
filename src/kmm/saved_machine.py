"""What the texts of a machine's /proc and /sys say of its memory, checked before it is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kmm.errors import ConfigError, shown
from kmm.params import (
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    NR_PAGES_MAX,
    PAGE_SHIFT,
    PHYSMEM_END,
    SECTION_SIZE,
    ZONE_MOVABLE,
    ZONE_NAMES,
    ZONE_NORMAL,
    parse_list,
)
from kmm.resource import ResourceTree, parse_iomem, walk_system_ram_range
from kmm.zoneinfo import ZoneTable, parse_zoneinfo, zone_number

MEMORY, NODE = "/sys/devices/system/memory/", "/sys/devices/system/node/"
REQUIRED = ("/proc/iomem", "/proc/zoneinfo")
# CONFIG_NODES_SHIFT of x86-64 goes up to 10.
MAX_NUMNODES = 1024


class Mismatch(ConfigError):
    """A zone has another number of pages than its memory blocks hold."""

    def __init__(self, zone: ZoneKey, present: int, have: int) -> None:
        super().__init__(
            f"/proc/zoneinfo: node {zone[0]} zone {zone[1]}: present {present}; /proc/iomem and "
            f"the memory blocks make it {have}"
        )
        self.zone, self.present, self.have = zone, present, have


Range = tuple[int, int]  # first pfn, pfn behind the last
ZoneKey = tuple[int, str]  # node, zone name


@dataclass(frozen=True, slots=True)
class SavedBlock:
    """A memory block device: its state, the nodes it is linked to, and its RAM."""

    block_id: int
    state: str
    nodes: tuple[int, ...]
    zone: str | None
    ram: tuple[Range, ...]


@dataclass(slots=True)
class SavedMachine:
    """The memory of a machine: resource tree, zones, blocks, and which pages each zone has."""

    zones: ZoneTable
    iomem: ResourceTree
    block_size: int
    nr_nodes: int
    blocks: list[SavedBlock] = field(default_factory=list)
    ranges: dict[ZoneKey, list[Range]] = field(default_factory=dict)

    @property
    def block_pages(self) -> int:
        """Pages of a memory block."""
        return self.block_size >> PAGE_SHIFT


def parse_saved(files: Mapping[str, str], nr_nodes: int | None = None) -> SavedMachine:
    """Read what files say of a machine's memory.

    :param files: path to text.
    :param nr_nodes: how many nodes there can be, None if the files tell.
    :raises ConfigError: naming the file, what is wrong in it and what is allowed.
    """
    for path, text in files.items():
        if not isinstance(path, str) or not isinstance(text, str):
            raise ConfigError(f"{path}: {shown(text)}; allowed: text")
    for path in REQUIRED:
        if not files.get(path, "").strip():
            raise ConfigError(f"{path}: missing; needed: {', '.join(REQUIRED)}")
    if nr_nodes is None:
        nr_nodes = _possible(files)
    zones = parse_zoneinfo(files["/proc/zoneinfo"])
    for nid, _ in zones:
        if nid >= nr_nodes:
            raise ConfigError(f"/proc/zoneinfo: node {nid}; allowed: 0 to {nr_nodes - 1}")
    saved = SavedMachine(zones, parse_iomem(files["/proc/iomem"]), _block_size(files), nr_nodes)
    ram = walk_system_ram_range(saved.iomem, 0, 1 << 52)
    if ram and ram[-1][0] + ram[-1][1] > NR_PAGES_MAX:
        last = ((ram[-1][0] + ram[-1][1]) << PAGE_SHIFT) - 1
        raise ConfigError(f"/proc/iomem: System RAM up to {last:#x}; allowed: to {PHYSMEM_END:#x}")
    links = _node_links(files, nr_nodes)
    for block_id in _block_ids(files, saved, ram):
        saved.blocks.append(_block(files, saved, block_id, links.get(block_id, [])))
    for block in saved.blocks:
        _assign(saved, block)
    for key, parts in saved.ranges.items():
        saved.ranges[key] = merge_ranges(parts)
    for nid in range(nr_nodes):
        for name in ZONE_NAMES:
            _check_zone(saved, (nid, name))
    return saved


def _possible(files: Mapping[str, str]) -> int:
    path = NODE + "possible"
    possible = parse_list(files.get(path, "0"), path)
    if not possible or possible != tuple(range(len(possible))) or len(possible) > MAX_NUMNODES:
        raise ConfigError(
            f"{path}: {shown(files[path].strip())}; allowed: nodes without a gap from 0 on, "
            f"up to {MAX_NUMNODES}"
        )
    return len(possible)


def _block_size(files: Mapping[str, str]) -> int:
    path = MEMORY + "block_size_bytes"
    text = files.get(path, "").strip() or f"{SECTION_SIZE:x}"
    size = int(text, 16) if re.fullmatch(r"[0-9a-fA-F]{1,16}", text) else 0
    if size & (size - 1) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
        raise ConfigError(
            f"{path}: {shown(text)}; allowed: a power of two from {MIN_BLOCK_SIZE:x} to "
            f"{MAX_BLOCK_SIZE:x}, hex digits"
        )
    return size


def _block_ids(
    files: Mapping[str, str], saved: SavedMachine, ram: list[tuple[int, int]]
) -> list[int]:
    found = (re.fullmatch(MEMORY + r"memory([0-9]{1,9})/state", path) for path in files)
    ids = sorted({int(match[1]) for match in found if match})
    size = saved.block_pages
    if not ids:
        # A kernel without memory hot-plug has no block devices; its RAM is online all the same.
        return sorted({b for p, n in ram for b in range(p // size, (p + n - 1) // size + 1)})
    if (ids[-1] + 1) * size > NR_PAGES_MAX:
        raise ConfigError(
            f"{MEMORY}memory{ids[-1]}: allowed: blocks up to memory{NR_PAGES_MAX // size - 1}"
        )
    return ids


def _node_links(files: Mapping[str, str], nr_nodes: int) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for path in files:
        match = re.fullmatch(MEMORY + r"memory([0-9]{1,9})/node([0-9]{1,9})", path)
        if match:
            if int(match[2]) >= nr_nodes:
                raise ConfigError(f"{path}: allowed: links to node0 to node{nr_nodes - 1}")
            out.setdefault(int(match[1]), []).append(int(match[2]))
    return out


def _block(
    files: Mapping[str, str], saved: SavedMachine, block_id: int, links: list[int]
) -> SavedBlock:
    base = f"{MEMORY}memory{block_id}/"
    state = files.get(base + "state", "online").strip()
    if state not in ("online", "offline"):
        raise ConfigError(f"{base}state: {shown(state)}; allowed: online, offline")
    word = (files.get(base + "valid_zones", "").split() or ["none"])[0]
    if word != "none" and word not in ZONE_NAMES:
        raise ConfigError(
            f"{base}valid_zones: {shown(word)}; allowed: none, {', '.join(ZONE_NAMES)}"
        )
    parts = walk_system_ram_range(saved.iomem, block_id * saved.block_pages, saved.block_pages)
    if not parts:
        raise ConfigError(f"/proc/iomem: no System RAM where memory{block_id} is")
    nids = tuple(sorted(set(links) or {nid for nid, _ in saved.zones}))
    zone = word if state == "online" and word in ZONE_NAMES else None
    return SavedBlock(block_id, state, nids, zone, tuple((p, p + n) for p, n in parts))


def _assign(saved: SavedMachine, block: SavedBlock) -> None:
    """Give the pages of an online block to the zones that they are in."""
    if block.state == "offline":
        return
    if block.zone is not None:
        saved.ranges.setdefault((block.nodes[0], block.zone), []).extend(block.ram)
        return
    for start, end in block.ram:
        _split_by_span(saved, block.nodes, start, end)


def _split_by_span(saved: SavedMachine, nids: tuple[int, ...], start: int, end: int) -> None:
    """Share a range of several zones out: by the zones' spans and the addresses they allow."""
    spans = []
    for (nid, name), _ in saved.zones.items():
        index = ZONE_NAMES.index(name)
        if nid in nids and index <= ZONE_MOVABLE:
            first = zone_number(saved.zones, (nid, name), "start_pfn")
            last = first + zone_number(saved.zones, (nid, name), "spanned")
            # A kernel zone whose addresses fit wins over Movable.
            spans.append(((index > ZONE_NORMAL, -index), first, last, (nid, name)))
    at = start
    while at < end:
        here = [s for s in spans if s[1] <= at < s[2]]
        if not here:
            at = min((s[1] for s in spans if s[1] > at), default=end)
            continue
        _, _, last, key = min(here)
        saved.ranges.setdefault(key, []).append((at, min(end, last)))
        at = min(end, last)


def merge_ranges(parts: list[Range]) -> list[Range]:
    """Return ranges in order, those that touch made one."""
    out: list[Range] = []
    for start, end in sorted(parts):
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def _check_zone(saved: SavedMachine, key: ZoneKey) -> None:
    parts = saved.ranges.get(key, [])
    present = zone_number(saved.zones, key, "present")
    have = sum(end - start for start, end in parts)
    if present != have:
        raise Mismatch(key, present, have)
    first = zone_number(saved.zones, key, "start_pfn")
    last = first + zone_number(saved.zones, key, "spanned")
    if parts and not first <= parts[0][0] < parts[-1][1] <= last:
        raise ConfigError(
            f"/proc/zoneinfo: node {key[0]} zone {key[1]}: start_pfn and spanned: {first} to "
            f"{last}; its pages lie from {parts[0][0]} to {parts[-1][1]}"
        )
