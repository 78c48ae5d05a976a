"""Moving used pages from a range elsewhere (mm/migrate.c)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _migrate, _page_ref
from kmm.errors import KernelError
from kmm.gfp import (
    __GFP_COMP,
    __GFP_HIGHMEM,
    __GFP_MOVABLE,
    __GFP_RECLAIM,
    __GFP_RETRY_MAYFAIL,
    GFP_TRANSHUGE,
    GFP_USER,
)
from kmm.hugetlb_move import (
    HugetlbResult,
    mark_huge_pages,
    migrate_hugetlbs,
)
from kmm.page_alloc import __alloc_pages
from kmm.page_writeback import folio_wait_writeback
from kmm.params import (
    MIGRATE_AGAIN,
    MIGRATE_DONE,
    MIGRATE_FAILED,
    MIGRATE_GONE,
    MIGRATE_PENDING,
    MIGRATE_SYNC,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_ISOLATED,
    PG_PINNED,
    PG_WRITEBACK,
    USER_HUGETLB,
    ZONE_MOVABLE,
)
from kmm.trace import note, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

#: How often a page that somebody holds is tried within one batch, and from which pass on it may be
#: waited for.
MAX_PASSES, FORCE_FROM_PASS = 10, 3

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
    failures: int = 0  # entries of the list that failed; the parts of a split one are not counted
    left: Pfns = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    work: _List | None = None
    huge: HugetlbResult | None = None

    @property
    def ret(self) -> int:
        """What migrate_pages returns: a negative errno, else the failures, 0 if nothing is left."""
        return self.code or (self.failures if len(self.left) else 0)

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

    def __init__(
        self, m: Machine, pfns: Pfns, target: MigrationTarget, mode: int = MIGRATE_SYNC
    ) -> None:
        self.m, self.target, self.mode = m, target, mode
        self.pfns = pfns
        # Large fresh arrays would cost the host more than the migration.
        self.status, self.to = m.scratch.arrays(len(pfns))
        self.result = MigrationResult(work=self)
        self.left = [pfns[:0]]

    def all_batches(self) -> None:
        """Move batch after batch; the first page without a target ends it."""
        at, t, m = 0, self.target, self.m
        while at < len(self.pfns) and not self.result.code:
            start, end, stopped = _migrate.migrate_batches(
                m, self.pfns, self.status, at, t.gfp, t.nid, t.nodes, m.this_cpu, self.mode, self.to
            )
            at = end if start == end else self._passes(start, end, stopped)
        if at < len(self.pfns):
            self.left.append(self.pfns[at:])

    def _passes(self, start: int, end: int, at: int, *, parts: bool = False) -> int:
        """Go on with a batch, from where its first pass stopped; where the next one begins.

        :param parts: whether it is what a huge page was split into, which has failed already.
        """
        for nr in range(MAX_PASSES):
            if nr or parts:
                at = self._once(start, end, nr)
            while at < end:
                if self._slowly(at, nr):
                    return self._passes(at, at + PAGEBLOCK_NR_PAGES, at, parts=True)
                if self.result.code:
                    break
                at = self._once(at, end, nr)
            again = self.status[start:end] == MIGRATE_AGAIN
            if self.result.code or nr == MAX_PASSES - 1 or not again.any():
                break
            self.status[start:end][again] = MIGRATE_PENDING
        self._note_failed(start, end, parts)
        return end

    def _once(self, at: int, end: int, nr: int) -> int:
        """Go on with a pass from an entry of a batch; where it stopped."""
        t, m, force = self.target, self.m, nr >= FORCE_FROM_PASS
        where = (t.gfp, t.nid, t.nodes, m.this_cpu)
        return _migrate.migrate_pages_once(
            m, self.pfns, self.status, at, end, *where, self.mode, force, self.to
        )

    def _slowly(self, at: int, nr: int) -> bool:
        """Give one page a target that has to be waited for, and wait for its writeback if it may.

        :return: whether it was a huge page without target, whose parts have taken its place.
        """
        m, pfn = self.m, int(self.pfns[at])
        huge = is_huge(m, pfn)
        try:
            to = alloc_migration_target(m, pfn, self.target)
        except KernelError:  # whatever it failed with, there is no target
            if m.user_of(pfn) is None:
                self._let_go(at)  # while this waited
            elif huge and self._can_split(pfn):
                self._split(at, pfn)
                return True
            else:
                self.result.code = -12
            return False
        if nr >= FORCE_FROM_PASS and self.mode == MIGRATE_SYNC:
            folio_wait_writeback(m, pfn)
        marks = _page_ref.marks(m.memmap_engine, pfn)
        if marks & PG_ISOLATED and marks & (PG_PINNED | PG_WRITEBACK):
            may_not_wait = marks & PG_WRITEBACK and self.mode != MIGRATE_SYNC
            self.status[at] = MIGRATE_FAILED if may_not_wait else MIGRATE_AGAIN
        elif _migrate.migrate_to(m, pfn, to, m.this_cpu):
            self.status[at], self.to[at] = MIGRATE_DONE, to
            return False
        else:
            self._let_go(at)
        m.free_pages(to, PAGEBLOCK_ORDER if is_huge(m, to) else 0)
        return False

    def _let_go(self, at: int) -> None:
        self.status[at] = MIGRATE_GONE
        self.m.count_vm_event("pgmigrate_success")

    def _can_split(self, pfn: int) -> bool:
        if not _page_ref.marks(self.m.memmap_engine, pfn) & (PG_PINNED | PG_WRITEBACK):
            return True
        self.m.count_vm_event("thp_split_page_failed")
        return False

    def _split(self, at: int, pfn: int) -> None:
        """Put the parts of a huge page, which is a batch of its own, in its place."""
        _migrate.split_isolated(self.m, pfn)
        self.result.nr_thp_split += 1
        self.result.nr_thp_failed += 1
        self.result.failures += 1
        parts = np.arange(pfn, pfn + PAGEBLOCK_NR_PAGES, dtype=np.uint64)
        self.pfns = np.concatenate([self.pfns[:at], parts, self.pfns[at + 1 :]])
        none = np.zeros(PAGEBLOCK_NR_PAGES, dtype=np.uint64)
        self.to = np.concatenate([self.to[:at], none, self.to[at + 1 :]])
        pending = none.astype(np.uint8)
        self.status = np.concatenate([self.status[:at], pending, self.status[at + 1 :]])

    def _note_failed(self, start: int, end: int, parts: bool) -> None:
        """Count what a batch leaves behind: what was given up comes before what was tried again."""
        pfns, status = self.pfns[start:end], self.status[start:end]
        failed, again = status == MIGRATE_FAILED, status == MIGRATE_AGAIN
        pending = status == MIGRATE_PENDING
        self.left += [pfns[failed], pfns[again | pending]]
        entries = int(np.count_nonzero(failed | again)) + (self.result.code != 0)
        # A huge page is alone in its batch.
        huge = entries == 1 and is_huge(self.m, int(pfns[0]))
        self.result.nr_failed += PAGEBLOCK_NR_PAGES if huge else entries
        self.result.nr_thp_failed += huge
        self.result.failures += 0 if parts else entries


@traced
def migrate_pages(
    m: Machine, pfns: Pfns, target: MigrationTarget, mode: int = MIGRATE_SYNC
) -> MigrationResult:
    """Move isolated pages, first to last; those that cannot be moved go back to their lists.

    Huge pages of pools come first, then batches of at most 512 base pages.  A page that somebody
    holds is tried ten times within its batch, one that is being written waited for from the fourth
    time on.  One that has nowhere to go ends the call, but a huge page is split first.

    :param pfns: isolated pages, a uint64 array.
    :param mode: MIGRATE_SYNC, else what is being written is not waited for and fails at once.
    :return: what became of them.
    """
    try:
        return _migrate_pages(m, pfns, target, mode)
    except BaseException:
        # What is neither moved nor back on its list would be lost to everybody.
        _migrate.putback_movable_pages(m.memmap_engine, pfns)
        raise


def _migrate_pages(m: Machine, pfns: Pfns, target: MigrationTarget, mode: int) -> MigrationResult:
    note(m, "alloc_migration_target", len(pfns))
    huge = mark_huge_pages(m, pfns)
    if not huge.any():
        return _migrate_others(m, pfns, target, mode)
    first = migrate_hugetlbs(m, pfns[huge], target.gfp, target.nid, target.nodemask)
    if first.code:
        result = MigrationResult(code=first.code, left=pfns[~huge])
        _migrate.putback_movable_pages(m.memmap_engine, result.left)
    else:
        result = _migrate_others(m, pfns[~huge], target, mode)
    result.nr_succeeded += first.nr_succeeded
    result.nr_failed += first.nr_failed
    result.failures += len(first.left)
    result.left = np.concatenate([first.left, result.left])
    result.huge = first
    return result


def _migrate_others(m: Machine, pfns: Pfns, target: MigrationTarget, mode: int) -> MigrationResult:
    """Move what is no huge page of a pool."""
    work = _List(m, pfns, target, mode)
    # To find room for a page others may have to be moved meanwhile.
    scratch, m.scratch = m.scratch, Scratch()
    try:
        work.all_batches()
        return _finish(m, work)
    except BaseException:
        _migrate.putback_movable_pages(m.memmap_engine, work.pfns)
        raise
    finally:
        m.scratch = scratch


def _finish(m: Machine, work: _List) -> MigrationResult:
    result = work.result
    result.nr_succeeded, result.nr_thp_succeeded = _migrate.count_moved(
        m.memmap_engine, work.status, work.to
    )
    m.count_vm_event("pgmigrate_fail", result.nr_failed)
    m.count_vm_event("thp_migration_fail", result.nr_thp_failed)
    m.count_vm_event("thp_migration_split", result.nr_thp_split)
    result.left = np.concatenate(work.left)
    if len(result.left):
        _migrate.putback_movable_pages(m.memmap_engine, result.left)
    return result
