"""Whether a memory block could go offline now, and what is in its way; nothing changes.

Follows offline_pages step by step (mm/memory_hotplug.c), but looks where that acts, and goes on
looking where that gives up, so that every obstacle has its line.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kmm import _page_ref, _scan
from kmm import resource as res_
from kmm._page_owner import pages_in_use
from kmm.arguments import check_block_id
from kmm.memory import KIND_NAMES
from kmm.memory_block import MemoryBlock, MemoryNotify
from kmm.mmzone import Zone
from kmm.offline_explanation import KERNEL_USES, NEXT_TIME, Explanation, Obstacle
from kmm.offline_hugetlb import HugePages, look_at_huge_pages
from kmm.offline_room import find_room, reclaimable_rows, shrinkable, single_pages
from kmm.params import (
    FILL_KERNEL,
    MIGRATE_ISOLATE,
    MIGRATETYPE_NAMES,
    PAGEBLOCK_NR_PAGES,
    PG_ACTIVE,
    PG_HWPOISON,
    PG_LRU,
    PG_MOVABLE_OPS,
    PG_OFFLINE,
    PG_PINNED,
    PG_RESERVED,
    PG_SLAB,
    PG_USER,
    USER_HUGETLB,
    USER_MOVABLE_OPS,
)
from kmm.vmstat import zone_items
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

Rows = npt.NDArray[Any]


def explain_offline(m: Machine, block_id: int) -> Explanation:
    """Say whether a memory block could go offline now, and what is in its way.

    :param block_id: the number in its name, memory32 having 32.
    :raises InvalidArgument: if there is no such block.
    """
    block = check_block_id(m, block_id)
    block_id = block.block_id
    name = block.zone.name if block.zone is not None else None
    start, nr = block_id * m.block_pages, m.block_pages
    out = Explanation(block_id, start, nr, name, block.nid, block.state)
    stop = _before_isolation(m, block)
    if stop is not None:
        out.obstacles.append(stop)
    elif block.zone is not None:
        _Look(m, block, block.zone, out).all()
    return out


def _before_isolation(m: Machine, block: MemoryBlock) -> Obstacle | None:
    """What is refused before any page is looked at."""
    if block.state != "online":
        return Obstacle(
            "not online",
            f"state_store: the block is {block.state} already",
            errno.EINVAL,
            "nothing: it is out of use",
        )
    if block.zone is None:
        return Obstacle(
            "mixed zones",
            "memory_block_offline: its pages lie in several zones or nodes",
            errno.EINVAL,
            "nothing: a block that boot laid across zones stays",
        )
    start = block.block_id * m.block_pages + block.nr_vmemmap_pages
    nr = m.block_pages - block.nr_vmemmap_pages
    ram = sum(n for _, n in res_.walk_system_ram_range(m.iomem_resource, start, nr))
    if ram != nr:
        return Obstacle(
            "memory holes",
            f"offline_pages: memory holes, {nr - ram} of its pages are no System RAM",
            errno.EINVAL,
            "nothing: a block with holes stays",
        )
    if m.page_zone(start) is not block.zone or m.page_zone(start + nr - 1) is not block.zone:
        return Obstacle(
            "mixed zones",
            "offline_pages: multizone range",
            errno.EINVAL,
            "nothing: a block that boot laid across zones stays",
        )
    return None


_LRU_ITEMS = ("nr_zone_inactive", "nr_zone_active", "nr_zone_unevictable")


class _Look:
    """One look at a block whose pages lie in one zone."""

    def __init__(self, m: Machine, block: MemoryBlock, zone: Zone, out: Explanation) -> None:
        self.m, self.zone, self.out = m, zone, out
        self.start = block.block_id * m.block_pages + block.nr_vmemmap_pages
        self.end = (block.block_id + 1) * m.block_pages
        self.rows = pages_in_use(m.memmap_engine, self.start, self.end)
        self.refused: set[int] = set()
        self.unknown = 0
        self.guessed = False  # where pages are in use, from what files count

    def all(self) -> None:
        """Go through what offline_pages does, in its order."""
        used = int(self.rows["nr_pages"].sum())
        self.out.goes_along = {"free": self.end - self.start - used}
        huge = look_at_huge_pages(self.m, self.zone, self.start, self.end)
        self._isolation(huge)
        self._notifiers()
        if self.m.signal_pending:
            self._add(
                "signal", "offline_pages: a signal is pending", errno.EINTR, "handle it first"
            )
        movable = self._pages()
        self._pages_of_one_across(huge)
        self.out.obstacles += huge.stuck
        self._room(movable, huge)
        self.out.obstacles += huge.reserved
        for doubt in huge.doubts:
            self._doubt(doubt)
        self._what_is_not_known()

    def _add(self, kind: str, rule: str, code: int, helps: str, row: Any = None) -> None:
        if row is None:
            self.out.obstacles.append(Obstacle(kind, rule, code, helps))
            return
        pfn = int(row["pfn"])
        user, user_kind = self._user(row)
        mt = self.m.memmap_engine.get_pageblock_migratetype(pfn)
        self.out.obstacles.append(
            Obstacle(
                kind,
                rule,
                code,
                helps,
                pfn,
                int(row["nr_pages"]),
                user,
                user_kind,
                MIGRATETYPE_NAMES[mt],
                _laid_out(row),
            )
        )

    def _user(self, row: Any) -> tuple[str | None, str | None]:
        user = self.m.users_by_number.get(int(row["user"]))
        kind = KIND_NAMES.get(int(row["kind"]))
        return (user.name if user is not None else None), kind

    # -- isolation ------------------------------------------------------------------------

    def _pages_of_one_across(self, huge: HugePages) -> None:
        """Count the pages of a gigantic page that begins below the block, which have no row."""
        for pfn, nr_pages, active in huge.across:
            self.out.goes_along["free"] -= nr_pages
            if active:
                user = self.m.user_of(pfn)
                name = (user.name if user is not None else "unknown", "hugetlb")
                self.out.moves[name] = self.out.moves.get(name, 0) + nr_pages
            else:
                along = self.out.goes_along
                along["dissolved"] = along.get("dissolved", 0) + nr_pages

    def _doubt(self, text: str) -> None:
        self.out.uncertain = True
        self.out.assumptions.append(text)

    def _isolation(self, huge: HugePages) -> None:
        """What start_isolate_page_range refuses."""
        for pfn in range(self.start, self.end, PAGEBLOCK_NR_PAGES):
            if self.m.memmap_engine.get_pageblock_migratetype(pfn) == MIGRATE_ISOLATE:
                rule = f"set_migratetype_isolate: the pageblock at pfn {pfn:#x} is isolated already"
                self._add("isolated", rule, errno.EBUSY, "whoever isolated it has to finish")
        room = np.zeros(max(len(self.rows), 1), dtype=np.uint64)
        n = _scan.unmovable_pages(self.zone, self.start, self.end, room)
        self.refused = set(room[: min(n, len(room))].tolist())
        found = self.rows[np.isin(self.rows["pfn"], room[:n])]
        waiting = list(huge.crossing)
        for row in sorted(found, key=self._when_isolated):
            if self._when_isolated(row)[0] == 2:
                self.out.obstacles += waiting
                waiting = []
            if _laid_out(row):
                self.guessed = True
                if self._known_as_movable():
                    self.refused.discard(int(row["pfn"]))
                    continue
            kind, helps = self._why_unmovable(row)
            rule = "has_unmovable_pages: unmovable page"
            self._add(kind, rule, errno.EBUSY, helps, row)
        self.out.obstacles += waiting

    def _when_isolated(self, row: Any) -> tuple[int, int]:
        """In which order pageblocks are isolated: the first, the last, the others upward."""
        pfn = int(row["pfn"])
        block = pfn // PAGEBLOCK_NR_PAGES
        ends = (self.start // PAGEBLOCK_NR_PAGES, self.end // PAGEBLOCK_NR_PAGES - 1)
        return ends.index(block) if block in ends else 2, pfn

    def _why_unmovable(self, row: Any) -> tuple[str, str]:
        if int(row["flags"]) & PG_RESERVED:
            return "reserved", "nothing: boot, or the block's own memmap, has it for good"
        _, kind = self._user(row)
        if kind in KERNEL_USES:
            name, helps = KERNEL_USES[kind]
            return name, helps + NEXT_TIME
        if int(row["flags"]) & PG_LRU == 0 and kind is not None:
            return f"{kind} page off its list", "it has to come back to its list"
        return "kernel page", "whoever allocated it has to free it" + NEXT_TIME

    def _known_as_movable(self) -> bool:
        """Whether as many pages of the zone are on LRU lists as are in use at all."""
        used = self.zone.managed_pages - self.zone.nr_free_pages - self.zone.pcp_pages()
        return 0 < used <= self._on_lru()

    def _on_lru(self) -> int:
        items = zone_items(self.zone)
        return sum(n for name, n in items.items() if name.startswith(_LRU_ITEMS))

    # -- notifiers ------------------------------------------------------------------------

    def _notifiers(self) -> None:
        arg = MemoryNotify(self.start, self.end - self.start)
        for notifier in self.m.memory_notifiers:
            if notifier.asks is None:
                self.out.assumptions.append(
                    f"the notifier {notifier.name} agrees: it cannot be asked beforehand"
                )
                continue
            code = notifier.asks(self.m, arg)
            if code:
                rule = f"memory_notify: MEM_GOING_OFFLINE refused by {notifier.name}"
                self._add("notifier", rule, -code, f"{notifier.name} has to agree")
                return  # those behind it are not asked

    # -- pages ----------------------------------------------------------------------------

    def _pages(self) -> Rows:
        """Sort what is in use; what would move."""
        flags, pfns = self.rows["flags"], self.rows["pfn"]
        plain = flags & (PG_LRU | PG_MOVABLE_OPS) != 0
        plain &= flags & (PG_PINNED | PG_HWPOISON) == 0
        refused = np.isin(pfns, np.array(sorted(self.refused), dtype=np.uint64))
        moves = plain & ~refused & (self.rows["kind"] != USER_HUGETLB)
        later: list[tuple[str, str, int, str, Any]] = []
        for i in np.flatnonzero(~moves & ~refused).tolist():
            row = self.rows[i]
            what = self._page(row)
            if what == "moves":
                moves[i] = True
            elif isinstance(what, str):
                along = self.out.goes_along
                along[what] = along.get(what, 0) + int(row["nr_pages"])
            else:
                later.append((*what, row))
        # What cannot move is found again for ever, so the scan gets to nothing behind it.
        stuck = [int(o[4]["pfn"]) for o in later if o[0] in ("pinned", "driver", "poisoned")]
        first = min(stuck, default=self.end)
        later.sort(key=lambda o: not (o[2] == errno.EBUSY and int(o[4]["pfn"]) < first))
        for kind, rule, code, helps, row in later:
            self._add(kind, rule, code, helps, row)
        movable: Rows = self.rows[moves]
        self._count_moves(movable)
        return movable

    def _count_moves(self, movable: Rows) -> None:
        """Add up by user what would move."""
        for number in np.unique(movable["user"]).tolist():
            mine = movable[movable["user"] == number]
            user, kind = self._user(mine[0])
            name = (user or "unknown", kind or "unknown")
            pages = int(mine["nr_pages"].astype(np.int64).sum())
            self.out.moves[name] = self.out.moves.get(name, 0) + pages

    def _page(self, row: Any) -> str | tuple[str, str, int, str]:
        """What becomes of one page: ``moves``, how it goes along, or the obstacle that it is."""
        flags, nr = int(row["flags"]), int(row["nr_pages"])
        broken = flags & PG_HWPOISON
        if _page_ref.is_orphan(self.m.memmap_engine, int(row["pfn"])):
            return self._held(row, "its user is gone, ")
        if broken and nr == 1 and not flags & (PG_LRU | PG_MOVABLE_OPS):
            return "poisoned"
        if int(row["kind"]) == USER_HUGETLB:
            return self._huge_page(row)
        if flags & (PG_LRU | PG_MOVABLE_OPS):
            if broken:
                rule = "do_migrate_range: a poisoned page is skipped, and found again for ever"
                return "poisoned", rule, errno.EINTR, "its user has to free it"
            return self._held(row, "") if flags & PG_PINNED else "moves"
        if flags & PG_OFFLINE:
            return self._offline_page(row)
        if _laid_out(row):
            self.unknown += nr
            self.guessed = True
            return "moves"
        rule = "test_pages_isolated: in use and on no list; offline_pages tries again for ever"
        return "in use", rule, errno.EINTR, "whoever allocated it has to free it"

    def _held(self, row: Any, why: str) -> tuple[str, str, int, str]:
        if int(row["kind"]) == USER_MOVABLE_OPS and not why:
            rule = "migrate_pages: its driver refuses; offline_pages tries again for ever"
            return "driver", rule, errno.EINTR, "its driver has to agree, or to deflate"
        rule = f"migrate_pages: {why}extra references; offline_pages tries again for ever"
        return "pinned", rule, errno.EINTR, "whoever pinned it has to unpin it"

    def _offline_page(self, row: Any) -> str | tuple[str, str, int, str]:
        user = self.m.users_by_number.get(int(row["user"]))
        lets_go = any(b.user is user and b.lets_go for b in self.m.balloons)
        if not int(row["held"]) or (lets_go and int(row["nr_pages"]) == 1):
            return "offered"
        rule = "scan_movable_pages: unmovable page, PageOffline with a reference"
        return "balloon", rule, errno.EBUSY, "its driver has to deflate"

    def _huge_page(self, row: Any) -> str | tuple[str, str, int, str]:
        flags = int(row["flags"])
        if not flags & PG_ACTIVE:
            return "dissolved"
        return self._held(row, "") if flags & PG_PINNED else "moves"

    # -- where to -------------------------------------------------------------------------

    def _room(self, movable: Rows, huge: HugePages) -> None:
        wanted = self.out.nr_to_move - huge.from_pool
        short, reclaimable = huge.short, huge.reclaimable
        if wanted > 0 and len(movable):
            single = single_pages(self.m, movable)
            free, pfn = self.out.goes_along["free"], int(movable["pfn"][0])
            self.out.room = room = find_room(self.m, self.zone, pfn, free, huge=wanted > single)
            fits = room.fits(single, wanted - single)
            if fits is None:
                self._doubt(
                    f"{counted(wanted, 'page')} to move, of which {room.sure} fit for sure, "
                    f"{room.most + room.most_huge} at most: reclaim, compaction, and what steals "
                    "from other types' pageblocks, decide"
                )
            elif not fits:
                short, reclaimable = True, max(reclaimable, room.reclaimable)
                helps = room.helps(self.zone)
                self._add("nowhere to go", room.rule(single, wanted), errno.EINTR, helps)
        if short:
            reclaimable += shrinkable(self.m) + reclaimable_rows(self.m, movable)
            if reclaimable:
                self._doubt(
                    f"{counted(reclaimable, 'page')} that reclaim may free, there or among those "
                    "that move"
                )

    def _what_is_not_known(self) -> None:
        if self.guessed:
            self.out.uncertain = True
            self.out.assumptions.append(
                "which pages of the zone are in use was laid out from counts, as boot hands them "
                "out; who uses them is not known"
            )
        if self.unknown:
            self.out.assumptions.append(
                f"{self.unknown} of them are assumed to be on LRU lists, as in a zone "
                f"{self.zone.name} with these counts, and none of them to be pinned"
            )
        elif self.guessed:
            used = self.zone.managed_pages - self.zone.nr_free_pages
            self.out.assumptions.append(
                f"of the zone's {counted(used, 'page')} in use {self._on_lru()} are on LRU lists; "
                "the others, slab, page tables, stacks, cannot move, and any of them may lie in "
                "the block"
            )


def _laid_out(row: Any) -> bool:
    """Whether a page is in use because files count so many, or since before the story began."""
    if int(row["fill"]) == FILL_KERNEL:
        return True
    return int(row["flags"]) & (PG_SLAB | PG_USER) == PG_SLAB
