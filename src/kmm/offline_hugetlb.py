"""What becomes of the huge pages of pools in a block that is to go (mm/hugetlb.c)."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmm.gfp import gfp_zone
from kmm.hugetlb import HState, hstate_of
from kmm.hugetlb_move import flags_of, huge_pages_in
from kmm.migrate import hot_remove_target
from kmm.mmzone import Zone
from kmm.offline_explanation import Obstacle
from kmm.offline_room import boost_limit, free_huge, reclaimable_in
from kmm.params import MIGRATETYPE_NAMES, PAGEBLOCK_NR_PAGES, PG_ACTIVE, PG_PINNED
from kmm.sparse import SECTION_IS_ONLINE
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine


@dataclass(slots=True)
class HugePages:
    """What a block's huge pages would do: ``from_pool`` pages of those that move need no memory.

    ``crossing`` is what isolation refuses, ``stuck`` what is tried for ever, ``reserved`` what
    cannot dissolve in the end.
    """

    from_pool: int = 0
    across: list[tuple[int, int, bool]] = field(default_factory=list)  # pfn, pages here, in use
    crossing: list[Obstacle] = field(default_factory=list)
    stuck: list[Obstacle] = field(default_factory=list)
    reserved: list[Obstacle] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    short: bool = False  # some are stuck for want of memory
    reclaimable: int = 0  # in the zones where those could go


def _obstacle(m: Machine, pfn: int, rule: str, code: int, helps: str) -> Obstacle:
    h, user = hstate_of(m, pfn), m.user_of(pfn)
    mt = m.memmap_engine.get_pageblock_migratetype(pfn)
    name = user.name if user is not None else None
    what = ("hugetlb", rule, code, helps, pfn, 1 << h.order, name, "hugetlb")
    return Obstacle(*what, MIGRATETYPE_NAMES[mt])


def look_at_huge_pages(m: Machine, zone: Zone, start: int, end: int) -> HugePages:
    """Tell what becomes of the pools' huge pages that have pages in a range.

    :param zone: of the range; start: first pfn; end: pfn behind the last.
    """
    out = HugePages()
    heads = huge_pages_in(m, start, end)
    for pfn in heads:
        behind = pfn + (1 << hstate_of(m, pfn).order)
        if pfn < start:
            active = bool(flags_of(m, pfn) & PG_ACTIVE)
            out.across.append((pfn, min(behind, end) - start, active))
        if behind > end and m.section_flags(end) & SECTION_IS_ONLINE:
            rule = "isolate_single_pageblock: a gigantic page lies across the end of the block"
            out.crossing.append(_obstacle(m, pfn, rule, errno.EBUSY, "its pool has to shrink"))
    for h in m.hstates:
        mine = [pfn for pfn in heads if hstate_of(m, pfn) is h]
        if mine:
            _of_pool(m, h, zone, mine, start, out)
    return out


def _of_pool(
    m: Machine, h: HState, zone: Zone, heads: list[int], start: int, out: HugePages
) -> None:
    """The same for the pages of one pool."""
    nodes = set(hot_remove_target(m, start).nodemask or m.n_memory)
    used = [pfn for pfn in heads if flags_of(m, pfn) & PG_ACTIVE]
    moving = [pfn for pfn in used if not flags_of(m, pfn) & PG_PINNED]
    usable = {z.nid for z in m.nodes[zone.nid].zonelist if z.zone_idx <= gfp_zone(h.alloc_mask)}
    spare = [pfn for nid in nodes & usable for pfn in h.free[nid] if pfn not in m.hwpoison]
    here = [pfn for pfn in spare if pfn in heads]
    if here and moving:
        out.doubts.append(
            f"{len(here)} free pages of {h.name} lie in the block themselves: its used ones may "
            "move to them, and back"
        )
    from_pool = min(len(moving), len(spare)) if h.available_huge_pages > 0 else 0
    out.from_pool += from_pool << h.order
    wanted = len(moving) - from_pool
    sure, most = (0, 0) if h.is_gigantic else _fresh(m, h, zone, nodes)
    if wanted > most:
        rule = (
            f"alloc_huge_page_nodemask: {counted(len(moving), f'page of {h.name}')} to move, "
            f"{from_pool + most} find a page; offline_pages tries again for ever"
        )
        helps = "free pages in the pool of the other nodes, or memory there for more"
        out.stuck.append(_obstacle(m, moving[0], rule, errno.EINTR, helps))
        if not h.is_gigantic:
            zones = [z for z in m.nodes[zone.nid].zonelist if z.nid in nodes & usable]
            out.short, out.reclaimable = True, sum(reclaimable_in(m, z) for z in zones)
    elif wanted > sure:
        out.doubts.append(
            f"whether {wanted} fresh pages of {h.name} can be had, compaction decides"
        )
    dissolve = len(heads) - len(used) + from_pool
    if dissolve > h.available_huge_pages:
        first = next((p for p in heads if p not in used), heads[0])
        rule = (
            f"dissolve_free_huge_page: {dissolve} free pages of {h.name} have to dissolve, "
            f"{h.available_huge_pages} are not reserved"
        )
        helps = "more pages in the pool elsewhere, or fewer reservations"
        out.reserved.append(_obstacle(m, first, rule, errno.EBUSY, helps))


def _fresh(m: Machine, h: HState, source: Zone, nodes: set[int]) -> tuple[int, int]:
    """How many fresh pages can be had on some nodes: for sure, and at most."""
    sure = most = 0
    highest = gfp_zone(h.alloc_mask)
    for zone in m.nodes[source.nid].zonelist:
        if zone.nid not in nodes or zone.zone_idx > highest:
            continue
        above = zone.nr_free_pages - zone.watermark_min - zone.lowmem_reserve[highest]
        most += max(0, above + zone.pcp_pages()) // PAGEBLOCK_NR_PAGES
        if zone is source:
            continue  # who knows which of them lie in the block
        kept = boost_limit(m, zone) + zone.nr_reserved_highatomic + PAGEBLOCK_NR_PAGES
        sure += max(0, min(free_huge(zone), (above - kept) // PAGEBLOCK_NR_PAGES))
    return sure, most
