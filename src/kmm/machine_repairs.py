"""Mends the files of a real machine so that a machine can be built from them, and says how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kmm.config import MAX_NODES
from kmm.errors import ConfigError
from kmm.freelists import aligned_pieces
from kmm.machine_files import LSMEM, SYSCTL, Collected, names
from kmm.params import MAX_ORDER, MIGRATETYPE_NAMES, PAGE_SHIFT, parse_list
from kmm.saved_machine import MEMORY, NODE, ZoneKey, parse_saved
from kmm.wording import counted
from kmm.zoneinfo import parse_zoneinfo, zone_number

MODULE = "/sys/module/memory_hotplug/parameters/"
_ZONEINFO, _BUDDYINFO, _PAGETYPEINFO = "/proc/zoneinfo", "/proc/buddyinfo", "/proc/pagetypeinfo"
_OPTIONAL = re.compile(
    r"(/proc/(?!iomem\b|zoneinfo\b)[\w/-]+|/sys/module/[\w/-]+|/sys/kernel/[\w/-]+|"
    r"/sys/firmware/memmap/[0-9]+/\w+|/sys/devices/system/node/[\w/-]+|"
    r"/sys/devices/system/memory/(?:auto_online_blocks|memory[0-9]+/valid_zones)): "
)
_SIZES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(slots=True)
class Repairs:
    """Files to build from; where those that were not there come from; what was changed."""

    files: dict[str, str]
    derived: dict[str, str] = field(default_factory=dict)
    mended: list[tuple[str, str]] = field(default_factory=list)

    def derive(self, path: str, text: str, why: str) -> None:
        """Add a file that was not there."""
        self.files[path], self.derived[path] = text, why

    def leave_out(self, message: str) -> bool:
        """Drop the file that a message is about, if a machine can be built without."""
        match = _OPTIONAL.match(message)
        if not match:
            return False
        path = match[1]
        gone = [path] if path in self.files else []
        if path == _BUDDYINFO:
            gone = [p for p in (_BUDDYINFO, _PAGETYPEINFO) if p in self.files]
        elif path.startswith("/sys/firmware/memmap/"):
            gone = names(self.files, "sys/firmware/memmap/*/*")
        for name in gone:
            del self.files[name]
        if gone:
            self.mended.append((path, "left out: " + message.removeprefix(path + ": ")))
        return bool(gone)

    def set_present(self, zone: ZoneKey, present: int) -> None:
        """Give a zone as many pages as its memory blocks hold."""
        zones = parse_zoneinfo(self.files[_ZONEINFO])
        was = zone_number(zones, zone, "present")
        managed = min(zone_number(zones, zone, "managed"), present)
        for name, n in (("present", present), ("managed", managed)):
            self.files[_ZONEINFO] = _set_number(self.files[_ZONEINFO], zone, name, n)
        why = f"node {zone[0]} zone {zone[1]}: present {was} taken as {present}, as /proc/iomem has"
        self.mended.append((_ZONEINFO, why))

    def with_free_blocks(self) -> dict[str, str]:
        """Return the files; zones of whose free blocks none tells get the largest that fit."""
        text = self.files.get(_BUDDYINFO, "") + "\n" + self.files.get(_PAGETYPEINFO, "")
        told = {(int(n), z) for n, z in re.findall(r"^Node +([0-9]{1,4}), zone +(\w+)", text, re.M)}
        zones = parse_zoneinfo(self.files[_ZONEINFO])
        short = [key for key in zones if key not in told and zone_number(zones, key, "present")]
        if not short:
            return self.files
        ranges = parse_saved(self.files).ranges
        lines = [self.files.get(_BUDDYINFO, "")]
        for key in short:
            counts = [0] * MAX_ORDER
            left = min(zone_number(zones, key, "pages free"), zone_number(zones, key, "managed"))
            for order, _ in sorted(aligned_pieces(ranges.get(key, [])), reverse=True):
                while order and 1 << order > left:
                    order -= 1
                counts[order] += left > 0
                left -= min(left, 1 << order)
            lines.append(f"Node {key[0]}, zone {key[1]:>8} " + "".join(f"{n:6} " for n in counts))
        return self.files | {_BUDDYINFO: "\n".join(lines)}


def _set_number(text: str, zone: ZoneKey, name: str, value: int) -> str:
    head = rf"^Node {zone[0]}, zone +{zone[1]}\s*$"
    pattern = rf"({head}(?:(?!^Node )[\s\S])*?^ +{name} +)[0-9]+"
    return re.sub(pattern, rf"\g<1>{value}", text, count=1, flags=re.M)


def prepare(collected: Collected) -> Repairs:
    """Return what a machine can be built from, as far as that is known before it is tried.

    :raises ConfigError: if there are more nodes than kmm can have, or no text is understood.
    """
    repairs = Repairs(dict(collected.files))
    for path in collected.unreadable:
        # That the file is there may tell something; what is in it does not.
        repairs.files.pop(path, None)
    _block_devices(repairs, collected)
    _sysctls(repairs, collected)
    _possible_nodes(repairs)
    _memmap_on_memory(repairs)
    _migratetypes(repairs)
    return repairs


def check_page_size(files: dict[str, str]) -> None:
    """Refuse a machine whose pages are not of 4 KiB, which no file says outright.

    :raises ConfigError: naming the file and the size.
    """
    zones = parse_zoneinfo(files[_ZONEINFO])
    present = sum(zone_number(zones, key, "present") for key in zones)
    line = r"^ *([0-9a-f]{1,16})-([0-9a-f]{1,16}) : System RAM"
    ram = re.findall(line, files["/proc/iomem"], re.M)
    size = sum(int(end, 16) - int(start, 16) + 1 for start, end in ram)
    for shift in (14, 16):
        if present and 0.8 < size / (present << shift) < 1.25:
            raise ConfigError(
                f"{_ZONEINFO}: present: {present} pages for {size >> 20} MiB of System RAM, so "
                f"pages of {1 << shift >> 10} KiB; allowed: pages of {1 << PAGE_SHIFT >> 10} KiB"
            )


def _block_devices(repairs: Repairs, collected: Collected) -> None:
    """Take block devices from what lsmem printed, where their files were not saved."""
    if names(repairs.files, "sys/devices/system/memory/memory*/state"):
        return
    text = next((t for p, t in collected.commands.items() if p.startswith(LSMEM)), "")
    size = re.search(r"^Memory block size: +([0-9]{1,9})([BKMGT]?)\s*$", text, re.M)
    head = next((line.split() for line in text.split("\n") if line.startswith("RANGE")), [])
    if not size or "BLOCK" not in head or "STATE" not in head:
        return
    why = "what lsmem printed"
    block_size = int(size[1]) * _SIZES[size[2]]
    repairs.derive(MEMORY + "block_size_bytes", f"{block_size:x}", why)
    for line in text.split("\n"):
        row = dict(zip(head, line.split(), strict=False))
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", row.get("BLOCK", ""))
        if not match or not line.startswith("0x"):
            continue
        for block in range(
            int(match[1]), min(int(match[2] or match[1]), int(match[1]) + 99999) + 1
        ):
            base = f"{MEMORY}memory{block}/"
            repairs.derive(base + "state", row["STATE"], why)
            if zone := row.get("ZONES", "").replace("/", " ").replace("None", "none"):
                repairs.derive(base + "valid_zones", zone, why)
            if (nid := row.get("NODE", "")).isdecimal():
                repairs.derive(f"{base}node{int(nid)}", "link", why)


def _sysctls(repairs: Repairs, collected: Collected) -> None:
    """Take tunables from what sysctl -a printed, where their files were not saved."""
    if names(repairs.files, "proc/sys/vm/*"):
        return
    for path, text in collected.commands.items():
        if path.startswith(SYSCTL):
            for name, value in re.findall(r"^vm\.([a-z_-]+) = (.*)$", text, re.M):
                repairs.derive(f"/proc/sys/vm/{name}", value, "what sysctl -a printed")


def _nodes_of(files: Iterable[str]) -> set[int]:
    found = (re.match(NODE + r"node([0-9]{1,9})(?:/|$)", path) for path in files)
    links = (re.fullmatch(MEMORY + r"memory[0-9]+/node([0-9]{1,9})", path) for path in files)
    return {int(match[1]) for match in (*found, *links) if match}


def _possible_nodes(repairs: Repairs) -> None:
    """Find out which nodes there can be, where the file is missing or names more than kmm has."""
    path = NODE + "possible"
    zones = parse_zoneinfo(repairs.files[_ZONEINFO])
    last = max({nid for nid, _ in zones} | _nodes_of(list(repairs.files)), default=0)
    if last >= MAX_NODES:
        raise ConfigError(f"{_ZONEINFO}: node {last}; allowed: 0 to {MAX_NODES - 1}")
    wanted = f"0-{last}" if last else "0"
    if not repairs.files.get(path, "").strip():
        repairs.derive(path, wanted, f"nodes {wanted}, which other files name")
        return
    try:
        possible = parse_list(repairs.files[path], path)
    except ConfigError:
        possible = ()
    fits = possible and possible == tuple(range(len(possible))) and last <= possible[-1]
    if not fits or len(possible) > MAX_NODES:
        text = repairs.files[path].strip()[:80]
        repairs.files[path] = wanted
        repairs.mended.append((path, f"{text!r} taken as {wanted}, the nodes that are there"))


def _memmap_on_memory(repairs: Repairs) -> None:
    path = MODULE + "memmap_on_memory"
    if repairs.files.get(path, "").strip() == "force":
        repairs.files[path] = "Y"
        repairs.mended.append((path, "'force' (of 6.6 and later) taken as Y"))


def _migratetypes(repairs: Repairs) -> None:
    """Take types that 6.1's x86 build has not (CMA) as Movable; fill in counts above 100000."""
    text = repairs.files.get(_PAGETYPEINFO, "")
    kinds = re.search(r"^Number of blocks type((?: +\w+)+)", text, re.M)
    kinds_here = kinds[1].split() if kinds else list(MIGRATETYPE_NAMES)
    others = [k for k in kinds_here if k not in MIGRATETYPE_NAMES]
    if not others and ">" not in text:
        return
    lines = _merge_types(text.split("\n"), kinds_here, others)
    buddy = {
        match[1] + " " + match[2]: [int(n) for n in match[3].split()]
        for match in re.finditer(
            r"^Node +([0-9]+), zone +(\w+)((?: +[0-9]{1,12})+) *$",
            repairs.files.get(_BUDDYINFO, ""),
            re.M,
        )
    }
    lines, guessed = _uncap(lines, buddy)
    repairs.files[_PAGETYPEINFO] = "\n".join(lines)
    if others:
        why = f"pages and pageblocks of type {', '.join(others)} taken as Movable"
        repairs.mended.append((_PAGETYPEINFO, why))
    if guessed:
        why = f"{counted(guessed, 'count')} above 100000 taken as what /proc/buddyinfo leaves"
        repairs.mended.append((_PAGETYPEINFO, why))


_ROW = re.compile(r"(Node +([0-9]+), zone +(\w+), type +)(\w+)((?: +>?[0-9]{1,12})+) *$")
_BLOCKS = re.compile(r"(Node +[0-9]+, zone +\w+)((?: +[0-9]{1,12})+) *$")


def _sum(cells: Iterable[str], more: Iterable[str]) -> list[str]:
    """Add up two rows; a sum of which a part is cut off is so too."""
    return [
        ">100000" if ">" in a + b else str(int(a) + int(b))
        for a, b in zip(cells, more, strict=False)
    ]


def _merge_types(lines: list[str], kinds: list[str], others: list[str]) -> list[str]:
    extra: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if (match := _ROW.match(line)) and match[4] in others:
            cells = match[5].split()
            old = extra.get((match[2], match[3]), ["0"] * len(cells))
            extra[match[2], match[3]] = _sum(cells, old)
    out: list[str] = []
    for line in lines:
        if match := _ROW.match(line):
            if match[4] in others:
                continue
            more = extra.get((match[2], match[3]))
            if match[4] == "Movable" and more:
                line = f"{match[1]}Movable " + " ".join(_sum(match[5].split(), more))
        elif (match := _BLOCKS.match(line)) and len(match[2].split()) == len(kinds):
            n = dict(zip(kinds, map(int, match[2].split()), strict=True))
            n["Movable"] = n.get("Movable", 0) + sum(n[k] for k in others)
            line = match[1] + " " + " ".join(str(n.get(k, 0)) for k in MIGRATETYPE_NAMES)
        out.append(line)
    return out


def _uncap(lines: list[str], buddy: dict[str, list[int]]) -> tuple[list[str], int]:
    """Put numbers for what is cut off as ``>100000``; how many of them are not known for sure.

    The only one of its zone and order is what the other types leave of buddyinfo's count.
    """
    sums: dict[str, list[int]] = {}
    capped: Counter[tuple[str, int]] = Counter()
    for line in lines:
        if match := _ROW.match(line):
            key = f"{match[2]} {match[3]}"
            row = match[5].split()
            capped.update((key, order) for order, n in enumerate(row) if n.startswith(">"))
            cells = [0 if n.startswith(">") else int(n) for n in row]
            old = sums.get(key, [0] * len(cells))
            sums[key] = [a + b for a, b in zip(old, cells, strict=False)]
    out: list[str] = []
    guessed = 0
    left = capped.copy()
    for line in lines:
        match = _ROW.match(line)
        if match and ">" in match[5]:
            key = f"{match[2]} {match[3]}"
            cells_out = []
            for order, n in enumerate(match[5].split()):
                real = buddy.get(key, [])[order : order + 1]
                if n.startswith(">"):
                    rest = real[0] - sums[key][order] if real else 0
                    guessed += rest <= 100000 or capped[key, order] > 1
                    last = left[key, order] <= 1
                    # Others of the same order get what they are known to have.
                    n = str(max(rest, 100001) if last else 100001)
                    left[key, order] -= 1
                    sums[key][order] += int(n)
                cells_out.append(n)
            line = f"{match[1]}{match[4]} " + " ".join(cells_out)
        out.append(line)
    return out, guessed
