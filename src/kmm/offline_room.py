"""How much room there is for pages that have to leave a block (alloc_migration_target)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kmm.gfp import gfp_zone
from kmm.migrate import hot_remove_target, is_huge
from kmm.mmzone import Zone
from kmm.params import (
    PAGEBLOCK_NR_PAGES,
    PG_MLOCKED,
    USER_ANON,
    USER_FILE,
    USER_HUGETLB,
    USER_SHMEM,
    ZONE_MOVABLE,
)
from kmm.vmstat import zone_items
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

Rows = npt.NDArray[Any]

USER_UNKNOWN = 0
_ANON = ("nr_zone_inactive_anon", "nr_zone_active_anon")
_FILE = ("nr_zone_inactive_file", "nr_zone_active_file")


@dataclass(frozen=True, slots=True)
class TargetZone:
    """A zone that may take pages: ``sure`` and at ``most`` so many, above its marks.

    Between the two lie pageblocks kept for atomic requests and what stealing pageblocks of other
    types adds to the marks.  ``reclaimable`` pages are on LRU lists, where reclaim looks, and
    have a file or a swap device to go to.  A zone that is ``huge_only`` takes huge pages but no
    single ones; ``huge_sure`` of its pages are huge ones above the low mark, where none of them
    is asked for elsewhere first.
    """

    nid: int
    zone: str
    free: int
    sure: int
    most: int
    reclaimable: int
    huge_only: bool = False
    huge_sure: int = 0


@dataclass(slots=True)
class Room:
    """Where pages could go, in the order in which zones are asked, and single ones' gfp flags."""

    gfp: int
    nodemask: tuple[int, ...]
    targets: list[TargetZone] = field(default_factory=list)

    @property
    def sure(self) -> int:
        """Pages, huge or single, that fit whatever happens."""
        return sum(t.sure for t in self.targets if not t.huge_only)

    @property
    def most(self) -> int:
        """Single pages that fit at most, without reclaim."""
        return sum(t.most for t in self.targets if not t.huge_only)

    @property
    def most_huge(self) -> int:
        """Pages that fit at most, as huge ones, where single ones cannot go."""
        huge = [t.most for t in self.targets if t.huge_only]
        return sum(n // PAGEBLOCK_NR_PAGES * PAGEBLOCK_NR_PAGES for n in huge)

    @property
    def reclaimable(self) -> int:
        """Pages that reclaim may be able to free."""
        return sum(t.reclaimable for t in self.targets)

    def fits(self, single: int, huge: int) -> bool | None:
        """Whether pages fit without reclaim; None if that cannot be told beforehand.

        :param single: pages that go one by one; huge: pages of huge ones, which may be split.
        """
        if single > self.most or single + huge > self.most + self.most_huge:
            return False
        # Behind a zone that takes all, huge pages may use up what single ones need.
        first = sum(t.huge_sure for t in takewhile(lambda t: t.huge_only, self.targets))
        return True if single + max(0, huge - first) <= self.sure else None

    def rule(self, single: int, wanted: int) -> str:
        """Say what does not fit: single pages, or all that are wanted."""
        if single > self.most:
            what = f"{counted(single, 'page')} to move one by one, {self.most} fit"
        else:
            what = f"{counted(wanted, 'page')} to move, {self.most + self.most_huge} fit"
        return f"alloc_migration_target: {what}; offline_pages tries again for ever"

    def helps(self, source: Zone) -> str:
        """Say what would make room for what leaves a zone."""
        where = ", ".join(f"node {t.nid} {t.zone}" for t in self.targets if not t.huge_only)
        hint = f"free memory there, or bring more online: {where or 'any other zone'}"
        if source.zone_idx != ZONE_MOVABLE:
            hint += "; of what leaves a kernel zone only huge pages can go to a Movable one"
        return hint

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        zones = [{n: getattr(t, n) for n in TargetZone.__slots__} for t in self.targets]
        return {
            "gfp": f"{self.gfp:#x}",
            "nodes": list(self.nodemask),
            "sure": self.sure,
            "most": self.most,
            "most_huge": self.most_huge,
            "zones": zones,
        }


def boost_limit(m: Machine, zone: Zone) -> int:
    """How far the marks of a zone can rise while pageblocks are stolen (boost_watermark)."""
    if not m.vm.watermark_boost_factor or zone.managed_pages < 4 * PAGEBLOCK_NR_PAGES:
        return zone.watermark_boost
    limit = zone.watermark_high * m.vm.watermark_boost_factor // 10000
    return max(limit, PAGEBLOCK_NR_PAGES, zone.watermark_boost)


def reclaimable_in(m: Machine, zone: Zone) -> int:
    """Return how many pages of a zone are on LRU lists that reclaim could empty."""
    items = zone_items(zone)
    names = _FILE + _ANON if can_swap(m) else _FILE
    return sum(items[name] for name in names)


def can_swap(m: Machine) -> bool:
    """Whether anonymous pages can leave memory."""
    return m.swap is not None and m.swap.nr_free > 0


def shrinkable(m: Machine) -> int:
    """Return how many pages reclaim could get back from slabs, wherever they lie."""
    found = 0
    for user in m.shrinkers.values():
        if user.shrinker is not None:
            found += user.shrinker.count_objects(user) << user.engine.order
    return found


def single_pages(m: Machine, rows: Rows) -> int:
    """Return how many of some pages in use go one by one: those of no huge page."""
    large = rows["nr_pages"] >= PAGEBLOCK_NR_PAGES
    huge = sum(
        int(row["nr_pages"])
        for row in rows[large]
        if int(row["kind"]) == USER_HUGETLB or is_huge(m, int(row["pfn"]))
    )
    return int(rows["nr_pages"].astype(np.int64).sum()) - huge


def reclaimable_rows(m: Machine, rows: Rows) -> int:
    """Return how many of some pages in use reclaim could free, wherever they have gone."""
    kinds = [USER_UNKNOWN, USER_FILE]
    if can_swap(m):
        kinds += [USER_ANON, USER_SHMEM]
    which = np.isin(rows["kind"], kinds) & (rows["flags"] & PG_MLOCKED == 0)
    return int(rows["nr_pages"][which].astype(np.int64).sum())


def free_huge(zone: Zone) -> int:
    """Return how many free huge pages a zone has, apart from those kept for atomic requests."""
    return sum(row[9] + 2 * row[10] for row in zone.free_counts()[:3])


def find_room(m: Machine, source: Zone, pfn: int, free_in_block: int, huge: bool) -> Room:
    """Return where pages that leave a block could go.

    :param source: its zone; pfn: the first page that moves.
    :param free_in_block: pages of the block that are free and go with it.
    :param huge: whether huge pages are among them, which a Movable zone takes from anywhere.
    """
    target = hot_remove_target(m, pfn)
    nodes = target.nodemask if target.nodemask is not None else tuple(sorted(m.n_memory))
    room = Room(target.gfp, nodes)
    highest = gfp_zone(target.gfp)
    for zone in m.nodes[target.nid].zonelist:
        huge_only = zone.zone_idx > highest
        if zone.nid not in nodes or (huge_only and not huge):
            continue
        free = zone.nr_free_pages + zone.pcp_pages()
        if zone is source:
            free -= free_in_block
        reserve = zone.lowmem_reserve[ZONE_MOVABLE if huge_only else highest]
        above = free - zone.watermark_min - reserve
        kept = boost_limit(m, zone) + zone.nr_reserved_highatomic
        huge_sure = _huge_sure(zone, reserve + kept) if huge_only else 0
        # A boost is over as soon as kswapd has done its work.  What CPUs keep is not counted as
        # free when the marks are looked at, and the last batch may be left with them.
        batch = zone.pcp_state(m.this_cpu)[2]
        sure = max(0, above - zone.pcp_pages() - kept - batch)
        most = max(0, above)
        lru = reclaimable_in(m, zone)
        room.targets.append(
            TargetZone(zone.nid, zone.name, free, sure, most, lru, huge_only, huge_sure)
        )
    return room


def _huge_sure(zone: Zone, kept: int) -> int:
    """How many pages a zone gives as huge ones before others are asked."""
    above = zone.nr_free_pages - zone.watermark_low - kept - PAGEBLOCK_NR_PAGES
    return max(0, min(free_huge(zone), above // PAGEBLOCK_NR_PAGES)) * PAGEBLOCK_NR_PAGES
