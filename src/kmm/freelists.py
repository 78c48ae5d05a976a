"""Puts free blocks where a recorded machine may have had them.

Files tell how many free blocks of each order and migratetype a zone has, not where.  This
lays them out so that the counts are exact, no two of them would have merged, and what is in
use lies where a kernel puts it: at its image and at the top of the zone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kmm.errors import ConfigError, shown
from kmm.mm_init import mark_used
from kmm.mmzone import Zone
from kmm.params import (
    FILL_KERNEL,
    FILL_RESERVED,
    KERNEL_END,
    MAX_ORDER,
    MIGRATE_HIGHATOMIC,
    MIGRATE_MOVABLE,
    MIGRATE_TYPES,
    MIGRATETYPE_NAMES,
    PAGE_SHIFT,
    PAGEBLOCK_NR_PAGES,
)
from kmm.procfs import pageblock_counts

if TYPE_CHECKING:
    from kmm.machine import Machine

TOP = MAX_ORDER - 1
MAX_DIGITS = 12
Piece = tuple[int, int, bool]  # order, pfn, whether its buddy was handed out at this order


def parse_counts(files: Mapping[str, str], zone: Zone) -> list[list[int]] | None:
    """Return free blocks per migratetype and order from pagetypeinfo, else from buddyinfo.

    :return: None if neither file tells of the zone.
    :raises ConfigError: naming the file and the zone if it tells of more or fewer orders.
    """
    rows: dict[str, list[int]] = {}
    pattern = rf"Node +{zone.nid}, zone +{zone.name}, type +(\w+)((?: +>?[0-9]+)+) *$"
    for match in re.finditer(pattern, files.get("/proc/pagetypeinfo", ""), re.M):
        rows[match[1]] = _counts("/proc/pagetypeinfo", zone, match[2])
    if rows:
        return [rows.get(name, [0] * MAX_ORDER) for name in MIGRATETYPE_NAMES]
    match_ = re.search(
        rf"^Node +{zone.nid}, zone +{zone.name}((?: +[0-9]+)+) *$",
        files.get("/proc/buddyinfo", ""),
        re.M,
    )
    if not match_:
        return None
    out = [[0] * MAX_ORDER for _ in range(MIGRATE_TYPES)]
    out[MIGRATE_MOVABLE] = _counts("/proc/buddyinfo", zone, match_[1])
    return out


def _counts(path: str, zone: Zone, text: str) -> list[int]:
    words = [n.lstrip(">") for n in text.split()]
    if long := next((n for n in words if len(n) > MAX_DIGITS), ""):
        raise ConfigError(
            f"{path}: node {zone.nid} zone {zone.name}: {shown(long)}; allowed: counts of blocks"
        )
    counts = [int(n) for n in words]
    if len(counts) != MAX_ORDER:
        raise ConfigError(
            f"{path}: node {zone.nid} zone {zone.name}: {len(counts)} orders; allowed: {MAX_ORDER}"
        )
    return counts


def parse_block_counts(files: Mapping[str, str], zone: Zone) -> list[int] | None:
    """Return pageblocks per migratetype from pagetypeinfo, None if it does not tell."""
    match = re.search(
        rf"^Node {zone.nid}, zone +{zone.name}((?: +[0-9]{{1,12}}){{{MIGRATE_TYPES}}}) *$",
        files.get("/proc/pagetypeinfo", ""),
        re.M,
    )
    return [int(n) for n in match[1].split()] if match else None


def _pieces(ranges: list[tuple[int, int]]) -> list[Piece]:
    """Cut ranges of pages into the largest aligned blocks."""
    out: list[Piece] = []
    for start, end in ranges:
        pfn = start
        while pfn < end:
            order = TOP
            while order and (pfn & ((1 << order) - 1) or pfn + (1 << order) > end):
                order -= 1
            out.append((order, pfn, False))
            pfn += 1 << order
    return out


def _by_preference(pieces: list[Piece]) -> list[Piece]:
    """Order whole blocks: those between the kernel image and the top of the zone come first."""
    image_end = KERNEL_END >> PAGE_SHIFT
    return sorted(pieces, key=lambda p: (p[1] < image_end, p[1]))


def _take(pool: dict[int, list[Piece]], order: int) -> tuple[int, list[Piece]] | None:
    """Take a block of an order out of the pool; return its pfn and what is left of its piece."""
    for o in range(order, MAX_ORDER):
        for i, piece in enumerate(pool[o]):
            if o == order and piece[2]:
                continue
            del pool[o][i]
            pfn, left = piece[1], []
            while o > order:
                # Keep the lower half for later; the last one must not be handed out whole.
                o -= 1
                left.append((o, pfn, o == order))
                pfn += 1 << o
            return pfn, left
    return None


def lay_out(
    m: Machine,
    zone: Zone,
    ranges: list[tuple[int, int]],
    counts: list[list[int]],
    block_counts: list[int] | None,
) -> None:
    """Fill a zone's free lists with the given numbers of blocks and mark the rest used.

    :param ranges: the zone's pages (first pfn, pfn behind the last).
    :param counts: free blocks per migratetype and order.
    :param block_counts: pageblocks per migratetype, None if unknown.
    :raises ConfigError: if so many blocks do not fit into the zone.
    """
    pool: dict[int, list[Piece]] = {o: [] for o in range(MAX_ORDER)}
    for piece in _by_preference(_pieces(ranges)):
        pool[piece[0]].append(piece)
    for order in range(TOP, -1, -1):
        if order == TOP - 1:
            # Smaller blocks lie near the top, where the kernel allocates.
            for pieces in pool.values():
                pieces.sort(key=lambda p: -p[1])
        for mt in range(MIGRATE_TYPES):
            for _ in range(counts[mt][order]):
                found = _take(pool, order)
                if found is None:
                    raise ConfigError(
                        f"/proc/buddyinfo: node {zone.nid} zone {zone.name}: its free blocks of "
                        f"order {order} do not fit into its {zone.present_pages} pages"
                    )
                for piece in found[1]:
                    pool[piece[0]].append(piece)
                _place(m, zone, found[0], order, mt)
    used = sorted((pfn, 1 << o) for o, pieces in pool.items() for o, pfn, _ in pieces)
    _mark(m, zone, used)
    if block_counts is not None:
        _retype(m, zone, block_counts, used)
    have = pageblock_counts(m, zone)
    zone.nr_reserved_highatomic = have[MIGRATE_HIGHATOMIC] * PAGEBLOCK_NR_PAGES


def _place(m: Machine, zone: Zone, pfn: int, order: int, mt: int) -> None:
    for block in range(pfn, pfn + (1 << order), PAGEBLOCK_NR_PAGES):
        m.memmap_engine.set_pageblock_migratetype(block, mt)
    zone.add_free_block(pfn, order, mt)


def _mark(m: Machine, zone: Zone, used: list[tuple[int, int]]) -> None:
    reserved = zone.present_pages - zone.managed_pages
    for pfn, count in used:
        part = min(reserved, count)
        if part:
            mark_used(m, pfn, pfn + part, FILL_RESERVED)
        if part < count:
            mark_used(m, pfn + part, pfn + count, FILL_KERNEL)
        reserved -= part


def _retype(m: Machine, zone: Zone, want: list[int], used: list[tuple[int, int]]) -> None:
    """Give used pageblocks the types that the counts ask for."""
    missing = [w - h for w, h in zip(want, pageblock_counts(m, zone), strict=True)]
    for pfn, count in used:
        first = -(-pfn // PAGEBLOCK_NR_PAGES) * PAGEBLOCK_NR_PAGES
        for block in range(first, pfn + count - PAGEBLOCK_NR_PAGES + 1, PAGEBLOCK_NR_PAGES):
            have = m.memmap_engine.get_pageblock_migratetype(block)
            short = next((t for t, n in enumerate(missing) if n > 0), None)
            if short is None:
                return
            if missing[have] < 0:
                m.memmap_engine.set_pageblock_migratetype(block, short)
                missing[have] += 1
                missing[short] -= 1
