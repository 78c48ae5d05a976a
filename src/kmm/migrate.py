"""Moving used pages from a range elsewhere (mm/migrate.c; do_migrate_range of memory_hotplug.c)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _hugetlb, _migrate, _page_ref
from kmm.balloon_compaction import note_migrated
from kmm.errors import KernelError
from kmm.gfp import (
    __GFP_COMP,
    __GFP_HIGHMEM,
    __GFP_MOVABLE,
    __GFP_RECLAIM,
    __GFP_RETRY_MAYFAIL,
    GFP_TRANSHUGE,
    GFP_USER,
    gfp_zone,
)
from kmm.hugetlb_move import (
    HugetlbResult,
    mark_huge_pages,
    migrate_hugetlbs,
    used_huge_page_across,
)
from kmm.page_alloc import __alloc_pages
from kmm.params import (
    MAX_ORDER,
    MIGRATE_AGAIN,
    MIGRATE_DONE,
    MIGRATE_GONE,
    MIGRATE_MOVABLE,
    MIGRATE_PENDING,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    USER_HUGETLB,
    ZONE_MOVABLE,
)
from kmm.trace import note, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

#: So many pages move that their new records are worth huge pages of the host.
MANY_PAGES = 1 << 13
AHEAD = 1 << 20
#: How often a page that somebody holds is tried within one call.
MAX_PASSES = 10

Pfns = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class MigrationTarget:
    """Where pages may go: gfp flags, whose zonelist, and which nodes (migration_target_control)."""

    gfp: int
    nid: int
    nodemask: tuple[int, ...] | None = None

    @property
    def nodes(self) -> int:
        """The nodes as bits."""
        if self.nodemask is None:
            return (1 << 64) - 1
        return sum(1 << nid for nid in self.nodemask)


@dataclass(slots=True)
class MigrationResult:
    """What became of the pages of one migrate_pages call, in base pages but for the thp ones."""

    nr_succeeded: int = 0
    nr_failed: int = 0
    nr_thp_succeeded: int = 0
    nr_thp_failed: int = 0
    nr_thp_split: int = 0
    code: int = 0  # -ENOMEM if it stopped for want of a target
    left: Pfns = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    work: _List | None = None
    huge: HugetlbResult | None = None

    def moved(self) -> tuple[Pfns, Pfns]:
        """The pages that were moved, and where to; to be asked before the next migration."""
        pfns = to = self.left[:0]
        if self.work is not None:
            done = self.work.status == MIGRATE_DONE
            pfns, to = self.work.pfns[done], self.work.to[done]
        if self.huge is not None:
            pfns, to = np.concatenate([self.huge.moved, pfns]), np.concatenate([self.huge.to, to])
        return pfns, to


def hot_remove_target(m: Machine, pfn: int) -> MigrationTarget:
    """Where pages that leave a block go: another node that has memory, if there is one.

    Only what leaves a Movable zone may go to one.

    :param pfn: the first of them.
    """
    zone = m.page_zone(pfn)
    nid = zone.nid if zone is not None else 0
    gfp = GFP_USER | __GFP_MOVABLE | __GFP_RETRY_MAYFAIL
    if zone is not None and zone.zone_idx == ZONE_MOVABLE:
        gfp |= __GFP_HIGHMEM
    others = tuple(sorted(m.n_memory - {nid}))
    return MigrationTarget(gfp | __GFP_COMP, nid, others or (nid,))


def is_huge(m: Machine, pfn: int) -> bool:
    """Whether a block of order 9 or more in use starts at a page."""
    return pfn % PAGEBLOCK_NR_PAGES == 0 and bool(m.memmap_engine.is_allocated(pfn, 9))


def is_hugetlb(m: Machine, pfn: int) -> bool:
    """Whether a page starts a hugetlb page."""
    user = m.user_of(pfn)
    return user is not None and user.kind == USER_HUGETLB


@traced
def alloc_migration_target(m: Machine, pfn: int, target: MigrationTarget) -> int:
    """Allocate a block for one page to go to, waiting for memory if need be.

    :raises OutOfMemory: when there is none.
    """
    if is_huge(m, pfn):
        gfp = (target.gfp & ~__GFP_RECLAIM) | GFP_TRANSHUGE
        return __alloc_pages(m, gfp, PAGEBLOCK_ORDER, target.nid, target.nodemask)
    return __alloc_pages(m, target.gfp, 0, target.nid, target.nodemask)


class Scratch:
    """Arrays that migrations use again and again."""

    def __init__(self) -> None:
        self._room = 0
        self.pages(1)

    def pages(self, n: int) -> Pfns:
        """Return room for n pfns; what was there is overwritten by the next to ask."""
        if n > self._room:
            self._room = n
            self._pfns: Pfns = np.zeros(n, dtype=np.uint64)
            self._to: Pfns = np.zeros(n, dtype=np.uint64)
            self._status: npt.NDArray[np.uint8] = np.zeros(n, dtype=np.uint8)
        return self._pfns[:n]

    def arrays(self, n: int) -> tuple[npt.NDArray[np.uint8], Pfns]:
        """Return n states, all pending, and room for n targets."""
        self.pages(n)
        self._status[:n] = 0
        return self._status[:n], self._to[:n]


class _List:
    """A list of isolated pages on its way, and what became of each."""

    def __init__(self, m: Machine, pfns: Pfns, target: MigrationTarget) -> None:
        self.m, self.target = m, target
        self.pfns = pfns
        # Large fresh arrays would cost the host more than the migration.
        self.status, self.to = m.scratch.arrays(len(pfns))
        self.code = 0
        self.splits = 0

    def one_pass(self) -> None:
        """Try each pending page once; stop for good when a small one has nowhere to go."""
        at, t = 0, self.target
        while self.code == 0:
            at = _migrate.migrate_pages_once(
                self.m, self.pfns, self.status, at, t.gfp, t.nid, t.nodes, self.m.this_cpu, self.to
            )
            if at == len(self.pfns):
                return
            self._slowly(at)

    def _slowly(self, at: int) -> None:
        """Give one page a target that has to be waited for; a huge one without is split."""
        pfn = int(self.pfns[at])
        try:
            to = alloc_migration_target(self.m, pfn, self.target)
        except KernelError:  # whatever it failed with, there is no target
            if self.m.user_of(pfn) is None:
                self.status[at] = MIGRATE_GONE  # let go while this waited
            elif is_huge(self.m, pfn):
                self._split(at, pfn)
            else:
                self.code = -12
            return
        if _migrate.migrate_to(self.m, pfn, to, self.m.this_cpu):
            self.status[at], self.to[at] = MIGRATE_DONE, to
        else:
            # While this waited for memory, the page's user let it go.
            self.m.free_pages(to, PAGEBLOCK_ORDER if is_huge(self.m, to) else 0)
            self.status[at] = MIGRATE_GONE

    def _split(self, at: int, pfn: int) -> None:
        """Let the parts of a huge page go on as pages of their own, behind the others."""
        _migrate.split_isolated(self.m, pfn)
        self.splits += 1
        parts = np.arange(pfn, pfn + PAGEBLOCK_NR_PAGES, dtype=np.uint64)
        self.pfns = np.concatenate([self.pfns[:at], self.pfns[at + 1 :], parts])
        self.status = np.concatenate(
            [self.status[:at], self.status[at + 1 :], np.zeros(len(parts), dtype=np.uint8)]
        )
        self.to = np.concatenate(
            [self.to[:at], self.to[at + 1 :], np.zeros(len(parts), dtype=np.uint64)]
        )


@traced
def migrate_pages(m: Machine, pfns: Pfns, target: MigrationTarget) -> MigrationResult:
    """Move isolated pages, first to last; those that cannot be moved go back to their lists.

    A page that somebody holds is tried ten times; one that has nowhere to go ends the call, but
    a huge page is split first.

    :param pfns: isolated pages, a uint64 array.
    :return: what became of them.
    """
    try:
        return _migrate_pages(m, pfns, target)
    except BaseException:
        # What is neither moved nor back on its list would be lost to everybody.
        _migrate.putback_movable_pages(m.memmap_engine, pfns)
        raise


def _migrate_pages(m: Machine, pfns: Pfns, target: MigrationTarget) -> MigrationResult:
    note(m, "alloc_migration_target", len(pfns))
    huge = mark_huge_pages(m, pfns)
    if not huge.any():
        return _migrate_others(m, pfns, target)
    first = migrate_hugetlbs(m, pfns[huge], target.gfp, target.nid, target.nodemask)
    if first.code:
        result = MigrationResult(code=first.code, left=pfns[~huge])
        _migrate.putback_movable_pages(m.memmap_engine, result.left)
    else:
        result = _migrate_others(m, pfns[~huge], target)
    result.nr_succeeded += first.nr_succeeded
    result.nr_failed += first.nr_failed
    result.left = np.concatenate([first.left, result.left])
    result.huge = first
    return result


def _migrate_others(m: Machine, pfns: Pfns, target: MigrationTarget) -> MigrationResult:
    """Move what is no huge page of a pool."""
    work = _List(m, pfns, target)
    # To find room for a page others may have to be moved meanwhile.
    scratch, m.scratch = m.scratch, Scratch()
    try:
        for _ in range(MAX_PASSES):
            work.one_pass()
            again = work.status == MIGRATE_AGAIN
            if work.code or not again.any():
                break
            work.status[again] = MIGRATE_PENDING
        return _finish(m, work)
    except BaseException:
        _migrate.putback_movable_pages(m.memmap_engine, work.pfns)
        raise
    finally:
        m.scratch = scratch


def _finish(m: Machine, work: _List) -> MigrationResult:
    counts = _migrate.count_outcome(m.memmap_engine, work.pfns, work.status, work.to)
    moved, huge, failed, huge_failed, nr_left = counts
    result = MigrationResult(moved, failed, huge, huge_failed, work.splits, work.code)
    if nr_left:
        gone = (work.status == MIGRATE_DONE) | (work.status == MIGRATE_GONE)
        result.left = work.pfns[~gone]
        m.count_vm_event("pgmigrate_fail", failed)
        m.count_vm_event("thp_migration_fail", huge_failed)
        _migrate.putback_movable_pages(m.memmap_engine, result.left)
    result.work = work
    return result


def _warn(m: Machine, line: str, pfn: int, reason: str) -> None:
    """Log a line and the page it is about, if there were not too many just now."""
    if m.migrate_ratelimit.allows(m.clock.now):
        m.printk(line)
        m.dump_page(pfn, reason)


def _expect_targets(m: Machine, n: int, target: MigrationTarget) -> None:
    """Make the host ready for the records of the pages that n others will probably move to."""
    for zone in m.nodes[target.nid].zonelist:
        if zone.zone_idx > gfp_zone(target.gfp) or not target.nodes >> zone.nid & 1:
            continue
        pfn = zone.free_head(MAX_ORDER - 1, MIGRATE_MOVABLE)
        if pfn >= 0:
            # A huge page of the host has records of more pages than one block's.
            m.records.expect_pages(pfn, min(pfn + max(n, AHEAD), zone.zone_end_pfn))
            return


@traced
def do_migrate_range(m: Machine, start_pfn: int, end_pfn: int) -> MigrationResult:
    """Isolate what can move in a range, and move it elsewhere.

    :param start_pfn: a page that can move; end_pfn: pfn behind the range.
    :return: what became of the pages; the caller looks again for what is left.
    """
    out = m.scratch.pages(end_pfn - start_pfn)
    refused = np.zeros(10, dtype=np.uint64)
    n, bad = _migrate.isolate_range(m.memmap_engine, start_pfn, end_pfn, out, refused)
    note(m, "isolate_lru_page", n - int(np.count_nonzero(mark_huge_pages(m, out[:n]))))
    pfns = out[:n]
    across = used_huge_page_across(m, start_pfn)
    if across is not None and _hugetlb.isolate_hugetlb(m.memmap_engine, across):
        pfns = np.concatenate([np.array([across], dtype=np.uint64), pfns])
    refused = refused[: min(bad, len(refused))]
    held = [int(p) for p in refused if _page_ref.is_orphan(m.memmap_engine, int(p))]
    for pfn in refused:
        if int(pfn) in held:
            continue
        _warn(m, f"failed to isolate pfn {int(pfn):x}", int(pfn), "isolation failed")
    if not len(pfns):
        return _warn_of_held(m, held, MigrationResult())
    target = hot_remove_target(m, int(pfns[0]))
    if n >= MANY_PAGES:
        _expect_targets(m, n, target)
    result = migrate_pages(m, pfns, target)
    if m.balloons:
        note_migrated(m, *result.moved())
    code = result.code or len(result.left)
    for pfn in result.left[:10]:
        _warn(m, f"migrating pfn {int(pfn):x} failed ret:{code}", int(pfn), "migration failure")
    return _warn_of_held(m, held, result)


def _warn_of_held(m: Machine, held: list[int], result: MigrationResult) -> MigrationResult:
    """Tell of pages without a user that are pinned, which stay as others that are held do."""
    for pfn in held:
        _warn(m, f"migrating pfn {pfn:x} failed ret:{len(held)}", pfn, "migration failure")
    if held:
        m.count_vm_event("pgmigrate_fail", len(held))
        result.left = np.concatenate([result.left, np.array(held, dtype=np.uint64)])
        result.nr_failed += len(held)
    return result
