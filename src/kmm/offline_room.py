"""How much room there is for pages that have to leave a block (alloc_migration_target)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kmm.migrate import hot_remove_target
from kmm.mmzone import Zone
from kmm.page_alloc import gfp_zone
from kmm.params import PAGEBLOCK_NR_PAGES
from kmm.vmstat import zone_items

if TYPE_CHECKING:
    from kmm.machine import Machine

_EVICTABLE = ("inactive_anon", "active_anon", "inactive_file", "active_file")


@dataclass(frozen=True, slots=True)
class TargetZone:
    """A zone that may take pages: ``sure`` and at ``most`` so many, above its marks.

    Between the two lie pageblocks kept for atomic requests and what stealing pageblocks of other
    types adds to the marks.  ``reclaimable`` pages are on LRU lists, where reclaim looks.
    """

    nid: int
    zone: str
    free: int
    sure: int
    most: int
    reclaimable: int


@dataclass(slots=True)
class Room:
    """Where pages could go, in the order in which zones are asked, and with which gfp flags."""

    gfp: int
    nodemask: tuple[int, ...]
    targets: list[TargetZone] = field(default_factory=list)

    @property
    def sure(self) -> int:
        """Pages that fit whatever happens."""
        return sum(t.sure for t in self.targets)

    @property
    def most(self) -> int:
        """Pages that fit at most, without reclaim."""
        return sum(t.most for t in self.targets)

    @property
    def reclaimable(self) -> int:
        """Pages that reclaim may be able to free."""
        return sum(t.reclaimable for t in self.targets)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        zones = [{n: getattr(t, n) for n in TargetZone.__slots__} for t in self.targets]
        return {
            "gfp": f"{self.gfp:#x}",
            "nodes": list(self.nodemask),
            "sure": self.sure,
            "most": self.most,
            "zones": zones,
        }


def boost_limit(m: Machine, zone: Zone) -> int:
    """How far the marks of a zone can rise while pageblocks are stolen (boost_watermark)."""
    if not m.vm.watermark_boost_factor or zone.managed_pages < 4 * PAGEBLOCK_NR_PAGES:
        return zone.watermark_boost
    limit = zone.watermark_high * m.vm.watermark_boost_factor // 10000
    return max(limit, PAGEBLOCK_NR_PAGES, zone.watermark_boost)


def find_room(m: Machine, source: Zone, pfn: int, free_in_block: int) -> Room:
    """Return where pages that leave a block could go.

    :param source: its zone; pfn: the first page that moves.
    :param free_in_block: pages of the block that are free and go with it.
    """
    target = hot_remove_target(m, pfn)
    nodes = target.nodemask if target.nodemask is not None else tuple(sorted(m.n_memory))
    room = Room(target.gfp, nodes)
    highest = gfp_zone(target.gfp)
    for zone in m.nodes[target.nid].zonelist:
        if zone.nid not in nodes or zone.zone_idx > highest:
            continue
        free = zone.nr_free_pages + zone.pcp_pages()
        if zone is source:
            free -= free_in_block
        above = free - zone.watermark_min - zone.lowmem_reserve[highest]
        most = max(0, above - zone.watermark_boost)
        sure = max(0, above - boost_limit(m, zone) - zone.nr_reserved_highatomic)
        items = zone_items(zone)
        lru = sum(items[f"nr_zone_{name}"] for name in _EVICTABLE)
        room.targets.append(TargetZone(zone.nid, zone.name, free, sure, most, lru))
    return room
