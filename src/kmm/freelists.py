"""Puts free blocks where a recorded machine may have had them.

Files tell how many free blocks of each order and migratetype a zone has, not where.  This
lays them out so that the counts are exact, no two of them would have merged, and what is in
use lies where a kernel puts it: what was never free at its image and at the top of the zone,
what was taken since boot from the bottom of the zone upward.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kmm.errors import ConfigError, shown
from kmm.mm_init import mark_used
from kmm.mmzone import Zone
from kmm.page_alloc import __free_pages
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
    STATE_ALLOCATED,
)
from kmm.procfs import LOW_MEMORY_END, pageblock_counts
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

TOP = MAX_ORDER - 1
MAX_DIGITS = 12
Piece = tuple[int, int]  # order, pfn
Used = tuple[bool, int, int]  # whether it was never free, pfn, pages


class Pool:
    """Blocks to be handed out, first come, first served; halves are those whose buddy has gone."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._ranks = itertools.count(1)
        # By order: (rank, pfn); the lower rank goes first.
        self._whole: list[deque[tuple[int, int]]] = [deque() for _ in range(MAX_ORDER)]
        self._halves: list[deque[tuple[int, int]]] = [deque() for _ in range(MAX_ORDER)]
        for order, pfn in pieces:
            self._whole[order].append((next(self._ranks), pfn))

    def take(self, order: int) -> int | None:
        """Take a block of an order out of the pool, but no half; return its pfn."""
        for o in range(order, MAX_ORDER):
            whole, halves = self._whole[o], self._halves[o]
            if o > order and halves and (not whole or halves[0] < whole[0]):
                _, pfn = halves.popleft()
            elif whole:
                _, pfn = whole.popleft()
            else:
                continue
            while o > order:
                # Keep the lower half for later; the last one must not be handed out whole.
                o -= 1
                kept = self._halves if o == order else self._whole
                kept[o].append((next(self._ranks), pfn))
                pfn += 1 << o
            return pfn
        return None

    def sort_downward(self) -> None:
        """Hand the highest of the blocks that are left out first."""
        for queues in (self._whole, self._halves):
            for i, queue in enumerate(queues):
                queues[i] = deque(sorted((-pfn, pfn) for _, pfn in queue))

    def pieces(self) -> list[Piece]:
        """Return what is left."""
        queues = [*enumerate(self._whole), *enumerate(self._halves)]
        return [(order, pfn) for order, queue in queues for _, pfn in queue]


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


def aligned_pieces(ranges: list[tuple[int, int]]) -> list[Piece]:
    """Cut ranges of pages into the largest aligned blocks."""
    out: list[Piece] = []
    for start, end in ranges:
        pfn = start
        while pfn < end:
            order = TOP
            while order and (pfn & ((1 << order) - 1) or pfn + (1 << order) > end):
                order -= 1
            out.append((order, pfn))
            pfn += 1 << order
    return out


def _never_free(pfn: int) -> bool:
    """Whether a page is one that boot keeps for good at its place: below 1 MiB, the image."""
    image = KERNEL_START >> PAGE_SHIFT <= pfn < KERNEL_END >> PAGE_SHIFT
    return image or pfn < LOW_MEMORY_END


def _by_preference(pieces: list[Piece]) -> list[Piece]:
    """Order whole blocks as boot hands them out: upward, what was never free last."""
    return sorted(pieces, key=lambda p: (_never_free(p[1]), p[1]))


def _pools(ranges: list[tuple[int, int]], used: int) -> tuple[Pool, Pool, int]:
    """Cut a zone's ranges into the pieces where its used pages lie, and the others.

    Boot gives the lowest chunk to the head of the free list, so that the first page that
    the kernel takes is the zone's lowest, and later ones follow upward.

    :param used: pages handed out since boot.
    :return: both pools, and how many pages of the first are not in use.
    """
    pieces = _by_preference(aligned_pieces(ranges))
    count = size = 0
    while size < used and count < len(pieces):
        size += 1 << pieces[count][0]
        count += 1
    return Pool(pieces[:count]), Pool(pieces[count:]), size - used


def _choose(bottom: Pool, rest: Pool, order: int, spare: int) -> tuple[int | None, int]:
    """Take a block where one of its size would be left over; return its pfn and what is spare.

    :param spare: pages of ``bottom`` that are not in use.
    """
    if order < TOP and 1 << order <= spare and (pfn := bottom.take(order)) is not None:
        return pfn, spare - (1 << order)
    if (pfn := rest.take(order)) is not None:
        return pfn, spare
    return bottom.take(order), spare - (1 << order)


def lay_out(
    m: Machine,
    zone: Zone,
    ranges: list[tuple[int, int]],
    counts: list[list[int]],
    block_counts: list[int] | None,
    cached: Sequence[int] = (),
) -> None:
    """Fill a zone's free lists with the given numbers of blocks and mark the rest used.

    :param ranges: the zone's pages (first pfn, pfn behind the last).
    :param counts: free blocks per migratetype and order.
    :param block_counts: pageblocks per migratetype, None if unknown.
    :param cached: pages on the lists of each CPU; as many are there as the used ones allow.
    :raises ConfigError: if so many blocks do not fit into the zone.
    """
    free = sum(n << order for row in counts for order, n in enumerate(row))
    _check_room(zone, counts)
    bottom, rest, spare = _pools(ranges, max(0, zone.managed_pages - free))
    for order in range(TOP, -1, -1):
        if order == TOP - 1:
            # Smaller blocks are what is left at the ends: behind the used pages, below the top.
            bottom.sort_downward()
            rest.sort_downward()
        for mt in range(MIGRATE_TYPES):
            for _ in range(counts[mt][order]):
                pfn, spare = _choose(bottom, rest, order, spare)
                if pfn is None:
                    raise _no_room(zone, order)
                _place(m, zone, pfn, order, mt)
    left = bottom.pieces() + rest.pieces()
    used = sorted((_never_free(pfn), pfn, 1 << o) for o, pfn in left)
    marked, pages = _cut_cached(zone, used, sum(cached))
    _mark(m, zone, marked)
    if block_counts is not None:
        _retype(m, zone, block_counts, [(pfn, count) for _, pfn, count in used])
    _fill_pagesets(m, zone, pages, cached)
    have = pageblock_counts(m, zone)
    zone.nr_reserved_highatomic = have[MIGRATE_HIGHATOMIC] * PAGEBLOCK_NR_PAGES


def _check_room(zone: Zone, counts: list[list[int]]) -> None:
    """Refuse more blocks than there is room for before they are laid out one by one."""
    room = zone.present_pages
    for order in range(TOP, -1, -1):
        room -= sum(row[order] for row in counts) << order
        if room < 0:
            raise _no_room(zone, order)


def _no_room(zone: Zone, order: int) -> ConfigError:
    return ConfigError(
        f"/proc/buddyinfo: node {zone.nid} zone {zone.name}: its free blocks of "
        f"order {order} do not fit into its {counted(zone.present_pages, 'page')}"
    )


def _place(m: Machine, zone: Zone, pfn: int, order: int, mt: int) -> None:
    for block in range(pfn, pfn + (1 << order), PAGEBLOCK_NR_PAGES):
        m.memmap_engine.set_pageblock_migratetype(block, mt)
    zone.add_free_block(pfn, order, mt)


def _mark(m: Machine, zone: Zone, used: list[Used]) -> None:
    """Mark what is in use: reserved where it was never free, then from the top down."""
    reserved = max(0, zone.present_pages - zone.managed_pages)
    for _, pfn, count in sorted(used, reverse=True):
        part = min(reserved, count)
        cut = pfn + count - part
        mark_used(m, pfn, cut, FILL_KERNEL)
        mark_used(m, cut, pfn + count, FILL_RESERVED)
        reserved -= part


def _cut_cached(zone: Zone, used: list[Used], count: int) -> tuple[list[Used], list[int]]:
    """Take pages for per-CPU lists from those in use that were free once, the last of them."""
    reserved = max(0, zone.present_pages - zone.managed_pages)
    kept: list[Used] = []
    pages: list[int] = []
    for never_free, pfn, nr in reversed(used):
        stay = min(reserved, nr)
        reserved -= stay
        take = 0 if never_free else min(count, nr - stay)
        count -= take
        end = pfn + nr - stay
        pages += range(end - take, end)
        kept += [(never_free, at, n) for at, n in ((end, stay), (pfn, nr - stay - take)) if n]
    return sorted(kept), pages


def _fill_pagesets(m: Machine, zone: Zone, pages: list[int], cached: Sequence[int]) -> None:
    """Put single pages on the lists of the CPUs, without counting them as freed."""
    zone.pageset_update(len(pages) + 1, 1, False)
    left = iter(pages)
    for cpu, count in enumerate(cached):
        for pfn in itertools.islice(left, count):
            m.memmap_engine.set_page_flags(pfn, 0)
            m.page_states[pfn] = STATE_ALLOCATED
            __free_pages(m, pfn, 0, cpu)
    zone.pageset_update(zone.pageset_high, zone.pageset_batch, False)
    zone.vm_events = {"pgfree": 0}


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
