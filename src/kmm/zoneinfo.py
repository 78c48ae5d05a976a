"""Reads the text of /proc/zoneinfo."""

from __future__ import annotations

import re

from kmm.errors import ConfigError, shown
from kmm.params import NR_PAGES_MAX, ZONE_NAMES

PATH = "/proc/zoneinfo"

MAX_LINE = 200  # the kernel's own lines are shorter

ZoneFields = dict[str, str]
ZoneTable = dict[tuple[int, str], ZoneFields]

_HEAD = re.compile(r"Node ([0-9]{1,4}), zone +(\w+)\s*$")
_CPU = re.compile(r" +cpu: ([0-9]{1,4})\s*$")
_COUNT = re.compile(r" +count: ([0-9]{1,10})\s*$")
_FIELD = re.compile(r"\s*(pages free|[\w ]+?):?\s+(\(.*\)|-?[0-9]{1,20})\s*$")


def zone_table(text: str) -> ZoneTable:
    """Return the fields of each zone of a zoneinfo text, by node and zone name.

    Fields of the per-CPU lists have the prefix ``pageset``; the first CPU's figures stand for
    all, which the kernel sets alike.  What is not understood is left out.
    """
    out: ZoneTable = {}
    cur: ZoneFields | None = None
    in_pagesets = False
    for line in text.split("\n"):
        if head := _HEAD.match(line):
            cur, in_pagesets = out.setdefault((int(head[1]), head[2]), {}), False
        elif cur is None:
            continue
        elif line.strip() == "pagesets":
            in_pagesets = True
        elif len(line) <= MAX_LINE and (match := _FIELD.match(line)):
            key = match[1].strip()
            if in_pagesets and key in ("high", "batch", "count"):
                key = "pageset " + key
            cur.setdefault(key, match[2])
    return out


def parse_zoneinfo(text: str) -> ZoneTable:
    """Return the fields of each zone of a whole, well-formed zoneinfo text.

    :raises ConfigError: if a line before the first zone, or a zone's name, is not understood, or
        there is no zone.
    """
    seen = False
    for number, line in enumerate(text.split("\n"), 1):
        head = _HEAD.match(line)
        if head and head[2] not in ZONE_NAMES:
            allowed = ", ".join(ZONE_NAMES)
            raise ConfigError(f"{PATH}: line {number}: zone {shown(head[2])}; allowed: {allowed}")
        seen = seen or head is not None
        if not seen and line.strip():
            raise ConfigError(f"{PATH}: line {number}: {shown(line)} before any zone")
    if not seen:
        raise ConfigError(f"{PATH}: no zone in it; allowed: lines like 'Node 0, zone   Normal'")
    return zone_table(text)


def pageset_counts(text: str, zone: tuple[int, str]) -> list[int]:
    """Return how many pages each CPU's lists of a zone hold, by number of the CPU.

    :param text: of the whole file; zone: node and zone name.
    """
    out: list[int] = []
    here, cpu = False, -1
    for line in text.split("\n"):
        if head := _HEAD.match(line):
            here, cpu = (int(head[1]), head[2]) == zone, -1
        elif here and (match := _CPU.match(line)):
            cpu = int(match[1])
        elif here and cpu >= 0 and (match := _COUNT.match(line)):
            out += [0] * (cpu + 1 - len(out))
            out[cpu] = int(match[1])
    return out


def zone_number(
    table: ZoneTable, zone: tuple[int, str], key: str, low: int = 0, high: int = NR_PAGES_MAX
) -> int:
    """Return a number of a zone's; one that is not shown is 0, or the lowest allowed.

    :param zone: node and zone name; low, high: what is allowed, inclusive.
    :raises ConfigError: naming the zone, the field, its value and what is allowed.
    """
    text = table.get(zone, {}).get(key)
    if text is None:
        return max(low, 0)
    if text.startswith("(") or not low <= int(text) <= high:
        raise ConfigError(
            f"{PATH}: node {zone[0]} zone {zone[1]}: {key} {shown(text)}; "
            f"allowed: a number from {low} to {high}"
        )
    return int(text)
