"""Tells the RAM that a saved machine had at boot from what was plugged in later.

/sys/firmware/memmap decides where it was saved: the map that firmware handed over comes first,
in address order and with its kinds mixed, and every hot-add appends an entry "System RAM".  What
it leaves open, or all if it is absent, is taken from /proc/iomem by these rules.  A line with
another name than "System RAM" was added by a driver.  A line was plugged in later if it is made
of whole memory blocks, has nothing in it, and either touches the line before it (boot would have
made one of the two) or is in no zone that keeps pages for itself (boot takes the memmap, at
least, from a node's own memory) but for a lower line of that zone.  So a Movable zone that
movable_node made at boot is taken for plugged in if there is no firmware map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kmm.errors import ConfigError, shown
from kmm.params import PAGE_SHIFT, PAGE_SIZE
from kmm.resource import IORESOURCE_BUSY, IORESOURCE_SYSTEM_RAM, Resource, ResourceTree
from kmm.saved_machine import Range, SavedMachine
from kmm.zoneinfo import zone_number

MEMMAP = "/sys/firmware/memmap/"
RAM = "System RAM"
FIRMWARE_KINDS = (RAM, "Reserved", "ACPI Tables", "ACPI Non-volatile Storage", "Unusable memory")

Entry = tuple[int, int, str]  # first byte, last byte, kind


def parse_memmap(files: Mapping[str, str]) -> dict[int, Entry]:
    """Return the entries of /sys/firmware/memmap by number; none if it was not saved.

    :raises ConfigError: naming the file, its value and what is allowed.
    """
    numbers = set()
    for path in files:
        if match := re.fullmatch(MEMMAP + r"([0-9]{1,9})/(?:start|end|type)", path):
            numbers.add(int(match[1]))
    out = {}
    for number in sorted(numbers):
        ends = []
        for name in ("start", "end"):
            path = f"{MEMMAP}{number}/{name}"
            text = files.get(path, "").strip()
            if not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text):
                raise ConfigError(f"{path}: {shown(text)}; allowed: a number like 0x100000000")
            ends.append(int(text, 16))
        out[number] = (ends[0], ends[1], files.get(f"{MEMMAP}{number}/type", "").strip())
    return out


def split_memmap(entries: Mapping[int, Entry]) -> tuple[list[Entry], list[Entry]]:
    """Return the entries that are surely firmware's, and those that are surely hot-added.

    RAM at the end of the list that firmware could have listed too is in neither.
    """
    ordered = sorted(entries.items())
    kinds = [i for i, (_, entry) in enumerate(ordered) if entry[2] != RAM]
    sure = kinds[-1] + 1 if kinds else min(1, len(ordered))
    added = len(ordered)
    for i in range(sure, len(ordered)):
        (before, last), (number, entry) = ordered[i - 1], ordered[i]
        # Firmware's entries are in order, one number after the other, neighbours made one.
        joined = last[2] == RAM and entry[0] == last[1] + 1
        if number != before + 1 or entry[0] <= last[0] or joined:
            added = i
            break
    return [e for _, e in ordered[:sure]], [e for _, e in ordered[added:]]


def ram_lines(tree: ResourceTree) -> list[Resource]:
    """Return the busy System RAM of a resource tree in address order, without what is in it."""
    wanted = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY
    return [r for _, r in tree.walk() if r.flags & wanted == wanted and r.name.startswith(RAM)]


def added_later(
    saved: SavedMachine, entries: Mapping[int, Entry], boot: list[Range], vmemmap_pages: int
) -> list[Resource]:
    """Return the lines of /proc/iomem that were plugged in after boot.

    :param boot: RAM that is known to be boot's, as far as it is (pfns).
    :param vmemmap_pages: pages at the begin of each block that may hold its memmap.
    """
    firmware, hot = split_memmap(entries)
    lines = ram_lines(saved.iomem)
    out: list[Resource] = []
    for i, line in enumerate(lines):
        if line.name != RAM or _meets(line, hot):
            out.append(line)
        elif _meets(line, firmware) or any(
            line.start < end << PAGE_SHIFT and start << PAGE_SHIFT <= line.end
            for start, end in boot
        ):
            continue
        elif _looks_added(saved, lines[:i], line, vmemmap_pages):
            out.append(line)
    return out


def _meets(line: Resource, entries: list[Entry]) -> bool:
    return any(line.overlaps(s, e) for s, e, kind in entries if kind == RAM)


def _looks_added(
    saved: SavedMachine, before: list[Resource], line: Resource, vmemmap_pages: int
) -> bool:
    if line.start % saved.block_size or (line.end + 1) % saved.block_size or line.children:
        return False
    if before and before[-1].end + 1 == line.start:
        return True
    for key, parts in saved.ranges.items():
        mine = [p for p in parts if p[0] << PAGE_SHIFT <= line.end and _start(line) < p[1]]
        if not mine:
            continue
        present = zone_number(saved.zones, key, "present")
        kept = present - zone_number(saved.zones, key, "managed")
        if kept > present // saved.block_pages * vmemmap_pages and parts[0] == mine[0]:
            return False
    return True


def _start(line: Resource) -> int:
    return line.start // PAGE_SIZE


def firmware_map(tree: ResourceTree, later: list[Resource]) -> list[Entry]:
    """Return a map that firmware may have handed over, as /proc/iomem shows it."""
    return [
        (r.start, r.end, r.name)
        for depth, r in tree.walk()
        if r.name in FIRMWARE_KINDS and depth == 0 and r not in later
    ]
