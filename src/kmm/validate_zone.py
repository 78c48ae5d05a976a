"""Recounts of one zone: its pages, lists, watermarks and reserves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from kmm import procfs
from kmm._recount import taken_pages
from kmm.errors import ValidationError
from kmm.mmzone import Zone
from kmm.params import (
    FILL_KERNEL,
    MAX_NR_ZONES,
    MAX_ORDER,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    MIGRATETYPE_NAMES,
    PAGEBLOCK_NR_PAGES,
    ZONE_DEVICE,
    ZONE_MOVABLE,
)
from kmm.resource import walk_system_ram_range
from kmm.sparse import SECTION_IS_EARLY, SECTION_IS_ONLINE

if TYPE_CHECKING:
    from kmm.machine import Machine

PCP_LISTS = 14
_PART = 1 << 18  # pageblocks that are looked at in one go, half a terabyte
PAGEBLOCK_ORDER = 9
# A zone with fewer pages may get no watermark from its share of min_free_kbytes.
MANAGED_WITHOUT_MARKS = 10000
_ALLOCATED = 3  # a pageblock's kind


def _equal(what: str, have: object, want: object) -> None:
    if have != want:
        raise ValidationError(f"{what}: {have}, but recounted {want}")


def _true(ok: bool, what: str) -> None:
    if not ok:
        raise ValidationError(what)


class _Pages(NamedTuple):
    """A zone's pages: counts, and the numbers of pageblocks whose pages have records."""

    present: int
    early: int
    used: int  # in whole pageblocks that the kernel took or that were handed out
    dirty: npt.NDArray[np.int64]


def _online_pages_of(m: Machine, zone: Zone) -> _Pages:
    """Count the pages of a zone: online pageblocks of it, less holes in System RAM."""
    first = zone.zone_start_pfn // PAGEBLOCK_NR_PAGES
    last = -(-zone.zone_end_pfn // PAGEBLOCK_NR_PAGES) if zone.spanned_pages else first
    parts = [_Pages(0, 0, 0, np.zeros(0, dtype=np.int64))]
    for at in range(first, last, _PART):
        parts.append(_part_of_pages(m, zone, at, min(at + _PART, last)))
    present, early, used, dirty = zip(*parts, strict=True)
    return _Pages(sum(present), sum(early), sum(used), np.concatenate(dirty))


def _part_of_pages(m: Machine, zone: Zone, first: int, last: int) -> _Pages:
    """Count the pages of some pageblocks, first to the one before last."""
    mine = np.flatnonzero(m.pageblocks["zone"][first:last] == zone.index + 1) + first
    flags = m.sections["flags"][mine >> 6]
    online = flags & SECTION_IS_ONLINE != 0
    early = flags & SECTION_IS_EARLY != 0
    later = int(np.count_nonzero(online & ~early)) * PAGEBLOCK_NR_PAGES
    # Boot memory has holes inside its sections; only there the resource tree is asked.
    boot, at_boot = mine[online & early], 0
    for run in np.split(boot, np.flatnonzero(np.diff(boot) != 1) + 1):
        if len(run):
            start, nr = int(run[0]) * PAGEBLOCK_NR_PAGES, len(run) * PAGEBLOCK_NR_PAGES
            at_boot += sum(n for _, n in walk_system_ram_range(m.iomem_resource, start, nr))
    blocks = mine[online]
    state = m.pageblocks["state"][blocks]
    heads = blocks[m.pageblocks["kind"][blocks] == _ALLOCATED]
    used = int((1 << m.pageblocks["order"][heads].astype(np.int64)).sum())
    used += int(np.count_nonzero(state & 0x7F == FILL_KERNEL)) * PAGEBLOCK_NR_PAGES
    return _Pages(later + at_boot, at_boot, used, blocks[state & 0x80 != 0])


def unmanaged_pages(m: Machine) -> Counter[int]:
    """Count the pages that drivers took out of the system, by the indices of their zones."""
    taken: Counter[int] = Counter()
    for balloon in m.balloons:
        taken.update(balloon.unmanaged_by_zone())
    return taken


def check_zone(m: Machine, zone: Zone, taken: int) -> None:
    """Spans, present, managed and free counts of a zone, and its lists against the records.

    :param taken: pages of the zone that drivers have and that do not count as managed.
    """
    name = f"node {zone.nid} zone {zone.name}"
    pages = _online_pages_of(m, zone)
    _equal(f"{name}: present", zone.present_pages, pages.present)
    _equal(f"{name}: present since boot", zone.present_early_pages, pages.early)
    _true(zone.present_pages <= zone.spanned_pages, f"{name}: present exceeds spanned")
    _true(zone.populated or not zone.spanned_pages, f"{name}: has a span but no pages")
    if zone.populated and not zone.early_ranges:
        # A span that hot-plug made begins and ends at pages of the zone; one made at boot, where
        # the zone's addresses do.
        for end, pfn in (("first", zone.zone_start_pfn), ("last", zone.zone_end_pfn - 1)):
            _true(m.page_zone(pfn) is zone, f"{name}: the {end} page of its span is not in it")
    _true(0 <= zone.managed_pages <= zone.present_pages, f"{name}: managed {zone.managed_pages}")
    listed = check_free_lists(m, zone, name)
    used = pages.used + taken_pages(m.memmap_engine, pages.dirty)
    _equal(f"{name}: managed", zone.managed_pages + taken, listed + used)
    isolated = _isolated_blocks(m, zone)
    _equal(f"{name}: isolated pageblocks", zone.nr_isolate_pageblock, isolated)
    typed = procfs.pageblock_counts(m, zone)[MIGRATE_HIGHATOMIC] * PAGEBLOCK_NR_PAGES
    # Isolating a reserved pageblock makes it Movable and leaves the count, in the kernel too.
    have = zone.nr_reserved_highatomic
    good = have >= typed and have % PAGEBLOCK_NR_PAGES == 0
    _true(good, f"{name}: nr_reserved_highatomic {have}, but {typed} pages are typed so")
    _check_marks(m, zone, name)
    _check_pagesets(m, zone, name)


def _check_marks(m: Machine, zone: Zone, name: str) -> None:
    _true(
        zone.watermark_min <= zone.watermark_low <= zone.watermark_high,
        f"{name}: watermarks out of order",
    )
    _true(
        zone.watermark_high > 0 or zone.managed_pages < MANAGED_WITHOUT_MARKS,
        f"{name}: no watermarks",
    )
    step = zone.watermark_low - zone.watermark_min
    _equal(f"{name}: high watermark", zone.watermark_high, zone.watermark_low + step)


def _check_pagesets(m: Machine, zone: Zone, name: str) -> None:
    for cpu in range(m.nr_cpus):
        count, high, batch, _ = zone.pcp_state(cpu)
        listed = 0
        for pindex in range(PCP_LISTS):
            order = 9 if pindex >= 12 else pindex // 3
            listed += len(zone.pcp_list(cpu, pindex)) << order
        _equal(f"{name}: pages on the lists of CPU {cpu}", count, listed)
        if zone.populated:
            want = (zone.pageset_high, zone.pageset_batch)
            _equal(f"{name}: CPU {cpu} high and batch", (high, batch), want)


def check_recomputed(m: Machine, zone: Zone) -> None:
    """What follows from the sizes of the online nodes' zones, if it was computed since boot."""
    name = f"node {zone.nid} zone {zone.name}"
    zones = m.nodes[zone.nid].zones
    managed = zone.managed_pages
    if "watermarks" in m.recomputed:
        sharing = [z for n in m.n_online for z in m.nodes[n].zones]
        if not m.rules.movable_shares_min_free_kbytes:
            sharing = [z for z in sharing if z.zone_idx != ZONE_MOVABLE]
        shared = sum(z.managed_pages for z in sharing)
        low = (m.vm.min_free_kbytes >> 2) * managed // shared if shared else 0
        step = max(low >> 2, managed * m.vm.watermark_scale_factor // 10000)
        have = (zone.watermark_min, zone.watermark_low, zone.watermark_high)
        _equal(f"{name}: min, low and high", have, (low, low + step, low + 2 * step))
    if "reserves" in m.recomputed and zone.zone_idx < ZONE_DEVICE:
        ratio = m.vm.lowmem_reserve_ratio[zone.zone_idx]
        above = [
            sum(z.managed_pages for z in zones[zone.zone_idx + 1 : j + 1])
            for j in range(MAX_NR_ZONES)
        ]
        want = tuple(n // ratio if ratio and managed else 0 for n in above)
        _equal(f"{name}: lowmem_reserve", tuple(zone.lowmem_reserve), want)
    if "thresholds" in m.recomputed and zone.populated:
        # 2 * fls(CPUs) * (1 + fls(128 MiB pieces)), at most 125.
        step = 1 + (managed // (1 << 15)).bit_length()
        want_threshold = min(125, 2 * m.nr_cpus.bit_length() * step)
        _equal(f"{name}: stat_threshold", zone.stat_threshold, want_threshold)


def _isolated_blocks(m: Machine, zone: Zone) -> int:
    if procfs.pageblock_counts(m, zone)[MIGRATE_ISOLATE] == 0:
        return 0
    first = zone.zone_start_pfn
    return sum(
        m.memmap_engine.get_pageblock_migratetype(pfn) == MIGRATE_ISOLATE
        for pfn in range(first, zone.zone_end_pfn, PAGEBLOCK_NR_PAGES)
        if m.page_zone(pfn) is zone and m.section_flags(pfn) & SECTION_IS_ONLINE
    )


def check_free_lists(m: Machine, zone: Zone, name: str) -> int:
    """Free lists against the page records, order by order and type by type; pages on lists."""
    found, pcp = zone.recount()
    counts = zone.free_counts()
    free = isolated = 0
    for mt, mask in enumerate(zone.free_masks()):
        orders = sum(1 << order for order in range(MAX_ORDER) if counts[mt][order])
        _equal(f"{name}: orders of {MIGRATETYPE_NAMES[mt]} with free blocks", mask, orders)
    for order in range(MAX_ORDER):
        for mt in range(MIGRATE_TYPES):
            what = f"{name}: free blocks of order {order}, {MIGRATETYPE_NAMES[mt]}"
            _equal(what, counts[mt][order], found[mt][order])
            if counts[mt][order]:
                _check_list(m, zone, order, mt, what)
            if mt != MIGRATE_ISOLATE:
                free += counts[mt][order] << order
            else:
                isolated += counts[mt][order] << order
    _equal(f"{name}: free pages", zone.nr_free_pages, free)
    _equal(f"{name}: pages on per-CPU lists", zone.pcp_pages(), pcp)
    return free + isolated + pcp


def _check_list(m: Machine, zone: Zone, order: int, mt: int, what: str) -> None:
    at = np.array(zone.free_list(order, mt), dtype=np.int64)
    ordered = np.sort(at)
    _true(not (ordered[1:] == ordered[:-1]).any(), f"{what}: a block is listed twice")
    _none(at[at & ((1 << order) - 1) != 0], f"{what}: misaligned")
    outside = (at < zone.zone_start_pfn) | (at >= zone.zone_end_pfn)
    _none(at[outside], f"{what}: outside the zone")
    if order >= PAGEBLOCK_ORDER:
        back = m.pageblocks["prev"][at >> PAGEBLOCK_ORDER].astype(np.int64) << PAGEBLOCK_ORDER
    else:
        high = m.memmap["prev_hi"][at].astype(np.int64)
        back = m.memmap["prev"][at].astype(np.int64) | high << 32
    _none(at[1:][back[1:] != at[:-1]], f"{what}: not linked back to the one before")


def _none(pfns: npt.NDArray[np.int64], what: str) -> None:
    if len(pfns):
        raise ValidationError(f"{what}: pfn {int(pfns[0]):#x}")
