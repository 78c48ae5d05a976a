"""Puts free blocks where a recorded machine may have had them.

Files tell how many free blocks of each order and migratetype a zone has, not where.  This
lays them out so that the counts are exact, no two of them would have merged, and what is in
use lies where a kernel puts it: what was never free at its image and at the top of the zone,
what was taken since boot from the bottom of the zone upward.
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
    KERNEL_START,
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
LOW_MEMORY_END = 0x100  # pfn of 1 MiB; nothing below it is ever handed out at boot
MAX_DIGITS = 12
Piece = tuple[int, int, bool]  # order, pfn, whether its buddy was handed out at this order
Pool = dict[int, list[Piece]]  # by order


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


def _never_free(pfn: int) -> bool:
    """Whether a page is one that boot keeps for good at its place: low memory, the image."""
    image = KERNEL_START >> PAGE_SHIFT <= pfn < KERNEL_END >> PAGE_SHIFT
    return image or pfn < LOW_MEMORY_END


def _by_preference(pieces: list[Piece]) -> list[Piece]:
    """Order whole blocks as boot hands them out: upward, what was never free last."""
    return sorted(pieces, key=lambda p: (_never_free(p[1]), p[1]))


def _pool(pieces: list[Piece]) -> Pool:
    pool: Pool = {o: [] for o in range(MAX_ORDER)}
    for piece in pieces:
        pool[piece[0]].append(piece)
    return pool


def _pools(ranges: list[tuple[int, int]], used: int) -> tuple[Pool, Pool, int]:
    """Cut a zone's ranges into the pieces where its used pages lie, and the others.

    Boot gives the lowest chunk to the head of the free list, so that the first page that
    the kernel takes is the zone's lowest, and later ones follow upward.

    :param used: pages handed out since boot.
    :return: both pools, and how many pages of the first are not in use.
    """
    pieces = _by_preference(_pieces(ranges))
    count = size = 0
    while size < used and count < len(pieces):
        size += 1 << pieces[count][0]
        count += 1
    return _pool(pieces[:count]), _pool(pieces[count:]), size - used


def _take(pool: Pool, order: int) -> int | None:
    """Take a block of an order out of the pool; return its pfn."""
    for o in range(order, MAX_ORDER):
        for i, piece in enumerate(pool[o]):
            if o == order and piece[2]:
                continue
            del pool[o][i]
            pfn = piece[1]
            while o > order:
                # Keep the lower half for later; the last one must not be handed out whole.
                o -= 1
                pool[o].append((o, pfn, o == order))
                pfn += 1 << o
            return pfn
    return None


def _choose(bottom: Pool, rest: Pool, order: int, spare: int) -> tuple[int | None, int]:
    """Take a block where one of its size would be left over; return its pfn and what is spare.

    :param spare: pages of ``bottom`` that are not in use.
    """
    if order < TOP and 1 << order <= spare and (pfn := _take(bottom, order)) is not None:
        return pfn, spare - (1 << order)
    if (pfn := _take(rest, order)) is not None:
        return pfn, spare
    return _take(bottom, order), spare - (1 << order)


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
    free = sum(n << order for row in counts for order, n in enumerate(row))
    bottom, rest, spare = _pools(ranges, max(0, zone.managed_pages - free))
    for order in range(TOP, -1, -1):
        if order == TOP - 1:
            # Smaller blocks are what is left at the ends: behind the used pages, below the top.
            for pieces in (*bottom.values(), *rest.values()):
                pieces.sort(key=lambda p: -p[1])
        for mt in range(MIGRATE_TYPES):
            for _ in range(counts[mt][order]):
                pfn, spare = _choose(bottom, rest, order, spare)
                if pfn is None:
                    raise ConfigError(
                        f"/proc/buddyinfo: node {zone.nid} zone {zone.name}: its free blocks of "
                        f"order {order} do not fit into its {zone.present_pages} pages"
                    )
                _place(m, zone, pfn, order, mt)
    left = [p for pool in (bottom, rest) for pieces in pool.values() for p in pieces]
    used = sorted((_never_free(pfn), pfn, 1 << o) for o, pfn, _ in left)
    _mark(m, zone, used)
    if block_counts is not None:
        _retype(m, zone, block_counts, [(pfn, count) for _, pfn, count in used])
    have = pageblock_counts(m, zone)
    zone.nr_reserved_highatomic = have[MIGRATE_HIGHATOMIC] * PAGEBLOCK_NR_PAGES


def _place(m: Machine, zone: Zone, pfn: int, order: int, mt: int) -> None:
    for block in range(pfn, pfn + (1 << order), PAGEBLOCK_NR_PAGES):
        m.memmap_engine.set_pageblock_migratetype(block, mt)
    zone.add_free_block(pfn, order, mt)


def _mark(m: Machine, zone: Zone, used: list[tuple[bool, int, int]]) -> None:
    """Mark what is in use: reserved where it was never free, then from the top down."""
    reserved = max(0, zone.present_pages - zone.managed_pages)
    for _, pfn, count in sorted(used, reverse=True):
        part = min(reserved, count)
        cut = pfn + count - part
        mark_used(m, pfn, cut, FILL_KERNEL)
        mark_used(m, cut, pfn + count, FILL_RESERVED)
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
